"""One pass of the vision tower for many methods: what it says about a batch is kept while the methods take turns.

Legal only where a method neither listens to the tower nor changes it (`shareable`); the others run the tower anew.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...reduction import Reducer
from ..families.parts import resolve

__all__ = ["SharedVision", "shareable"]


def shareable(reducer: Reducer | None) -> bool:
    """Whether the tower does for a method what it does for the full model, unseen.

    Args:
        reducer: as bound by `apply` (`Session.reducer`); None is the full model.
    """
    return reducer is None or not (reducer.vision_taps or getattr(reducer, "tower", None) is not None)


class SharedVision:
    """Remembers what the vision tower of a model made of a batch.

    While `serving`, it stands in front of the tower's own `forward`, below everything a session does, so features are
    still projected, laid out and recorded as always. Make a new one for each batch.

    Attributes:
        served: how often it answered for the tower.
    """

    def __init__(self, model: nn.Module):
        self.tower = resolve(model).vision
        self.seen: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
        self.served = 0

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Answer for the tower where it was given the same before."""
        if self.tower is None or "forward" in self.tower.__dict__:
            yield
            return
        inner = self.tower.forward

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            for seen_args, seen_kwargs, output in self.seen:
                if _same(seen_args, args) and _same(seen_kwargs, kwargs):
                    self.served += 1
                    return copy.copy(output)  # models write their features into what the tower returned
            output = inner(*args, **kwargs)
            self.seen.append((args, kwargs, copy.copy(output)))
            return output

        self.tower.__dict__["forward"] = forward
        try:
            yield
        finally:
            self.tower.__dict__.pop("forward", None)


def _same(seen: Any, given: Any) -> bool:
    if seen is given:
        return True
    if type(seen) is not type(given):
        return False
    if isinstance(seen, Tensor):
        return seen.dtype == given.dtype and seen.device == given.device and torch.equal(seen, given)
    if isinstance(seen, dict):
        return seen.keys() == given.keys() and all(_same(value, given[name]) for name, value in seen.items())
    if isinstance(seen, tuple | list):
        return len(seen) == len(given) and all(map(_same, seen, given))
    return isinstance(seen, bool | int | float | str) and seen == given
