"""The grid of a sweep: methods with their options x budgets x seeds; how each is built for a model, or refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import zoo
from ..recipe import CHAIN, Recipe
from ..reducers.chain import Chain
from ..reduction import Budget, BudgetError, OptionError, Reducer, UnsupportedError, check_names, options
from .answer import VLM, ZOO, prefill_seconds
from .data import Sample

__all__ = ["FULL", "build_reducer", "expand", "recipes_for", "refusal"]

COMPANIONS = ("clip", "siglip")
_TINY = ("zoo:tiny-llava", "zoo:tiny-clip")

FULL = Recipe("full", keep=1.0)


def recipes_for(method: str, chosen: Mapping[str, Any], model: str) -> list[Recipe]:
    """The recipes that a method's name stands for in a sweep, before budgets and seeds.

    One as a rule. Methods that compare patches with the question through a companion have two on the model that ships
    with one: without it, and with it.

    Raises:
        OptionError: unknown method or option.
    """
    if method == CHAIN:
        return [Recipe(CHAIN, {"members": _members(chosen)})]
    check_names(method, chosen)
    known = options(method)
    if "clip" in known and model == _TINY[0] and not {"similarity", "clip", "siglip"} & chosen.keys():
        # High cosines mark the relevant patches in tiny-clip, see its card.
        sign = {"negate": False} if "negate" in known and "negate" not in chosen else {}
        return [
            Recipe(method, {**chosen, "similarity": "llm"}),
            Recipe(method, {**chosen, "clip": _TINY[1], **sign}),
        ]
    return [Recipe(method, dict(chosen))]


def _members(chosen: Mapping[str, Any]) -> list[dict[str, Any]]:
    members = chosen.get("members")
    if not isinstance(members, list) or not members or len(chosen) > 1:
        raise OptionError("chain needs members, a list of {method, options}, and nothing else")
    found = []
    for member in members:
        if not (
            isinstance(member, dict)
            and isinstance(member.get("method"), str)
            and member.keys() <= {"method", "options"}
        ):
            raise OptionError(f"chain: {member!r} is not {{method, options}}")
        (recipe,) = recipes_for(member["method"], member.get("options") or {}, "")
        found.append({"method": recipe.method, "options": recipe.arguments})
    return found


def expand(recipes: Iterable[Recipe], keeps: Sequence[int | float], seeds: Sequence[int]) -> list[Recipe]:
    """Every recipe at every budget, and with every seed if it has one.

    A recipe with a budget of its own keeps it; `keep: None` among its options is for methods told by another option how
    much stays.

    Raises:
        OptionError: unknown method or option, or the same recipe twice.
        BudgetError: bad budget.
    """
    found: dict[str, Recipe] = {}
    for recipe in recipes:
        known = {"keep": None} if recipe.method == CHAIN else options(recipe.method)
        chosen = dict(recipe.options)
        common = "keep" in known and "keep" not in chosen
        budgets = [recipe.keep] if recipe.keep is not None else keeps if common else [None]
        chosen.pop("keep", None)
        drawn: Sequence[int | None] = seeds if "seed" in known and "seed" not in chosen else [None]
        for keep in budgets:
            keep = None if keep is None else Budget(keep).keep
            for seed in drawn:
                full = Recipe(recipe.method, chosen, keep, seed)
                if full.id in found:
                    raise OptionError(f"{full.id} is listed twice")
                found[full.id] = full
    return list(found.values())


def build_reducer(recipe: Recipe, vlm: VLM) -> Reducer | None:
    """The method itself, None for the full model. A companion `zoo:NAME` is found, and told the model's tokenizer.

    Raises:
        OptionError, BudgetError: whatever is wrong with the options.
    """
    if recipe.is_full:
        return None
    if recipe.method == CHAIN:
        return Chain(*(_build(member, vlm) for member in recipe.members))
    return _build(recipe, vlm)


def _build(recipe: Recipe, vlm: VLM) -> Reducer:
    chosen, more = dict(recipe.options), {}
    for name in COMPANIONS:
        if isinstance(chosen.get(name), str):
            if chosen[name].startswith(ZOO):
                try:
                    chosen[name] = str(zoo.path(chosen[name].removeprefix(ZOO)))
                except ValueError as error:
                    raise OptionError(f"{recipe.method}: {name}={recipe.options[name]}: {error}") from error
            if not {"question", "tokenizer"} & chosen.keys():
                more["tokenizer"] = vlm.tokenizer
    return replace(recipe, options=chosen).build(**more)


def refusal(recipe: Recipe, vlm: VLM, sample: Sample) -> Exception | None:
    """Why a recipe cannot take part in this model, None if it can: it is tried on one sample."""
    try:
        reducer = build_reducer(recipe, vlm)
        if reducer is not None:
            inputs = vlm.inputs([sample])
            with torch.inference_mode(), vlm.apply(reducer, [sample], inputs):
                prefill_seconds(vlm, inputs)
    except (OptionError, BudgetError, UnsupportedError) as error:
        return error
    return None
