"""`foveate bench` as a shell sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import foveate
from tests.test_cli import ZOO, complaint, invoke


@pytest.mark.slow
def test_bench_of_the_shipped_model(tmp_path: Path):
    file = tmp_path / "bench.json"
    result = invoke(
        "bench", ZOO, "--method", "fastv,random", "--keep", "0.33", "--repeats", 2, "--new-tokens", 2, "--batch", 2,
        "--prompt-tokens", 20, "--json", file,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert [row["name"] for row in found["rows"]] == ["full model", "fastv 0.33", "random 0.33", "no visual tokens"]
    assert {"cpu", "threads", "torch", "transformers"} <= found["machine"].keys()
    assert found["prompt_tokens"] == 196 + 20
    assert not found["random_weights"]
    full, fastv, _, limit = found["rows"]
    assert fastv["method"] == "fastv"
    assert fastv["keep"] == 0.33
    assert full["visual_tokens_entering"] == 196
    assert fastv["visual_tokens_after"] < fastv["visual_tokens_entering"]
    assert limit["flops"]["decoder"] < fastv["flops"]["decoder"] < full["flops"]["decoder"]
    assert fastv["kv_bytes"] < full["kv_bytes"]
    assert set(full["ms"]["prefill"]) == {"median", "q1", "q3"}
    for row in found["rows"]:
        assert row["ms"]["prefill"]["median"] > row["ms"]["vision"]["median"] > 0
        assert f"{row['name']}" in result.stdout
    for line in ("visual tokens entering a layer", "visual tokens after a layer", "reduce, ms", "still to gain"):
        assert line in result.stdout
    assert "Without any visual token in the decoder" in result.stdout


@pytest.mark.slow
def test_bench_of_a_recipe(tmp_path: Path):
    recipe, file = tmp_path / "mine.yaml", tmp_path / "bench.json"
    foveate.recipe.save(recipe, foveate.VTW(layer=2))
    arguments = ("bench", ZOO, "--recipe", recipe, "--repeats", 1, "--new-tokens", 1, "--json", file)
    assert invoke(*arguments).exit_code == 0
    row = json.loads(file.read_text())["rows"][1]
    assert (row["name"], row["method"], row["options"]["layer"]) == ("mine", "vtw", 2)
    assert "mine.yaml: has its own budget" in complaint(*arguments, "--keep", 0.3)


def test_a_geometry_that_does_not_fit_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("foveate.measure.memory.free_bytes", lambda device: 10**9)
    line = complaint("bench", "--geometry", "llava-1.5-13b", "--method", "fastv", "--keep", 144)
    assert "geometry llava-1.5-13b: 40 layers in float32 need about 5" in line
    assert "1.0 GB are free on cpu; use fewer --layers" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either MODEL or --geometry"),
        ((ZOO, "--geometry", "llava-1.5-7b"), "give either MODEL or --geometry"),
        ((ZOO, "--layers", 2), "layers=2"),
        (("--geometry", "llava-9"), "unknown geometry 'llava-9'"),
        (("--geometry", "llava-1.5-7b", "--layers", 99), "layers=99"),
        (("--geometry", "llava-1.5-7b", "--image", "x.png"), "image x.png"),
        ((ZOO, "--keep", "0.3,abc"), "abc"),
        ((ZOO, "--keep", "0.3,0.3"), "sparsevlm 0.3: is given twice"),
        ((ZOO, "--dtype", "int8"), "dtype int8"),
        ((ZOO, "--device", "cuda:99"), "device cuda:99"),
        ((ZOO, "--image", "none.png"), "none.png: no such file"),
        ((ZOO, "--prompt-tokens", 1), "prompt-tokens=1: this prompt has at least"),
        ((ZOO, "--repeats", 0), "'--repeats'"),
        (("nowhere/at/all",), "nowhere/at/all"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple, message: str):
    keep = () if "--keep" in arguments else ("--keep", 0.33)
    assert message in complaint("bench", *arguments, *keep)


def test_the_help_has_an_example():
    assert "foveate bench --geometry llava-1.5-7b --layers 4" in " ".join(invoke("bench", "--help").stdout.split())
