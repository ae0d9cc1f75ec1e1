"""What a visitor does on the page of `foveate app`, in Chromium at the size of a desk and of a phone."""

import re

import pytest
from PIL import Image

from .conftest import DOCS

ROWS = [
    "entering a layer", "left after a layer", "Decoder", "Vision + decoder", "KV cache", "Prefill", "Decoding",
]  # fmt: skip


def finished(page):
    """Wait until the bill holds the times of this question."""
    page.get_by_text(re.compile("each run .* medians")).wait_for()
    page.locator("#fv-stop").wait_for(state="hidden")


def ask(page):
    page.locator("#fv-ask").click()
    finished(page)


def bill(page):
    """Row -> (full, reduced, ratio in per cent); None where nothing is known yet."""
    found = {}
    for name in ROWS:
        row = page.locator("#fv-bill tbody tr", has_text=name).first
        cells = row.locator("td").all_inner_texts()
        found[name] = tuple(None if cell == "-" else float(cell.strip("%")) for cell in cells)
    return found


def picture(page, name):
    """The bytes of a picture as the browser got it."""
    source = page.locator(f"#{name} img").get_attribute("src")
    return page.request.get(source).body()


def move(page, name, key, times=1):
    """Move a slider by keyboard."""
    handle = page.locator(f"#{name} input[type=range]")
    handle.focus()
    for _ in range(times):
        handle.press(key)


def changed(page, read, before):
    """Wait until `read(page)` is something else."""
    for _ in range(300):
        if (now := read(page)) != before:
            return now
        page.wait_for_timeout(100)
    pytest.fail("nothing changed")


def test_ask_then_move_budget_and_layer(page):
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    ask(page)
    page.locator("#fv-pictures").scroll_into_view_if_needed()  # they are loaded when they are seen
    for name in ("fv-kept", "fv-scores"):
        page.locator(f"#{name} img").wait_for()
    full, reduced = page.locator(".fv-answer").all_inner_texts()
    assert full.strip() == "orange"
    assert reduced.strip()
    first = bill(page)
    assert first["entering a layer"][0] == 196
    assert first["left after a layer"][2] == pytest.approx(33, abs=2)
    assert 0 < first["Decoder"][1] < first["Decoder"][0] < first["Vision + decoder"][0]
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    page.evaluate("window.scrollTo(0, 0)")
    page.wait_for_function("[...document.querySelectorAll('#fv-tokens img')].every(i => i.complete && i.naturalWidth)")
    DOCS.mkdir(exist_ok=True)
    page.screenshot(path=DOCS / f"app-{page.kind}.png", full_page=True)

    # The layer slider changes the pictures and their captions.
    last = picture(page, "fv-kept")
    assert "Tokens entering layer 5: " in page.locator("#fv-tokens").inner_text()
    move(page, "fv-stage", "ArrowLeft", 4)
    page.get_by_text(re.compile("Tokens entering layer 1: ")).wait_for()
    assert changed(page, lambda page: picture(page, "fv-kept"), last) != last

    # The budget slider asks again: picture, bill and answers follow.
    move(page, "fv-stage", "End")
    page.get_by_text(re.compile("Tokens entering layer 5: ")).wait_for()
    before, scored = picture(page, "fv-kept"), picture(page, "fv-scores")
    move(page, "fv-keep", "ArrowLeft", 20)
    page.get_by_text("sparsevlm, 13%").wait_for()
    finished(page)
    assert changed(page, lambda page: picture(page, "fv-kept"), before) != before
    second = bill(page)
    for name in ("entering a layer", "left after a layer", "Decoder", "Vision + decoder", "KV cache"):
        assert second[name][1] < first[name][1]
        assert second[name][0] == first[name][0]
    assert picture(page, "fv-scores") != scored


def test_another_method_brings_its_options(page):
    ask(page)
    before = picture(page, "fv-kept")
    box = page.locator("#fv-method input")
    box.click()
    box.fill("fastv")
    page.get_by_role("option", name="fastv", exact=True).click()
    page.locator("#fv-layer").wait_for()
    page.get_by_text("fastv, 33%").wait_for()
    finished(page)
    assert changed(page, lambda page: picture(page, "fv-kept"), before) != before
    entering = bill(page)["entering a layer"][1]
    move(page, "fv-layer", "ArrowLeft", 1)
    assert changed(page, lambda page: bill(page)["entering a layer"][1], entering) < entering
    finished(page)


def test_examples_fill_the_form_and_ask(page):
    page.locator("#fv-examples .gallery-item").nth(1).click()
    finished(page)
    assert "digit" in page.locator("#fv-question textarea").input_value()
    assert page.locator(".fv-answer").first.inner_text().strip() == "4"


def broken_png(path):
    Image.new("RGB", (64, 64), "red").save(path)
    path.write_bytes(path.read_bytes()[:60])


def text_as_png(path):
    path.write_text("not an image at all")


def huge_png(path):
    Image.new("1", (9000, 9000)).save(path)


@pytest.mark.parametrize(
    ("make", "says"),
    [(broken_png, "cannot be read"), (text_as_png, "not an image"), (huge_png, "too large")],
)
def test_a_bad_upload_gets_one_line_and_the_page_goes_on(page, tmp_path, make, says):
    path = tmp_path / "holiday.png"
    make(path)
    page.get_by_label("Remove Image").click()
    page.locator("#fv-image input[type=file]").set_input_files(path)
    line = page.locator(".fv-error")
    line.wait_for()
    assert says in line.inner_text()
    assert "holiday.png" in line.inner_text()
    assert "\n" not in line.inner_text()
    page.locator("#fv-ask").click()
    page.get_by_text("Choose an image first.").wait_for()
    page.locator("#fv-examples .gallery-item").first.click()
    finished(page)
    assert page.locator(".fv-error").count() == 0


def test_a_visitor_loads_no_model_but_those_of_the_list(page):
    """The page was started with one model, so there is nothing to choose."""
    box = page.locator("#fv-model input")
    assert box.input_value() == "zoo:tiny-llava"
    assert box.is_disabled()


def test_an_empty_question_and_an_unknown_option_get_one_line(page):
    page.locator("#fv-question textarea").fill("")
    page.locator("#fv-ask").click()
    page.get_by_text("Type a question first.").wait_for()
    page.locator("#fv-question textarea").fill("what color is the cross?")
    ask(page)
    page.get_by_text("More options").click()
    box = page.locator("#fv-others textarea")
    box.fill("colour=1")
    box.press("Enter")
    page.locator(".fv-error", has_text="colour").wait_for()


def test_a_question_can_be_stopped(page):
    page.locator("#fv-ask").click()
    page.locator("#fv-stop").click()
    page.get_by_text("Stopped.").wait_for()
    page.locator("#fv-stop").wait_for(state="hidden")
    ask(page)
