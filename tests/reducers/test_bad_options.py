"""Every method's wrong options: one clear line that names the culprit."""

from __future__ import annotations

from typing import Any

import pytest

import foveate
from foveate.reducers._layers import resolve_layer

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("averagepool", {"keep": 0}, "keep=0"),
    ("cdpruner", {"keep": 9, "similarity": "clip"}, "needs a companion"),
    ("cdpruner", {"keep": 9, "negate": "yes"}, "negate='yes'"),
    ("dart", {"keep": 9, "layer": 0}, "layer=0"),
    ("dart", {"keep": 9, "pivot_text": -1}, "pivot_text=-1"),
    ("divprune", {"keep": 2.0}, "keep=2.0"),
    ("downsample", {"keep": -4}, "keep=-4"),
    ("fastv", {"keep": 9, "layer": "two"}, "layer='two'"),
    ("fopru", {"keep": 9, "strategy": "column"}, "strategy='column'"),
    ("pitome", {}, "exactly one"),
    ("pitome", {"keep": 9, "alpha": "much"}, "alpha='much'"),
    ("pitome", {"keep": 9, "preset": "vit"}, "preset='vit'"),
    ("pitome", {"keep": 9, "proportional": "no"}, "proportional='no'"),
    ("pitome", {"keep": 9, "where": "llm"}, "where='llm'"),
    ("pitome", {"ratio": 1}, "ratio=1"),
    ("prumerge", {"keep": 9, "extra": "no"}, "extra='no'"),
    ("prumerge", {"keep": 9, "merge": "max"}, "merge='max'"),
    ("prumerge+", {"keep": 9, "neighbours": 1.5}, "neighbours=1.5"),
    ("pyramiddrop", {"keep": 9, "layers": 8}, "layers=8"),
    ("pyramiddrop", {"keep": 9, "layers": "8,16"}, "layers='8,16'"),
    ("pyramiddrop", {"keep": 9, "layers": []}, r"layers=\[\]"),
    ("pyramiddrop", {"keep": 9, "layers": [0]}, "layers=0"),
    ("pyramiddrop", {"keep": 9, "ratios": [0.5]}, "give one of them"),
    ("pyramiddrop", {"ratios": ["a", "b", "c"]}, "ratios="),
    ("pyramiddrop", {"ratios": 0.5}, "ratios=0.5"),
    ("pyramiddrop", {"renumber": "no"}, "renumber='no'"),
    ("random", {"keep": 9, "seed": "x"}, "seed='x'"),
    ("recoverable", {"keep": 9, "neighbours": 0}, "neighbours=0"),
    ("recoverable", {"keep": 9, "clip": "a", "siglip": "b"}, "give one companion"),
    ("tome", {"keep": 9, "r": 3}, "exactly one"),
    ("tome", {"r": True}, "r=True"),
    ("tome", {"r": 3, "where": "output"}, "give keep="),
    ("tome", {"keep": 9, "inflect": "up"}, "inflect='up'"),
    ("tome", {"keep": 9, "inflect": 2}, "inflect=2"),
    ("tome", {"keep": 9, "proportional": 3}, "proportional=3"),
    ("visionzip", {"keep": 9, "contextual": 1.0}, "contextual=1.0"),
    ("vispruner", {"keep": 9, "important_ratio": "half"}, "important_ratio='half'"),
]
WITH_KEEP = [
    "averagepool", "cdpruner", "dart", "divprune", "downsample", "fastv", "fopru", "pitome", "prumerge", "prumerge+",
    "pyramiddrop", "random", "recoverable", "tome", "visionzip", "vispruner",
]  # fmt: skip


@pytest.mark.parametrize(("method", "options", "culprit"), BAD)
def test_one_line_names_the_culprit(method: str, options: dict[str, Any], culprit: str):
    with pytest.raises((foveate.OptionError, foveate.BudgetError), match=culprit) as error:
        foveate.build(method, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, -1, 1.5, float("nan"), "abc", True, [3]])
@pytest.mark.parametrize("method", WITH_KEEP)
def test_bad_budgets(method: str, keep: Any):
    with pytest.raises(foveate.BudgetError, match="keep=") as error:
        foveate.build(method, keep=keep)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", WITH_KEEP)
def test_an_unknown_option_is_named_with_the_known_ones(method: str):
    with pytest.raises(foveate.OptionError, match="colour") as error:
        foveate.build(method, keep=9, colour="red")
    assert "keep" in str(error.value)


def test_a_layer_is_a_number_or_a_fraction_of_the_depth():
    assert [resolve_layer(layer, 6, 1) for layer in (1, 5, 0.01, 0.5, 0.6, 0.99)] == [1, 5, 1, 3, 4, 5]
    for layer in (0, 6):
        with pytest.raises(foveate.OptionError, match="choose 1 to 5"):
            resolve_layer(layer, 6, 1)
