"""Where in the depth of a decoder a method acts, given as a layer number or as a fraction of the depth."""

from __future__ import annotations

from typing import Any

from ..reduction import OptionError

__all__ = ["check_layer", "resolve_layer"]


def check_layer(layer: Any, first: int, option: str = "layer") -> None:
    """Refuse what cannot be a layer of any model. Raises `OptionError`.

    Args:
        layer: an int from `first` on, or a float in (0, 1).
        first: lowest layer number that makes sense.
        option: name for the message.
    """
    if isinstance(layer, int) and not isinstance(layer, bool) and layer >= first:
        return
    if isinstance(layer, float) and 0.0 < layer < 1.0:
        return
    raise OptionError(f"{option}={layer!r}: give a layer number from {first} on, or a fraction of the depth in (0, 1)")


def resolve_layer(layer: int | float, depth: int, first: int, option: str = "layer") -> int:
    """Layer number in a decoder of `depth` layers; fractions are rounded. Raises `OptionError` beyond the last one."""
    number = min(max(round(layer * depth), first), depth - 1) if isinstance(layer, float) else layer
    if not first <= number < depth:
        raise OptionError(f"{option}={layer}: this model has {depth} decoder layers; choose {first} to {depth - 1}")
    return number
