"""`foveate sweep` as a shell sees it."""

import csv
import json

import pytest
from typer.testing import CliRunner

import foveate
from foveate.cli import app
from foveate.cli.grid import listed_recipes

pytestmark = pytest.mark.slow  # a sweep of the shipped model

ZOO = "zoo:tiny-llava"


def invoke(*arguments):
    return CliRunner().invoke(app, ["sweep", *map(str, arguments)])


def complaint(*arguments):
    """The one line on stderr of a command that must fail with 2 and say nothing else."""
    result = invoke(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert not result.stdout
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A small sweep with everything it can write."""
    folder = tmp_path_factory.mktemp("sweep")
    arguments = [
        ZOO, "--data", "scenes", "--methods", "random,fastv[average=all_layers],downsample,pumer", "--keep", "0.5,20",
        "--samples", 6, "--seeds", "0,1", "--option", "fastv.layer=1", "--repeats", 1, "--out", folder / "out",
        "--json", folder / "s.json", "--csv", folder / "s.csv",
        "--plots", folder / "plots", "--html", folder / "s.html",
    ]  # fmt: skip
    result = invoke(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return folder, arguments, result


def test_the_table_and_the_files(done):
    folder, _, result = done
    lines = result.stdout.splitlines()
    table = [line.split() for line in lines[1:8]]
    ids = ["full", "random", "random", "fastv[average=all_layers;layer=1]", "fastv[average=all_layers;layer=1]",
           "downsample", "downsample"]  # fmt: skip
    assert [row[0] for row in table] == ids
    assert [row[1] for row in table] == ["1", "0.5", "20", "0.5", "20", "0.5", "20"]
    assert any(line.startswith("Against random at equal FLOPs") for line in lines)
    assert any(line.startswith("Refused: pumer: ") for line in lines)
    assert all(
        line.startswith(("trying the methods: ", "answers, then times: ")) for line in result.stderr.splitlines()
    )
    found = json.loads((folder / "s.json").read_text())
    assert found == json.loads((folder / "out" / "result.json").read_text())
    assert (found["model"], found["data"], found["samples"]) == (ZOO, ["scenes"], 6)
    contract = {"method", "options", "keep", "accuracy", "accuracy_full", "relative", "agreement", "kl", "flops_ratio",
            "visual_tokens_entering", "visual_tokens_after", "kv_ratio", "prefill_ms", "prefill_ms_full"}  # fmt: skip
    assert all(contract <= row.keys() and row["prefill_ms"] > 0 for row in found["rows"])
    with open(folder / "s.csv", newline="") as file:
        flat = list(csv.DictReader(file))
    assert [row["id"] for row in flat] == [row["id"] for row in found["rows"]]
    assert float(flat[1]["accuracy_ci.low"]) == found["rows"][1]["accuracy_ci"][0]
    assert flat[3]["options"] == "average=all_layers layer=1"
    assert (folder / "s.html").stat().st_size > 10_000
    assert any((folder / "plots").glob("*.png"))


def test_again_it_only_reads(done, tmp_path):
    folder, arguments, _ = done
    before = (folder / "out" / "result.json").read_bytes()
    stamp = (folder / "out" / "times.json").stat().st_mtime_ns
    assert invoke(*arguments[: arguments.index("--json")]).exit_code == 0
    assert (folder / "out" / "result.json").read_bytes() == before
    assert (folder / "out" / "times.json").stat().st_mtime_ns == stamp
    line = complaint(*arguments[: arguments.index("--json")], "--seed", 5)
    assert "seed was 0, now it is 5" in line
    assert str(folder / "out") in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "fastv,fastr"], "unknown method 'fastr', did you mean fastv?; known: averagepool"),
        (["--methods", "fastv[layer"], "bracket"),
        (["--methods", "fastv[layer]"], "'layer' is not option=value"),
        (["--methods", "fastv[depth=3]"], "no option 'depth'"),
        (["--methods", ","], "methods ','"),
        (["--methods", "fastv,fastv"], "fastv@0.33 is listed twice"),
        (["--keep", "0.3,1.5"], "keep=1.5"),
        (["--keep", "0"], "keep=0"),
        (["--methods", "fastv", "--option", "layer=1"], "option 'layer=1'"),
        (["--methods", "fastv", "--option", "dart.layer=1"], "dart takes no part"),
        (["--methods", "fastv", "--option", "fastr.layer=1"], "unknown method 'fastr'"),
        (["--seeds", "0,x"], "seeds '0,x'"),
        (["--seeds", "1,1"], "one is listed twice"),
        (["--data", "scenes,scenes"], "once"),
        (["--data", "hard-vqa"], "hard-vqa"),
        (["--metric", "bleu", "--samples", "2"], "metric bleu"),
        (["--metric", "choice", "--samples", "2"], "'choices'"),
        (["--samples", "0"], "--samples"),
        (["--grid", "none.yaml"], "none.yaml"),
        (["--contestants", "none.yaml"], "none.yaml"),  # the old name of --grid
        (["--grid", "a.yaml", "--contestants", "b.yaml"], "the old name of --grid"),
    ],
)
def test_bad_input_is_one_line(arguments, said, tmp_path):
    assert said in complaint(ZOO, *arguments, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_broken_line_of_data_is_named(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"image": "x.png", "question": "?", "answer": "a"}\n{"image": "x.png"}\n')
    assert "d.jsonl, line 2: no 'question'" in complaint(ZOO, "--data", tmp_path / "d.jsonl", "--out", tmp_path / "x")


def test_options_that_the_model_refuses(tmp_path):
    arguments = [ZOO, "--samples", 2, "--data", "scenes", "--out", tmp_path / "x", "--keep", "0.5"]
    assert "layer=99" in complaint(*arguments, "--methods", "fastv[layer=99]")
    assert "serves none of them; pumer" in complaint(*arguments, "--methods", "pumer")
    assert "file" in complaint(*arguments[:-4], "--out", __file__)


def test_a_grid_from_a_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "- {method: fastv, options: {layer: 1}, keep: [0.5, 9]}\n- {method: vtw, keep: 0.3}\n- method: dart\n"
    )
    found, named = listed_recipes(None, [], path, ZOO)
    assert [(each.method, dict(each.options), each.keep) for each in found] == [
        ("fastv", {"layer": 1}, 0.5), ("fastv", {"layer": 1}, 9), ("vtw", {}, 0.3), ("dart", {}, None),
    ]  # fmt: skip
    assert named == {"fastv", "vtw", "dart"}
    both, _ = listed_recipes("random", [], path, ZOO)
    assert [each.method for each in both] == ["random", "fastv", "fastv", "vtw", "dart"]
    for text, said in (
        ("{", "not YAML"), ("method: fastv", "a list"), ("- fastv", "entry 1"), ("- {m: 1}", "entry 1"),
        ("- {method: fastv, options: [1]}", "mapping"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            listed_recipes(None, [], path, ZOO)


def test_all_is_every_method():
    found, named = listed_recipes("all", ["fastv.layer=1"], None, "some/model")
    assert [each.method for each in found] == list(foveate.names())
    assert named == set()
    assert dict(found[foveate.names().index("fastv")].options) == {"layer": 1}
    found, named = listed_recipes("all,fastv[layer=3]", [], None, ZOO)
    assert sum(each.method == "fastv" for each in found) == 1
    assert sum(each.method == "cdpruner" for each in found) == 2
    assert named == {"fastv"}


def test_questions_about_videos(tmp_path):
    """Budgets per video; what the accuracy of a model without videos means is said; workers see the same frames."""
    result = invoke(
        ZOO, "--data", "moving-shapes", "--methods", "evs,dycoke", "--keep", "150", "--samples", 4, "--frames", 3,
        "--workers", 2, "--batch-size", 2, "--repeats", 1, "--out", tmp_path / "out", "--html", tmp_path / "s.html",
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [row["visual_tokens_entering"] for row in found["rows"]] == [3 * 196, 196, 196]  # a whole frame at least
    assert "shown 3 frames" in found["notes"][0]
    assert "never trained on videos: read tokens, FLOPs and times, not accuracy" in result.stdout
    page = (tmp_path / "s.html").read_text()
    assert "never trained on videos" in page
    again = invoke(
        ZOO, "--data", "moving-shapes", "--methods", "evs", "--samples", 4, "--frames", 5, "--batch-size", 2,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert again.exit_code == 2
    assert "holds another sweep: frames was 3, now it is 5" in again.stderr.splitlines()[-1]
