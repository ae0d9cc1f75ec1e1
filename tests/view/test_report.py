"""The report says what the folder says, and lets nothing in or out."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image

from foveate.engine.apply import apply
from foveate.evaluate.answer import answer, load
from foveate.evaluate.data import load as data
from foveate.evaluate.grid import build_reducer
from foveate.evaluate.runner import Record
from foveate.evaluate.store import Folder, SweepError
from foveate.view.findings import best_per_budget, headline, versus_baselines
from foveate.view.folder import read
from foveate.view.report import write_report

from .folders import make, write_lines

HOSTILE = '<script>alert(1)</script> & "quoted" <img src=https://evil.example/x.png onerror=alert(2)> \ud800 ${title}'
VOID = {"meta", "img", "source", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what a test asks for."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.cells, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data
            if {"td", "th"} & set(self.open):
                self.cells[-1][-1] += data

    def attributes(self, *names):
        return [value for _, attributes in self.tags for name, value in attributes.items() if name in names]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(rows, page as text, page parsed) of a sweep with a hostile question, without a model."""
    folder = tmp_path_factory.mktemp("report") / "sweep"
    rows = make(folder, ("random", "averagepool", "fastv", "visionzip"), samples=30, question=HOSTILE)
    # One answer is hostile, too, and makes a change worth showing.
    records = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    for record in records:
        if record["recipe"] == "fastv@0.2" and record["sample"] == 0:
            record.update(predicted=HOSTILE, score=0.0, same=False)
        elif record["sample"] == 0:
            record.update(score=1.0)
    write_lines(folder / "answers.jsonl", records)
    path = folder / "page" / "report.html"
    write_report(folder, None, path, examples=40)
    text = path.read_text(encoding="ascii")
    return rows, text, Page(text)


def test_nothing_is_loaded_from_anywhere(written):
    _, text, page = written
    for value in page.attributes("src", "srcset", "href"):
        assert value.startswith(("data:image/", "#")), value[:80]
    assert not re.search(r"url\(|@import", text)
    policy = next(
        attributes["content"] for tag, attributes in page.tags if tag == "meta" and "http-equiv" in attributes
    )
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert len(text) < 5_000_000


def test_every_row_and_every_number_is_there(written):
    rows, _, page = written
    table = [[cell.strip() for cell in row] for row in page.cells]
    for row in rows:
        budget, accuracy = f"{row['keep']:g}", f"{row['accuracy']:.1%}"
        assert any(
            line[0].startswith(row["method"]) and line[1] == budget and line[2].startswith(accuracy)
            and any(cell.startswith(f"{row['visual_tokens_entering']:.1f}") for cell in line)
            and any(cell.startswith(f"{row['prefill_ms']:.1f}") for cell in line)
            for line in table if len(line) > 8
        ), row["id"]  # fmt: skip
    assert "works inside <ViLT>, METER & BridgeTower" in page.text
    assert "foveate sweep zoo:tiny-llava --data scenes" in page.text
    for kind in rows[0]["accuracy_by_kind"]:
        assert kind.replace("\ud800", "\ufffd") in page.text


def test_hostile_text_stays_text(written):
    _, text, page = written
    assert "<script>alert" not in text
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not page.attributes("onerror", "onload", "onclick")
    assert page.text.count('<script>alert(1)</script> & "quoted"') >= 2  # the question and the answer


def test_the_policy_admits_the_script_of_the_page_and_no_other(written):
    text = written[1]
    script = re.search(r"<script>(.*?)</script>", text, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def test_pictures_are_pictures(written):
    page = written[2]
    uris = page.attributes("src", "srcset")
    assert len(uris) == 2 * 3  # light and dark, three costs; few methods share one panel
    for uri in uris:
        kind, content = uri.removeprefix("data:").split(";base64,")
        assert kind == "image/svg+xml"
        root = ElementTree.fromstring(base64.b64decode(content, validate=True))
        assert root.tag.endswith("svg")


def test_readable_without_a_script(written):
    text = re.sub(r"<script>.*?</script>", "", written[1], flags=re.S)
    page = Page(text)
    assert "button" not in [tag for tag, _ in page.tags]
    assert "No pictures: the model was not at hand" in page.text


def test_examples_show_what_was_dropped(tmp_path):
    """Answers of the model itself, so that asking again gives them again."""
    vlm = load("zoo:tiny-llava")
    folder = tmp_path / "sweep"
    make(folder, ("vtw", "fastv"), keeps=(0.3,), samples=12, options={"fastv": {"layer": 1, "average": "all_layers"}})
    records = [Record.from_json(json.loads(line)) for line in (folder / "answers.jsonl").read_text().splitlines()]
    recipes = {each.id: each for each in Folder(folder).plan().recipes}
    asked = data("scenes", 12, 0)
    changed = []
    for record in records:
        told = record.to_json()
        if record.recipe.startswith("fastv") and record.sample < 2:
            with apply(vlm.model, build_reducer(recipes[record.recipe], vlm)):
                told["predicted"] = answer(vlm, vlm.inputs([asked[record.sample]])).texts[0]
            told.update(same=False, score=0.0)
        else:
            told.update(same=True, score=1.0)
        changed.append(told)
    write_lines(folder / "answers.jsonl", changed)
    path = tmp_path / "report.html"
    write_report(folder, vlm, path, examples=4)
    page = Page(path.read_text())
    pictures = [uri for uri in page.attributes("src") if uri.startswith("data:image/jpeg")]
    images = {asked[i].image_id for i in (0, 1)}
    assert len(pictures) == 3 * len(images)  # the image, what was kept, the scores
    for uri in pictures:
        picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
        assert min(picture.size) >= 200
    assert "after layer 0:" in page.text
    assert asked[0].question in page.text
    assert not vlm.model._forward_pre_hooks


def test_an_unfinished_sweep_says_so(tmp_path):
    make(tmp_path / "sweep", ("random", "vtw"), samples=8, finished=False)
    path = tmp_path / "report.html"
    write_report(tmp_path / "sweep", None, path)
    page = Page(path.read_text())
    assert "This sweep is not finished: 28 of 56 answers (50%)" in page.text
    assert any(row[:2] == ["random@0.5#0", "8 of 8"] for row in page.cells)
    assert any(row[:2] == ["vtw@0.2", "0 of 8"] for row in page.cells)
    assert "Summary" not in page.text


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    with pytest.raises(SweepError, match=r"sweep\.json"):
        write_report(tmp_path / "none", None, tmp_path / "report.html")
    make(tmp_path / "sweep", ("random",), samples=6)
    path = tmp_path / "report.html"
    path.write_text("as it was")
    monkeypatch.setattr("foveate.view.report._foot", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(tmp_path / "sweep", None, path)
    assert path.read_text() == "as it was"
    (tmp_path / "sweep" / "result.json").write_text('{"rows": [{}]}')
    with pytest.raises(SweepError, match=r"result\.json"):
        write_report(tmp_path / "sweep", None, path)


def test_findings_agree_with_the_rows(tmp_path):
    rows = make(tmp_path / "sweep", ("random", "averagepool", "fastv", "visionzip", "vtw"), samples=60)
    results = read(tmp_path / "sweep")
    for best in best_per_budget(results):
        here = [row for row in rows if row["keep"] == best.keep and row["method"] != "full"]
        assert best.entry.accuracy == max(row["accuracy"] for row in here)
        assert best.entry not in best.ties
    known = versus_baselines(results)
    assert list(known) == ["random", "averagepool"]
    for baseline, verdicts in known.items():
        assert set(verdicts) == {r["id"] for r in rows if r["method"] in ("fastv", "visionzip", "vtw")}
        for row in rows:
            if row["id"] in verdicts and row["versus"][baseline]:
                assert verdicts[row["id"]].difference == row["versus"][baseline]["difference"]
                if verdicts[row["id"]].verdict == "better":
                    assert row["versus"][baseline]["difference"] > 0
                    assert row["versus"][baseline]["p"] < 0.05
    text = " ".join(headline(results))
    assert f"{rows[0]['accuracy']:.1%} on 60 questions" in text
    assert "Against random at equal total FLOPs" in text
