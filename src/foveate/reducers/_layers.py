"""Options: where in the depth of a decoder a method acts (layer number or fraction of the depth), and plain checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..reduction import OptionError

__all__ = ["check_flag", "check_layer", "check_layers", "check_number", "resolve_layer"]


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


def check_layers(layers: Any, first: int, option: str = "layers") -> None:
    """Refuse what is no list of layers. Raises `OptionError`."""
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
        raise OptionError(f"{option}={layers!r}: give a list of layer numbers or fractions of the depth")
    for layer in layers:
        check_layer(layer, first, option)


def check_number(value: Any, low: float, high: float, option: str) -> None:
    """Refuse what is no number between `low` and `high`, both included. Raises `OptionError`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise OptionError(f"{option}={value!r}: give a number from {low:g} to {high:g}")


def check_flag(value: Any, option: str) -> None:
    """Refuse anything but True and False. Raises `OptionError`."""
    if not isinstance(value, bool):
        raise OptionError(f"{option}={value!r}: use True or False")


def resolve_layer(layer: int | float, depth: int, first: int, option: str = "layer") -> int:
    """Layer number in a decoder of `depth` layers; fractions are rounded. Raises `OptionError` beyond the last one."""
    number = min(max(round(layer * depth), first), depth - 1) if isinstance(layer, float) else layer
    if not first <= number < depth:
        raise OptionError(f"{option}={layer}: this model has {depth} decoder layers; choose {first} to {depth - 1}")
    return number
