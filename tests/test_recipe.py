"""Recipes: what is written comes back, what is wrong is named."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import yaml

import foveate
from foveate import recipe
from foveate.recipe import Recipe
from foveate.reduction import options

EXCLUSIVE = {"pitome": {"keep": 0.3}, "tome": {"keep": 0.3}}
"""Methods that need one of several options."""


def some(name: str) -> foveate.Reducer:
    needed = {"keep": 0.3} if options(name).get("keep", 0) is dataclasses.MISSING else EXCLUSIVE.get(name, {})
    return foveate.build(name, **needed)


@pytest.mark.parametrize("name", foveate.names())
def test_every_method_comes_back(name, tmp_path):
    path = tmp_path / "new" / "recipe.yaml"
    recipe.save(path, some(name), model="zoo:tiny-llava")
    assert foveate.load(path) == some(name)
    assert [file.name for file in path.parent.iterdir()] == ["recipe.yaml"]


def test_a_recipe_is_small_and_says_where_it_came_from(tmp_path):
    path = tmp_path / "recipe.yaml"
    recipe.save(path, foveate.FastV(keep=0.35, layer=3), model="zoo:tiny-llava", measured={"changed": 0.004})
    wrote = yaml.safe_load(path.read_text())
    assert list(wrote) == ["version", "method", "options", "provenance"]
    assert wrote["options"] == {"keep": 0.35, "layer": 3}  # the defaults are left out
    assert wrote["provenance"]["model"] == "zoo:tiny-llava"
    assert wrote["provenance"]["foveate"] == foveate.__version__
    assert recipe.provenance(path)["measured"] == {"changed": 0.004}


def test_a_chain_is_a_list(tmp_path):
    path = tmp_path / "chain.yaml"
    chain = foveate.Chain(foveate.VisionZip(keep=192), foveate.PyramidDrop(layers=(2, 4), ratios=(0.5, 0.2)))
    recipe.save(path, chain)
    back = foveate.load(str(path))
    assert isinstance(back, foveate.Chain)
    assert recipe.describe(back) == recipe.describe(chain)
    assert [member["method"] for member in yaml.safe_load(path.read_text())["chain"]] == ["visionzip", "pyramiddrop"]


def test_the_full_model_is_a_recipe_too(tmp_path):
    path = tmp_path / "full.yaml"
    recipe.save(path, recipe.FullModel())
    back = foveate.load(path)
    assert list(back.stages) == []
    assert recipe.describe(back) == {"method": "full"}


def test_options_in_an_object_are_a_mapping(tmp_path):
    path = tmp_path / "recipe.yaml"
    asked = foveate.SparseVLM(keep=9, details=foveate.SparseVLMDetails(tau=0.5, merge="sum"))
    recipe.save(path, asked)
    assert yaml.safe_load(path.read_text())["options"]["details"] == {"tau": 0.5, "merge": "sum"}
    assert foveate.load(path) == asked == Recipe.from_json(json.loads(json.dumps(Recipe.of(asked).to_json()))).build()


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("version: 1\nmethod: fastv\noptions: {keep: 0.3}\nbudget: 3\n", "budget"),
        ("version: 2\nmethod: vtw\n", "version is 2"),
        ("version: true\nmethod: vtw\n", "version is True"),
        ("method: vtw\n", "version is None"),
        ("version: 1\n", "method is missing"),
        ("version: 1\nmethod: fastw\n", "fastw"),
        ("version: 1\nmethod: fastv\n", "keep"),
        ("version: 1\nmethod: fastv\noptions: {keep: 3.5}\n", "3.5"),
        ("version: 1\nmethod: fastv\noptions: {keep: [1]}\n", "keep=[1]"),
        ("version: 1\nmethod: fastv\noptions: {keep: {a: 1}}\n", "keep={'a': 1}"),
        ("version: 1\nmethod: fastv\noptions: {keep: 0.3, colour: red}\n", "colour"),
        ("version: 1\nmethod: fastv\noptions: [keep]\n", "options must be a mapping"),
        ("version: 1\nmethod: full\noptions: {keep: 0.3}\n", "the full model has none"),
        ("version: 1\nmethod: chain\n", "a list under chain:"),
        ("version: 1\nmethod: vtw\nprovenance: yesterday\n", "provenance"),
        ("version: 1\nchain: []\n", "chain must be a list"),
        ("version: 1\nchain: [vtw]\n", "chain[0]"),
        ("version: 1\nmethod: vtw\nchain:\n- method: vtw\n", "not both"),
        ("version: 1\nchain:\n- method: vtw\n- method: fastv\n  options: {keep: 0}\n", "chain[1].fastv: keep=0"),
        ("version: 1\nchain:\n- method: vtw\n  layer: 3\n", "chain[0].layer"),
        ("version: 1\nmethod: 'vtw\n", "line"),
        ("version: 1\nmethod: !!python/object/apply:os.getcwd []\n", "not YAML"),
        ("- vtw\n", "expected the keys"),
        ("", "expected the keys"),
    ],
)
def test_what_is_wrong_is_named(text, culprit, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(foveate.OptionError) as caught:
        foveate.load(path)
    assert str(caught.value).startswith(f"recipe {path}: ")
    assert culprit in str(caught.value)


def test_files_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(recipe.RecipeError, match=r"gone\.yaml: cannot be read"):
        foveate.load(tmp_path / "gone.yaml")
    with pytest.raises(recipe.RecipeError, match="cannot be read"):
        foveate.load(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(recipe.RecipeError, match="not UTF-8"):
        foveate.load(tmp_path / "bytes.yaml")
    with pytest.raises(recipe.RecipeError, match="cannot be written"):
        recipe.save(tmp_path / "bytes.yaml" / "new.yaml", foveate.VTW(layer=3))


def test_what_is_no_plain_value_is_not_written(tmp_path):
    path = tmp_path / "recipe.yaml"
    companion = torch.nn.Linear(1, 1)
    with pytest.raises(recipe.RecipeError, match="option similarity is a Linear"):
        recipe.save(path, foveate.CDPruner(keep=0.3, similarity=companion))
    with pytest.raises(recipe.RecipeError, match="provenance"):
        recipe.save(path, foveate.VTW(layer=3), model=companion)

    class Mine(foveate.Reducer):
        pass

    with pytest.raises(recipe.RecipeError, match="Mine is not known by name"):
        recipe.save(path, Mine())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("reducer", "told"),
    [
        (foveate.FastV(keep=0.35, layer=3), "fastv[layer=3]@0.35"),
        (foveate.VTW(layer=3), "vtw[layer=3]"),
        (foveate.Random(keep=12, seed=7), "random[seed=7]@12"),
        (foveate.Chain(foveate.VisionZip(keep=0.5), foveate.VTW(layer=3)), "chain[visionzip+vtw[layer=3]]@0.5"),
        (recipe.FullModel(), "full"),
        (
            foveate.SparseVLM(keep=9, details=foveate.SparseVLMDetails(tau=0.5, merge="sum")),
            "sparsevlm[details={merge: sum, tau: 0.5};positions=keep]@9",
        ),
    ],
)
def test_one_form_for_files_sweeps_and_searches(reducer, told):
    found = Recipe.of(reducer)
    assert found.id == told
    assert Recipe.from_json(found.to_json()) == found
    assert recipe.describe(found.build()) == recipe.describe(reducer)
    hash(found)


def test_a_budget_among_the_options_is_the_budget():
    found = Recipe("fastv", {"layer": 1, "keep": 0.3})
    assert found == Recipe("fastv", {"layer": 1}, 0.3)
    assert found.arguments == {"keep": 0.3, "layer": 1}
    assert Recipe("vtw", {"layer": 1, "keep": None}).keep is None
    members = [{"method": "visionzip"}, {"method": "vtw", "options": {"layer": 4}}]
    first, second = Recipe("chain", {"members": members}, 0.25).members
    assert (first.id, second.id) == ("visionzip@0.25", "vtw[layer=4]")
