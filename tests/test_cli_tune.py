"""`foveate tune` as a search: recipe, table, JSON, check on other questions; and recipes on the command line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import foveate
from foveate.cli import app

ZOO = "zoo:tiny-llava"


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def complaint(*arguments) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    result = invoke(
        "tune", ZOO, "--data", "easy-vqa", "--samples", 8, "--methods", "vtw", "--max-changed", "0.4",
        "--out", folder / "recipe.yaml", "--json", folder / "t.json", "--check-data", "easy-vqa",
        "--check-samples", 8, "--max-new-tokens", 4,
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    return folder, result.stdout


def test_a_recipe_is_written_and_can_be_loaded(tuned):
    folder, said = tuned
    found = json.loads((folder / "t.json").read_text())
    assert found["chosen"]["method"] == "vtw"
    assert foveate.load(folder / "recipe.yaml") == foveate.VTW(**found["chosen"]["options"])
    origin = foveate.recipe.provenance(folder / "recipe.yaml")
    assert (origin["model"], origin["data"], origin["bound"]["max_changed"]) == (ZOO, ["easy-vqa"], 0.4)
    assert origin["measured"]["check"]["questions"] == 8
    assert "Chosen: vtw[layer=" in said
    assert sorted(path.name for path in folder.iterdir()) == ["recipe.yaml", "t.json"]  # the journal is gone


def test_what_was_tried_is_told(tuned):
    folder, said = tuned
    found = json.loads((folder / "t.json").read_text())
    assert [row["options"]["layer"] for row in found["candidates"]] == [1, 2, 3, 4, 5]
    assert 0 < found["chosen"]["flops_ratio"] < 1
    assert found["chosen"]["changed_upper"] <= 0.4
    assert 0 < found["search_prefills"] < found["search_prefills_exhaustive"]
    assert found["evaluations_exhaustive"] == 40
    assert found["check"]["samples"] == 8
    assert "full prefills" in said
    assert "other questions" in said


def test_run_takes_a_recipe(tuned, tmp_path):
    folder, _ = tuned
    picture = tmp_path / "picture.png"
    foveate.evaluate.data.load("scenes", 1, 0)[0].image.save(picture)
    rest = ["run", ZOO, "--image", picture, "--prompt", "what shape is red?", "--repeats", 1]
    result = invoke(*rest, "--recipe", folder / "recipe.yaml", "--json", tmp_path / "run.json")
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["method"] == "vtw"
    assert found["flops_ratio"] < 1
    assert "gone.yaml" in complaint(*rest, "--recipe", tmp_path / "gone.yaml")
    assert "recipe.yaml" in complaint(*rest, "--recipe", folder / "recipe.yaml", "--keep", "0.5")


def test_nothing_good_enough_is_no_error(tmp_path):
    result = invoke(
        "tune", ZOO, "--data", "scenes", "--samples", 2, "--methods", "vtw", "--max-changed", "0",
        "--out", tmp_path / "full.yaml", "--max-new-tokens", 2,
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    assert "Nothing; full model" in result.stdout
    assert foveate.recipe.describe(foveate.load(tmp_path / "full.yaml")) == {"method": "full"}


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--methods", "vtw,fastw"], "fastw"),
        (["--methods", "pumer"], "pumer"),
        (["--methods", "vtw", "--method", "vtw"], "not both"),
        (["--max-changed", "1.5"], "1.5"),
        (["--max-changed", "0.1", "--max-divergence", "-1"], "-1"),
        (["--max-changed", "0.1", "--confidence", "2"], "confidence"),
        (["--max-changed", "0.1", "--first-layer", "2"], "first-layer"),
        (["--methods", "vtw", "--samples", "0"], "samples=0"),
        (["--method", "fastv"], "fastv"),
        (["--methods", "vtw", "--check-data", "hard-vqa"], "hard-vqa"),
    ],
)
def test_bad_input(arguments, culprit):
    assert culprit in complaint("tune", ZOO, "--data", "scenes", *arguments)
