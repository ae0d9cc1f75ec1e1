"""What is behind the page of `foveate app`, without a browser and without Gradio."""

import math
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import foveate
from foveate.app import answer as answering
from foveate.app import html, run
from foveate.app.examples import examples
from foveate.app.options import controls, describe, parse_options, usable_methods
from foveate.app.pictures import entering_picture, score_picture, scoring_stage
from foveate.app.run import AskError, Bill, Progress, Question, Runner, Stopped, explain, read_image
from foveate.cli import app as command_line
from foveate.engine.families.parts import resolve
from foveate.engine.session import _MARK
from foveate.evaluate.answer import answer, load
from foveate.evaluate.data import Sample
from foveate.measure import prefill_flops

MODEL = "zoo:tiny-llava"


@pytest.fixture(scope="module")
def runner():
    return Runner([MODEL])


@pytest.fixture(autouse=True)
def one_round_of_timing(monkeypatch):
    monkeypatch.setattr(answering, "_ENOUGH", (0.0, 0.0))


def question(method="fastv", keep=0.25, options=None, **changed):
    image, text = examples()[0]
    return Question(**{"model": MODEL, "image": image, "text": text, "method": method, "keep": keep,
                       "options": options or {}, **changed})  # fmt: skip


def patched(runner):
    """Whether anything of a session is left, once nobody works with the model any more."""
    with runner.model(MODEL) as vlm:
        hooks = [
            getattr(hook, "func", hook).__module__
            for module in vlm.model.modules()
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        ]
        ours = [name for name in hooks if name.startswith("foveate")]
        return _MARK in resolve(vlm.model).decoder.__dict__ or bool(ours) or "generate" in vlm.model.__dict__


# ---------------------------------------------------------------------------------------------------------- asking
def test_both_answers_and_the_bill_are_those_of_the_library(runner):
    asked = question(options={"layer": 1})
    steps = list(runner.ask(asked))
    assert next(step.writing for step in steps if step.writing) == "full"
    assert [step.writing for step in steps if step.writing][-1] == "reduced"
    last = steps[-1]
    assert (last.status, last.rounds) == ("", 1)
    vlm = load(MODEL)
    inputs = vlm.inputs([Sample(read_image(asked.image), asked.text, "", "", "")])
    with foveate.apply(vlm.model, foveate.FastV(keep=0.25, layer=1)) as session:
        assert last.text == answer(vlm, inputs, 64).texts[0]
    assert last.full_text == answer(vlm, inputs, 64).texts[0] == "orange"
    assert torch.equal(last.trace.visual_tokens, session.trace.visual_tokens)
    assert last.bill.total_flops == prefill_flops(vlm.model, session.trace, inputs).total
    assert last.full_bill.total_flops == prefill_flops(vlm.model, None, inputs).total
    assert last.bill.decoder_flops < last.full_bill.decoder_flops
    assert last.full_bill.entering == 196
    assert last.bill.kv_mb < last.full_bill.kv_mb
    assert min(last.bill.prefill_ms, last.bill.decode_ms, last.full_bill.prefill_ms, last.full_bill.decode_ms) > 0
    assert not patched(runner)


def test_the_full_answer_is_made_once(runner):
    list(runner.ask(question()))
    again = list(runner.ask(question(keep=0.1)))
    assert not [step for step in again if step.writing == "full"]
    assert again[-1].full_text == "orange"


def test_few_full_answers_are_kept(runner, monkeypatch):
    monkeypatch.setattr(run, "_REMEMBERED", 2)
    runner._full.clear()
    for longest in (1, 2, 3):
        list(runner.ask(question(longest=longest)))
    assert [key[-1] for key in runner._full] == [2, 3]


def test_a_photograph_is_drawn_as_the_model_sees_it(runner, monkeypatch):
    seen = Image.new("RGB", (20, 20))
    monkeypatch.setattr(run, "as_seen", lambda image, processor: seen)
    assert list(runner.ask(question()))[-1].image is seen


def test_a_reader_who_leaves_leaves_the_model_alone(runner):
    steps = runner.ask(question())
    while next(steps).writing != "reduced":
        pass
    steps.close()
    assert not patched(runner)
    assert list(runner.ask(question()))[-1].rounds


def test_stopping_is_told_and_leaves_the_model_alone(runner):
    steps = runner.ask(question(), "tab")
    next(steps)
    runner.stop("tab")
    with pytest.raises(Stopped):
        list(steps)
    assert not patched(runner)
    runner.forget("tab")


class Fails(foveate.reduction.Reducer):
    stages = (1,)

    def decide(self, view):
        raise RuntimeError("no idea\nwhat to keep")


def test_an_error_on_the_way_is_one_line_and_leaves_the_model_alone(runner, monkeypatch):
    monkeypatch.setattr(run, "build_reducer", lambda *a, **k: Fails())
    with pytest.raises(RuntimeError) as error:
        list(runner.ask(question()))
    assert explain(error.value) == "This did not work: no idea what to keep"
    monkeypatch.undo()
    assert not patched(runner)


def test_a_newer_question_of_the_same_tab_ends_the_older_one(runner):
    older = runner.ask(question(keep=0.9), "tab", stamp=1)
    next(older)
    newer = list(runner.ask(question(keep=0.2), "tab", stamp=2))
    assert newer[-1].rounds
    assert not [step for step in older if step.rounds]
    assert list(runner.ask(question(keep=0.5), "tab", stamp=1.5)) == []  # it comes too late
    runner.forget("tab")
    assert list(runner.ask(question(keep=0.5), "tab", stamp=1.5))


def test_tabs_wait_for_each_other(runner):
    found = {}

    def ask(tab, keep):
        found[tab] = list(runner.ask(question(keep=keep, options={"layer": 1}), tab))[-1]

    tabs = {"a": 0.5, "b": 0.25, "c": 0.125}
    threads = [threading.Thread(target=ask, args=each) for each in tabs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for tab, keep in tabs.items():
        assert int(found[tab].trace.visual_tokens[0, -1]) == round(196 * keep)


# -------------------------------------------------------------------------------------------------------- bad input
def bad_uploads(folder):
    (folder / "notes.txt").write_text("hello")
    Image.new("RGB", (64, 64)).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:50])
    Image.new("1", (9000, 9000)).save(folder / "wall.png")
    return {"notes.txt": "not an image", "cut.png": "cannot be read", "wall.png": "too large"}


def test_bad_uploads_are_named_without_their_folder(tmp_path):
    for name, reason in bad_uploads(tmp_path).items():
        with pytest.raises(AskError) as error:
            read_image(tmp_path / name)
        assert reason in str(error.value)
        assert name in str(error.value)
        assert str(tmp_path) not in str(error.value)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"image": None}, "image"),
        ({"text": "  "}, "question"),
        ({"model": "zoo:nope"}, "nope"),
        ({"model": "zoo:tiny-vilt"}, "not on offer"),  # it exists
        ({"text": "why? " * 300}, "too long"),
        ({"method": "os:getcwd"}, "os:getcwd"),
        ({"method": "full"}, "full"),
        ({"method": "cdpruner", "options": {"clip": "zoo:tiny-clip"}}, "clip='zoo:tiny-clip' is not on offer"),
        ({"method": "cdpruner", "options": {"siglip": ["/etc"], "tokenizer": "x"}}, "siglip"),
        ({"keep": 0.0}, "keep=0.0"),
        ({"method": "fastw"}, "fastw"),
        ({"options": {"colour": 1}}, "colour"),
        ({"options": {"layer": 99}}, "99"),
    ],
)
def test_bad_questions_get_one_line(runner, changed, says):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        list(runner.ask(question(**changed)))
    line = explain(error.value)
    assert says in line
    assert "\n" not in line
    assert not line.startswith("This did not work")
    assert not patched(runner)


def test_a_companion_on_offer_is_loaded():
    runner = Runner([MODEL], ["zoo:tiny-clip"])
    asked = question("cdpruner", options={"clip": "zoo:tiny-clip", "negate": False})
    assert list(runner.ask(asked))[-1].trace.visual_tokens.max() < 196


def test_photographs_stand_upright(tmp_path):
    photo = Image.new("RGB", (40, 20))
    exif = photo.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    photo.save(tmp_path / "photo.jpg", exif=exif)
    assert read_image(tmp_path / "photo.jpg").size == (20, 40)


# ---------------------------------------------------------------------------------------------------------- options
def test_only_methods_that_work_with_the_model_are_offered(runner):
    with runner.model(MODEL) as vlm:
        offered = usable_methods(vlm.model)
    assert "pumer" not in offered
    assert {"fastv", "sparsevlm", "visionzip", "random"} <= set(offered)
    assert not patched(runner)


def test_controls_are_read_off_the_methods():
    assert controls("fastv", 6).layer == (1, 5, 2)
    assert controls("random", 6).layer == (-1, 5, -1)
    assert controls("fastv", 2).layer == (1, 1, 1)
    assert controls("sparsevlm", 6).choice.default == "1.5"
    assert controls("divprune", 6).layer is None
    for name in foveate.names():
        assert describe(name)
        if name != "pumer":
            assert not {"keep", "faithful"} & set(controls(name, 6).others)


def test_options_are_read_from_text():
    assert parse_options("tau=0.5, layers=[1, 3];merge=sum") == {"tau": 0.5, "layers": [1, 3], "merge": "sum"}
    assert parse_options("details={tau: 0.5, merge: sum}, bias=1") == {
        "details": {"tau": 0.5, "merge": "sum"},
        "bias": 1,
    }
    assert parse_options(" ") == {}
    for text in ("tau", "=3", "tau=", "tau=[1", "a={b: 1"):
        with pytest.raises(foveate.reduction.OptionError):
            parse_options(text)


# --------------------------------------------------------------------------------------------------- what is shown
def test_pictures_follow_the_layer(runner):
    last = list(runner.ask(question(options={"layer": 2})))[-1]
    before, after = (entering_picture(last.image, last.trace, layer) for layer in (0, 3))
    assert before.shape == after.shape
    assert after.mean() < 0.7 * before.mean()
    assert scoring_stage(last.trace, 1) is None
    assert score_picture(last.image, last.trace, 1) is None
    assert np.ptp(score_picture(last.image, last.trace, 3), axis=-1).max() > 50  # in colour
    columns = html.layers(last.trace, 3)
    assert columns.count('<div class="fv-column') == last.trace.n_layers
    assert "layer 3: 49 of 196" in columns
    assert "Tokens entering layer 3: 49 of 196" in html.layer_note(last.trace, 3)
    assert "later layer" in html.scores_note(last.trace, 1)


def shown(full="yes", text="no", **bill):
    numbers = {"entering": 10.0, "after": 8.0, "decoder_flops": 2e9, "total_flops": 3e9, "kv_mb": 1.0}
    half = Bill(**{**{name: value / 2 for name, value in numbers.items()}, **bill})
    return Progress(question(), "", Image.new("RGB", (8, 8)), full, text, full_bill=Bill(**numbers), bill=half)


def test_answers_are_text_and_compared():
    page = html.answers(shown("<b>yes</b>", "<script>no</script>"))
    assert "<script>" not in page
    assert "&lt;b&gt;yes" in page
    assert "differs" in page
    assert "differs" not in html.answers(shown("yes", "yes"))
    assert "(no answer)" in html.answers(shown("", "yes"))


def test_the_bill_has_ratios_where_both_sides_are_known():
    page = html.bill(shown(total_flops=math.nan))
    assert page.count("<b>50%</b>") == 4
    assert page.count('<td class="fv-ratio">-</td>') == 3  # total FLOPs and both times
    assert "<b>" not in html.bill(None)
    assert "fv-more" in html.bill(shown(kv_mb=2.0))


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "foveate.app.server", raising=False)
    result = CliRunner().invoke(command_line, ["app", "--no-browser"])
    assert result.exit_code == 2
    assert result.stderr.strip() == "foveate: the page needs Gradio: pip install 'foveate[app]'"
