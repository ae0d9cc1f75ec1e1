"""Bad input is refused with a line that names the culprit, and the model stays as it was."""

from __future__ import annotations

import math
from dataclasses import MISSING
from typing import Any

import numpy as np
import pytest
import torch

import foveate
from foveate import Budget, BudgetError, OptionError
from foveate.reduction import TapSpec, options
from tests.families import N_LAYERS, inputs
from tests.reference.checks import build_once, footprint
from tests.reference.plans import Fixed, KeepAll

BAD = [
    0,
    -3,
    1.5,
    0.0,
    -0.5,
    "abc",
    "192",
    "",
    b"1",
    None,
    True,
    False,
    math.nan,
    math.inf,
    -math.inf,
    [4],
    {},
    1j,
    object(),
]
BAD += [torch.tensor([3, 4]), torch.tensor(float("nan")), torch.tensor(True), np.float32("nan"), np.int64(0)]
GOOD = [1, 192, 0.25, 1.0, torch.tensor(3), torch.tensor(0.5), np.int64(7), np.float32(0.5)]


def _with_keep() -> list[str]:
    return [name for name in foveate.names() if "keep" in options(name)]


@pytest.mark.parametrize("keep", BAD)
def test_a_bad_budget(keep: Any):
    with pytest.raises(BudgetError, match="keep="):
        Budget(keep)


@pytest.mark.parametrize("keep", [0, -3, 1.5, "abc", None, True, math.nan], ids=repr)
@pytest.mark.parametrize("name", _with_keep())
def test_every_method_refuses_a_bad_budget(name: str, keep: Any):
    if keep is None and options(name)["keep"] is None:
        pytest.skip("keep=None is the default: another option gives the budget")
    with pytest.raises(BudgetError, match="keep="):
        foveate.build(name, keep=keep)
    with pytest.raises(ValueError, match="keep="):
        foveate.reduction.type_of(name)(keep=keep)


@pytest.mark.parametrize("keep", GOOD, ids=repr)
def test_a_good_budget(keep: Any):
    budget = Budget(keep)
    assert budget.of(100) in range(1, 101)
    assert type(budget.keep) in (int, float)


@pytest.mark.parametrize(
    ("text", "keep"),
    [("192", 192), ("1", 1), ("0.22", 0.22), ("1.0", 1.0), ("1e-2", 0.01), (" 8 ", 8), (0.5, 0.5), (7, 7)],
)
def test_a_budget_from_the_command_line(text: str | int | float, keep: int | float):
    assert Budget.parse(text).keep == keep
    assert type(Budget.parse(text).keep) is type(keep)


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "abc", "", "nan", "inf", "-inf", "0.0", "1,5", "0x10", None, True])
def test_a_bad_budget_from_the_command_line(text: Any):
    with pytest.raises(BudgetError, match="keep="):
        Budget.parse(text)


def test_budgets_round_and_stay_within_what_is_there():
    assert Budget(8).of(100) == 8
    assert Budget(8).of(100, images=3) == 24
    assert Budget(8).of(5) == 5
    assert Budget(8).of(0) == 0
    assert Budget(0.001).of(100) == 1
    assert Budget(1.0).of(576) == 576
    tokens, images = torch.tensor([100, 5, 0, 7]), torch.tensor([3, 1, 0, 1])
    for keep in (8, 0.3, 1.0, 1, 0.001):
        rows = Budget(keep).per_row(tokens, images)
        assert rows.tolist() == [Budget(keep).of(int(t), int(i)) for t, i in zip(tokens, images)]


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(OptionError) as raised:
        foveate.build("nonsense", keep=3)
    assert "nonsense" in str(raised.value)
    for name in foveate.names():
        assert name in str(raised.value)


@pytest.mark.parametrize("name", _with_keep())
def test_an_unknown_option_lists_the_known_ones(name: str):
    with pytest.raises(OptionError, match="nonsense") as raised:
        foveate.build(name, keep=3, nonsense=1)
    assert "keep" in str(raised.value)


@pytest.mark.parametrize("name", _with_keep())
def test_every_budget_can_be_asked_for(name: str):
    for keep in (1, 192, 0.5, 1.0):
        assert foveate.build(name, keep=keep) is not None


@pytest.mark.parametrize("stage", [N_LAYERS, 40, -2])
def test_a_layer_beyond_the_depth(stage: int):
    model = build_once("llava")
    before = footprint(model)
    with pytest.raises(OptionError, match=str(stage)):
        foveate.apply(model, Fixed({stage: torch.zeros(1, 1, dtype=torch.bool)}))
    assert footprint(model) == before


@pytest.mark.parametrize("layer", [3, N_LAYERS, -1])
def test_a_tap_without_its_stage(layer: int):
    class Taps(KeepAll):
        stages = (-1, 1)
        taps = {layer: TapSpec()}  # noqa: RUF012

    model = build_once("llava")
    before = footprint(model)
    with pytest.raises(OptionError, match=str(layer)):
        foveate.apply(model, Taps())
    assert footprint(model) == before


@pytest.mark.parametrize("name", [name for name in foveate.names() if "layer" in options(name)])
def test_every_method_refuses_a_layer_beyond_the_depth(name: str):
    model = build_once("llava")
    before = footprint(model)
    needed = {"keep": 4} if options(name).get("keep") is MISSING else {}
    reducer = foveate.build(name, layer=99, **needed)
    with pytest.raises((OptionError, foveate.UnsupportedError), match="99"):
        foveate.apply(model, reducer)
    assert footprint(model) == before


def test_unknown_positions_queries_and_vision_layers():
    model = build_once("llava")
    before = footprint(model)

    class Sideways(KeepAll):
        positions = "sideways"

    class Queries(KeepAll):
        stages, taps = (1,), {1: TapSpec("first")}

    class Tower(KeepAll):
        vision_taps = {99: foveate.reduction.VisionSpec()}  # noqa: RUF012

    with pytest.raises(OptionError, match="sideways"):
        foveate.apply(model, Sideways())
    with pytest.raises((OptionError, foveate.UnsupportedError), match="99"):
        foveate.apply(model, Tower())
    with pytest.raises((OptionError, foveate.UnsupportedError), match="first"), foveate.apply(model, Queries()):
        model(**inputs("llava", model))
    assert footprint(model) == before
