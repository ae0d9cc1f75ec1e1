"""What a search chooses among: methods, their layers, their budgets.

A `Family` is one method at one layer, its budgets from the smallest up: within it more visual tokens are expected to
cost more and to change fewer answers, so that what is too little at one budget is too little below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..recipe import Recipe
from ..reduction import OptionError, names, options

__all__ = ["KEEPS", "Family", "families", "layers_of"]

KEEPS = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8)
"""Budgets tried for every method: fractions of the visual tokens."""
_LAYER_STEPS = 4
"""Layers tried: those that cut the depth into this many parts, and FastV's own 2."""


@dataclass(frozen=True)
class Family:
    """Candidates that differ in their budget only, the smallest budget first."""

    name: str
    candidates: tuple[Recipe, ...]


def families(depth: int, methods: Sequence[str] | None = None, keeps: Sequence[int | float] = KEEPS) -> list[Family]:
    """The grid of a search in a decoder of `depth` layers.

    Args:
        methods: names; None for all that a budget describes, with their default options: without companion models.
        keeps: budgets.

    Raises:
        OptionError: an unknown method, one named twice, or one that no budget describes.
    """
    if methods is not None and len(set(methods)) != len(methods):
        raise OptionError(f"methods {', '.join(methods)}: one is named twice")
    chosen = [name for name in names() if "keep" in options(name)] if methods is None else methods
    return [family for name in chosen for family in _families_of(name, depth, sorted(keeps, key=float))]


def layers_of(depth: int) -> list[int]:
    """Decoder layers worth trying, counted from 0: FastV's 2 and the quarters of the depth."""
    steps = {round(depth * step / _LAYER_STEPS) for step in range(1, _LAYER_STEPS)}
    return sorted(layer for layer in {2, *steps} if 1 <= layer < depth)


def _families_of(name: str, depth: int, keeps: Sequence[int | float]) -> list[Family]:
    known = options(name)
    if "layer" in known and known.get("keep") is None:  # VTW: the layer is the budget
        return [Family(name, tuple(Recipe(name, {"layer": layer}) for layer in range(1, depth)))]
    if "keep" not in known:
        raise OptionError(f"method {name} takes no keep=, so there is no budget to search for")
    if "layer" not in known:
        return [Family(name, tuple(Recipe(name, {"keep": keep}) for keep in keeps))]
    layers = layers_of(depth)
    if isinstance(known["layer"], int) and known["layer"] < 0:  # before the decoder is a place, too
        layers = [known["layer"], *layers]
    return [
        Family(f"{name} layer={layer}", tuple(Recipe(name, {"keep": keep, "layer": layer}) for keep in keeps))
        for layer in layers
    ]
