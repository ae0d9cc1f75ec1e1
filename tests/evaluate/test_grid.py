"""Budgets, seeds and names of recipes; what a model refuses."""

import pytest

import foveate
from foveate.evaluate.answer import answer, load
from foveate.evaluate.data import load as data
from foveate.evaluate.grid import FULL, build_reducer, expand, recipes_for, refusal
from foveate.recipe import Recipe


@pytest.fixture(scope="module")
def vlm():
    return load("zoo:tiny-llava")


def test_budgets_and_seeds():
    found = expand([Recipe("random"), Recipe("fastv", {"layer": 1}), Recipe("pumer")], [0.5, 8], [0, 3])
    assert [each.id for each in found] == [
        "random@0.5#0", "random@0.5#3", "random@8#0", "random@8#3", "fastv[layer=1]@0.5", "fastv[layer=1]@8", "pumer",
    ]  # fmt: skip
    assert [each.row for each in found[:4]] == ["random@0.5", "random@0.5", "random@8", "random@8"]
    assert [Recipe.from_json(each.to_json()) for each in found] == found
    assert FULL.id == FULL.row == "full"


def test_a_recipe_with_its_own_budget_or_seed():
    found = expand(
        [Recipe("vtw", {"layer": 4, "keep": None}), Recipe("random", {"seed": 9}), Recipe("dart", {}, 3)], [0.2], [0, 1]
    )
    assert [each.id for each in found] == ["vtw[layer=4]", "random[seed=9]@0.2", "dart@3"]
    with pytest.raises(foveate.OptionError, match="dart@3 is listed twice"):
        expand([Recipe("dart", {}, 3), Recipe("dart", {}, 3)], [], [])
    with pytest.raises(foveate.BudgetError, match=r"keep=1\.5"):
        expand([Recipe("dart")], [1.5], [])


def test_companions_have_two_recipes_on_the_model_that_has_one(vlm):
    found = recipes_for("cdpruner", {}, "zoo:tiny-llava")
    assert [dict(entry.options) for entry in found] == [
        {"similarity": "llm"}, {"clip": "zoo:tiny-clip", "negate": False},
    ]  # fmt: skip
    assert len(recipes_for("recoverable", {}, "zoo:tiny-llava")) == 2
    assert len(recipes_for("cdpruner", {"similarity": "llm"}, "zoo:tiny-llava")) == 1
    assert len(recipes_for("cdpruner", {}, "llava-hf/llava-1.5-7b-hf")) == 1
    (sample,) = data("scenes", 1)
    for recipe in expand(found, [0.2], []):
        assert refusal(recipe, vlm, sample) is None
    with pytest.raises(foveate.OptionError, match="zoo:huge-clip"):
        build_reducer(Recipe("cdpruner", {"clip": "zoo:huge-clip"}, 0.2), vlm)


def test_a_chain_gives_its_budget_to_the_first_member(vlm):
    members = [{"method": "visionzip"}, {"method": "vtw", "options": {"layer": 4}}]
    (chain,) = expand(recipes_for("chain", {"members": members}, "zoo:tiny-llava"), [0.25], [0])
    assert chain.id == "chain[visionzip+vtw[layer=4]]@0.25"
    assert Recipe.from_json(chain.to_json()) == chain
    reducer = build_reducer(chain, vlm)
    with foveate.apply(vlm.model, reducer) as session:
        answer(vlm, vlm.inputs(data("scenes", 1)))
    assert session.trace.visual_tokens[0].tolist() == [49, 49, 49, 49, 0, 0]
    for bad in ({}, {"members": []}, {"members": ["vtw"]}, {"members": members, "layer": 3}):
        with pytest.raises(foveate.OptionError, match="chain"):
            recipes_for("chain", bad, "zoo:tiny-llava")
    with pytest.raises(foveate.OptionError, match="depth"):
        recipes_for("chain", {"members": [{"method": "vtw", "options": {"depth": 4}}]}, "zoo:tiny-llava")


def test_what_cannot_take_part_says_why(vlm):
    (sample,) = data("scenes", 1)
    assert "encoder" in str(refusal(Recipe("pumer"), vlm, sample)).lower()
    assert "99" in str(refusal(Recipe("fastv", {"layer": 99}, 0.5), vlm, sample))
    assert refusal(FULL, vlm, sample) is None
    with pytest.raises(foveate.OptionError, match="layers"):
        recipes_for("fastv", {"layers": 3}, "zoo:tiny-llava")
    with pytest.raises(foveate.OptionError, match=r"fastr.*fastv"):
        recipes_for("fastr", {}, "zoo:tiny-llava")
