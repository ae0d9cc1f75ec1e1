"""The command line as a shell sees it: exit codes, one line of complaint, tables, files."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
from PIL import Image
from transformers import LlamaConfig
from typer.testing import CliRunner

import foveate
from foveate import zoo
from foveate.cli import app, shell
from foveate.zoo.moving import clips
from foveate.zoo.scenes import scenes
from tests import families

ZOO = "zoo:tiny-llava"
RUN = ["run", ZOO, "--prompt", "what shape is red?"]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "scene.png"
    scenes(1, seed=3)[0].image.save(path)
    return path


def complaint(*arguments):
    """The one line on stderr of a command that must fail with 2 and say nothing else."""
    result = invoke(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert not result.stdout
    return lines[0]


# ------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("keep", ["0", "-3", "1.5", "abc", "nan"])
def test_bad_keep(picture, keep):
    line = complaint(*RUN, "--image", picture, "--method", "fastv", "--keep", keep)
    assert "keep" in line
    assert keep in line


def test_a_budget_that_removes_nothing_is_said(picture):
    result = invoke(*RUN, "--image", picture, "--method", "random", "--keep", "100000", "--repeats", "1")
    assert result.exit_code == 0
    assert "Nothing was removed: the prompt has 196 visual tokens" in result.stdout
    result = invoke(*RUN, "--image", picture, "--method", "random", "--keep", "0.5", "--repeats", "1")
    assert "Nothing was removed" not in result.stdout
    for keep, removes in (("100000", False), ("192", True)):
        result = invoke("flops", "llava-1.5-7b", "--method", "fastv", "--keep", keep)
        assert ("Nothing is removed" in result.stdout) != removes


def test_missing_image(tmp_path):
    line = complaint(*RUN, "--image", tmp_path / "none.png", "--method", "fastv", "--keep", "0.3")
    assert "none.png: no such file" in line


def test_broken_image(tmp_path, picture):
    cut, text = tmp_path / "cut.png", tmp_path / "text.png"
    cut.write_bytes(picture.read_bytes()[:300])
    text.write_text("not a picture")
    for path in (cut, text):
        line = complaint(*RUN, "--image", path, "--method", "fastv", "--keep", "0.3")
        assert path.name in line
        assert "cannot be read" in line


def test_unknown_method_lists_the_known(picture):
    line = complaint(*RUN, "--image", picture, "--method", "fastw", "--keep", "0.3")
    assert "'fastw'" in line
    assert all(name in line for name in foveate.names())
    assert "fastw" in complaint("flops", "llava-1.5-7b", "--method", "fastw", "--keep", "9")
    assert "fastw" in complaint("tune", ZOO, "--data", "scenes", "--method", "fastw")


@pytest.mark.parametrize("option", ["colour=red", "layer", "=3", "layer=abc", "layer={a: 1}"])
def test_bad_method_option(picture, option):
    line = complaint(*RUN, "--image", picture, "--method", "fastv", "--keep", "0.3", "--option", option)
    assert option.split("=")[0] in line


def test_keep_given_twice(picture):
    assert "twice" in complaint(*RUN, "--image", picture, "-m", "fastv", "-k", "3", "-o", "keep=4")


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["run", ZOO, "--colour", "red"], "--colour"),
        (["run", ZOO], "--image"),
        (["run", ZOO, "--image", "a.png"], "--prompt"),
        (["run"], "model"),
        (["paint"], "paint"),
        (["--colour"], "--colour"),
        (["demo", "--samples", "none"], "--samples"),
        (["demo", "--samples", "0"], "--samples"),
        (["flops"], "geometry"),
        (["tune", ZOO], "--data"),
    ],
)
def test_usage_errors_are_one_line(arguments, culprit):
    assert culprit.lower() in complaint(*arguments).lower()


def test_layer_beyond_the_depth(picture):
    line = complaint(*RUN, "--image", picture, "--method", "fastv", "--keep", "0.3", "--option", "layer=99")
    assert "layer=99" in line
    assert "6" in line
    assert "layer=99" in complaint("flops", "llava-1.5-7b", "--method", "vtw", "--option", "layer=99")


def test_missing_model(tmp_path, picture):
    rest = ["--image", picture, "--prompt", "x", "--method", "fastv", "--keep", "0.3"]
    assert "no such folder" in complaint("run", tmp_path / "gone", *rest)
    # Before a model is loaded: this one would be complained of, too.
    assert ".png, .pdf or .svg" in complaint("run", tmp_path / "gone", *rest, "--overlay", tmp_path / "kept.gif")
    assert "config.json" in complaint("run", tmp_path, *rest)
    assert "tiny-llava" in complaint("run", "zoo:huge-llava", *rest)  # the known ones


def test_text_only_model(tmp_path, picture):
    LlamaConfig(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=1).save_pretrained(
        tmp_path
    )
    line = complaint("run", tmp_path, "--image", picture, "--prompt", "x", "--method", "fastv", "--keep", "0.3")
    assert "no images" in line


def test_broken_model(tmp_path, picture):
    (tmp_path / "config.json").write_text("{")
    line = complaint("run", tmp_path, "--image", picture, "--prompt", "x", "--method", "fastv", "--keep", "0.3")
    assert str(tmp_path) in line


def test_broken_line_of_data(tmp_path, picture):
    good = json.dumps({"image": str(picture), "question": "what shape is red?", "answer": "star"})
    data = tmp_path / "data.jsonl"
    for bad in ("{", "[]", '{"image": "x.png", "question": "?"}', '{"image": "x.png", "question": 3, "answer": "a"}'):
        data.write_text(f"{good}\n{bad}\n{good}\n")
        line = complaint("tune", ZOO, "--data", data, "--method", "vtw")
        assert "data.jsonl, line 2" in line
    assert "gone.jsonl" in complaint("tune", ZOO, "--data", tmp_path / "gone.jsonl", "--method", "vtw")
    assert "easy-vqa" in complaint("tune", ZOO, "--data", "hard-vqa", "--method", "vtw")


def test_unknown_geometry():
    line = complaint("flops", "llava-9", "--method", "fastv", "--keep", "0.3")
    assert "llava-9" in line
    assert "llava-1.5-7b" in line


def test_places_that_cannot_be_written(tmp_path, picture):
    (tmp_path / "file").write_text("")
    line = complaint("flops", "llava-1.5-7b", "-m", "vtw", "--json", tmp_path / "file" / "x.json")
    assert "x.json" in line
    assert "folder" in complaint("methods", "--json", tmp_path)
    rest = ["--image", picture, "--method", "vtw", "--overlay", tmp_path / "kept.bmp"]
    assert "kept.bmp" in complaint(*RUN, *rest)
    assert "file" in complaint("demo", "--out", tmp_path / "file")


def test_tune_refuses_what_it_cannot_do():
    assert "fastv" in complaint("tune", ZOO, "--data", "scenes", "--method", "fastv")
    assert "-1" in complaint("tune", ZOO, "--data", "scenes", "--max-divergence", "-1")
    assert "samples=0" in complaint("tune", ZOO, "--data", "scenes", "--samples", "0")
    assert "first_layer=9" in complaint("tune", ZOO, "--data", "scenes", "--samples", "2", "--first-layer", "9")


@pytest.mark.slow
def test_the_installed_script_is_as_quiet():
    command = [sys.executable, "-m", "foveate.cli", *RUN, "--image", "none.png", "--method", "fastv", "--keep", "0.3"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["foveate: image none.png: no such file"]
    assert done.stdout == ""


# ------------------------------------------------------------------------------------------------------- the commands
def test_help_has_examples():
    assert invoke().exit_code == 0
    for command in ("demo", "methods", "run", "flops", "tune"):
        result = invoke(command, "--help")
        assert result.exit_code == 0
        assert f"foveate {command}" in result.stdout
        assert "Example" in result.stdout
        assert "--json" in result.stdout
    assert foveate.__version__ in invoke("--version").stdout


def test_methods_lists_all(tmp_path):
    result = invoke("methods", "--json", tmp_path / "methods.json")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == list(foveate.names())
    listed = json.loads((tmp_path / "methods.json").read_text())
    assert [row["name"] for row in listed] == list(foveate.names())
    assert all(row["paper"] and row["acts"] and row["needs"] for row in listed)
    assert next(row for row in listed if row["name"] == "fastv")["required"] == ["keep"]


def test_an_option_that_is_an_object_is_written_as_a_mapping():
    told = ("flops", "llava-1.5-7b", "-m", "sparsevlm", "-k", "192", "-o")
    assert invoke(*told, "details={theta: 0.5, merge: sum}").stdout != invoke(*told, "details={}").stdout
    assert "details has no 'taw'" in complaint(*told, "details={taw: 0.5}")
    assert "option value '{tau: 0.5'" in complaint(*told, "details={tau: 0.5")
    assert "it belongs to details: details={tau: ...}" in complaint(*told, "tau=0.5")


def test_flops(tmp_path):
    result = invoke("flops", "llava-1.5-7b", "-m", "fastv", "-k", "192", "-o", "layer=2", "--json", tmp_path / "f.json")
    assert result.exit_code == 0, result.output
    wrote = json.loads((tmp_path / "f.json").read_text())
    assert wrote["tmacs_full"] == pytest.approx(4.62, abs=0.005)  # SparseVLM, Table 1, as "TFLOPs"
    assert wrote["tflops_full"] == 2 * wrote["tmacs_full"]
    assert "TMACs" in result.output
    assert "TFLOPs" in result.output
    assert wrote["visual_tokens_entering"] == 216
    assert wrote["visual_tokens_after"] == 204
    assert wrote["reduction"] == pytest.approx(1 - wrote["tflops"] / wrote["tflops_full"])
    assert wrote["kv_mb"] < wrote["kv_mb_full"]
    assert (wrote["geometry"], wrote["method"], wrote["keep"]) == ("llava-1.5-7b", "fastv", 192)
    assert "4.621" in result.stdout


def test_flops_of_a_local_config_and_another_prompt(tmp_path):
    for name, text_tokens in (("short", 20), ("long", 200)):
        result = invoke(
            "flops", zoo.path("tiny-llava") / "config.json", "-m", "vtw", "--text-tokens", text_tokens,
            "--json", tmp_path / name,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
    short, long = (json.loads((tmp_path / name).read_text()) for name in ("short", "long"))
    assert short["tflops_full"] < long["tflops_full"]
    assert short["reduction"] > long["reduction"]
    assert "text-tokens=0" in complaint("flops", "llava-1.5-7b", "-m", "vtw", "--text-tokens", "0")
    assert "visual-tokens=0" in complaint("flops", "llava-1.5-7b", "-m", "vtw", "--visual-tokens", "0")


def test_flops_of_a_config_that_does_not_say_how_many_visual_tokens(tmp_path):
    families.build("qwen2_5_vl").config.save_pretrained(tmp_path)
    asked = ["flops", tmp_path, "-m", "visionzip", "-k", "0.5"]
    assert "--visual-tokens" in complaint(*asked)
    result = invoke(*asked, "--visual-tokens", "30", "--json", tmp_path / "f.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "f.json").read_text())["visual_tokens_entering"] == 15


def test_run_side_by_side_with_a_picture(tmp_path, picture):
    overlay, wrote = tmp_path / "new" / "kept.png", tmp_path / "run.json"
    result = invoke(
        *RUN, "--image", picture, "-m", "fastv", "-k", "0.25", "-o", "layer=2", "--repeats", 1,
        "--overlay", overlay, "--json", wrote,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "full model" in result.stdout
    assert not result.stderr
    with Image.open(overlay) as drawn:
        assert drawn.width > 400
    assert [path.name for path in overlay.parent.iterdir()] == ["kept.png"]  # no partial file left
    found = json.loads(wrote.read_text())
    assert found["visual_tokens_by_layer"] == [196, 196, 49, 49, 49, 49]
    assert found["visual_tokens_entering"] == pytest.approx(98)
    assert found["visual_tokens_after"] == pytest.approx(73.5)
    assert 0.4 < found["flops_ratio"] < 0.65
    assert found["kv_mb"] < found["kv_mb_full"]
    assert found["answer"] and found["answer_full"]  # noqa: PT018
    assert found["prefill_ms"] > 0
    assert found["options"] == {"layer": 2}


def test_run_that_removes_nothing_answers_the_same(picture, tmp_path):
    result = invoke(*RUN, "--image", picture, "-m", "fastv", "-k", "1.0", "--repeats", 1, "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["answer"] == found["answer_full"]
    assert found["flops_ratio"] == 1


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "clip.gif"
    first, *others = clips(1, seed=0, frames=6)[0].frames
    first.save(path, save_all=True, append_images=others, duration=250)
    return path


def test_run_on_a_video_with_a_film_strip(clip, tmp_path):
    strip, wrote = tmp_path / "strip.png", tmp_path / "run.json"
    result = invoke(
        *RUN, "--video", clip, "--frames", 3, "-m", "evs", "-k", "0.5", "--repeats", 1, "--overlay", strip,
        "--json", wrote,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "its 3 frames went in as images" in result.stdout
    found = json.loads(wrote.read_text())
    assert (found["image"], found["video"]) == (None, str(clip))
    assert found["frames"] == [0, 2, 5]
    assert found["seconds"] == [0, 0.5, 1.25]
    assert found["visual_tokens"] == 3 * 196
    assert [step["frame"] for step in found["visual_tokens_by_step"]] == [0, 1, 2]
    assert found["visual_tokens_by_step"][0]["kept"] == 196
    assert sum(step["kept"] for step in found["visual_tokens_by_step"]) == 3 * 98 == found["visual_tokens_entering"]
    with Image.open(strip) as drawn:
        assert drawn.width > drawn.height


def test_bad_videos(clip, picture, tmp_path):
    asked = (*RUN, "-m", "evs", "-k", "0.5")
    assert complaint(*asked, "--video", tmp_path / "none.mp4").endswith("none.mp4: no such file or folder")
    assert "give --image or --video" in complaint(*asked)
    assert "give one of them" in complaint(*asked, "--video", clip, "--image", picture)
    assert "one frame is an image" in complaint(*asked, "--video", clip, "--frames", "1")
    assert "takes no videos" in complaint(*asked, "--image", picture)
    assert "--heat" in complaint(*asked, "--video", clip, "--heat")


def test_tune_finds_the_first_layer_within_the_limit(tmp_path):
    arguments = ["tune", ZOO, "--data", "scenes", "--samples", 6, "--json", tmp_path / "t.json"]
    assert invoke(*arguments, "--max-divergence", "1e9").exit_code == 0
    found = json.loads((tmp_path / "t.json").read_text())
    assert found["layer"] == found["first_layer"] == 1
    assert [point["layer"] for point in found["curve"]] == [1, 2, 3, 4, 5]
    assert all(point["kl"] >= 0 for point in found["curve"])
    assert found["samples"] == 6
    assert 0 < found["flops_ratio"] < 1
    result = invoke(*arguments, "--eta", "0")
    assert "No withdrawal" in result.stdout
    assert json.loads((tmp_path / "t.json").read_text())["layer"] is None


@pytest.mark.slow
def test_demo(tmp_path):
    result = invoke("demo", "--samples", 4, "--out", tmp_path / "demo", "--json", tmp_path / "d.json")
    assert result.exit_code == 0, (result.output, result.exception)
    assert re.search(r"about (a minute|\d+ minutes) on this machine", result.stderr.splitlines()[0])
    lines = result.stdout.splitlines()
    assert "accuracy easy-VQA" in lines[0]
    assert lines[1].split()[0] == "full"
    table = lines[1 : lines.index("")]
    assert {line.split()[0] for line in table} == {"full", "random", "fastv", "sparsevlm", "vtw"}
    wrote = json.loads((tmp_path / "d.json").read_text())
    assert len(wrote["rows"]) == len(table)
    assert wrote["rows"][0]["flops_ratio"] == 1
    assert wrote["rows"][0]["agreement"] == 1
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"kept.png", "stages.png", "results.json"}


def test_away_from_a_terminal_progress_is_lines(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(shell.time, "monotonic", lambda: now)
    with shell.progress("answers") as advance:
        for done in range(1, 101):
            now += 2
            advance(done, 100)
        for done in range(1, 41):
            now += 1
            advance(done, 40)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "answers: 10 % (10 of 100), 20 s"
    assert len([line for line in said if "of 100" in line]) == 10
    assert said[9].startswith("answers: 100 %")
    assert 6 <= len([line for line in said if "of 40" in line]) <= 10


def test_work_that_says_nothing_is_not_mute(monkeypatch, capsys):
    monkeypatch.setattr(shell, "_PATIENCE", 0.05)
    with shell.progress("loading"):
        time.sleep(0.5)
    assert len(capsys.readouterr().err.splitlines()) >= 2
    time.sleep(0.2)
    assert not capsys.readouterr().err  # nothing goes on behind the end


def test_what_takes_a_moment_says_nothing(capsys):
    with shell.progress("answers") as advance:
        advance(1, 2)
        advance(2, 2)
    assert not capsys.readouterr().err
