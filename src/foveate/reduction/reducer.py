"""What a method is and what it answers."""

from __future__ import annotations

import copy
import sys
import types
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from torch import Tensor

from .errors import UnsupportedError
from .view import TapSpec, View, VisionSpec

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["BEFORE_LAYERS", "Decision", "Positions", "Reducer", "bind", "known_positions"]

BEFORE_LAYERS = -1
"""The stage before decoder layer 0. Stage `i >= 0` is "after decoder layer `i`"."""

Positions = Literal["keep", "renumber"]
"""How what is left is numbered: as it was, or anew, without gaps, in each layer and while decoding."""


def known_positions(positions: Any) -> Any:
    """`positions` by its present name: "compact" is an old one of "renumber", and a DeprecationWarning says so."""
    if not (isinstance(positions, str) and positions == "compact"):
        return positions
    frame, level, package = sys._getframe(1), 2, __name__.partition(".")[0]
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    message = "positions='compact' is an old name of 'renumber'"
    warnings.warn(message, DeprecationWarning, stacklevel=level)
    return "renumber"


@dataclass
class Decision:
    """A method's answer.

    Attributes:
        keep: (B, S) bool, slots that stay; ANDed with what is still active. None: nothing is removed.
        slots: (B, m) long, slots whose state is overwritten (merged tokens). -1 marks padding of a shorter row.
        values: (B, m, D), the new states.
        origin: (B, S) long, for every slot the slot that carries its content from now on, -1 if it is dropped. Only for
            the record (pictures); without it every kept slot carries itself.
        scores: (B, S) float, for the record.
        positions: how this removal numbers what is left; None: as the reducer's `positions` says.
    """

    keep: Tensor | None = None
    slots: Tensor | None = None
    values: Tensor | None = None
    origin: Tensor | None = None
    scores: Tensor | None = None
    positions: Positions | None = None

    def __post_init__(self) -> None:
        self.positions = known_positions(self.positions)


class Reducer:
    """A method: it says where it acts and what it reads, and decides what stays.

    Subclass it with the attributes below and `decide`; no `super().__init__()` is needed. `foveate.apply` works with a
    copy (`bind`), so one instance may be applied to any number of models at once, and is never changed by it.
    """

    stages: Sequence[int] = ()
    taps: Mapping[int, TapSpec] = {}
    vision_taps: Mapping[int, VisionSpec] = {}
    """What to read in the vision tower, by attention layer; negative layers count from the end."""
    tower: Any = None
    """How the tower works on fewer tokens (`MergeSpec` or `ShrinkSpec` of `engine.vision`), None: it does not."""
    positions: Positions = "keep"

    name: ClassVar[str] = ""

    def prepare(self, anatomy: Anatomy) -> None:
        """Turn fractions into layer numbers, refuse what cannot work. Called once, on the copy made for a model.

        Assign new values to attributes; a list or dict that the method was made with is shared by all copies.
        """

    def decide(self, view: View) -> Decision | None:
        """Answer for one stage; None leaves everything as it is."""
        raise NotImplementedError(f"{type(self).__name__} must define decide(view)")


_B = TypeVar("_B")


def bind(method: _B, anatomy: Anatomy) -> _B:
    """A method at work in one model: a shallow copy, prepared for it. The method itself stays as it is.

    Args:
        method: a `Reducer`, or anything that works like one; a part of a method that has its own `prepare`.
        anatomy: the parts of the model.

    Raises:
        UnsupportedError, OptionError: whatever the method's `prepare` refuses.
    """
    bound = copy.copy(method)
    for name, value in tuple(getattr(bound, "__dict__", {}).items()):
        if isinstance(value, types.MethodType) and value.__self__ is method:  # `self.decide = self._one_of_two`
            setattr(bound, name, types.MethodType(value.__func__, bound))
    prepare = getattr(bound, "prepare", None)
    if prepare is not None:
        prepare(anatomy)
    if getattr(bound, "positions", None) == "compact":
        if any(stage != BEFORE_LAYERS for stage in getattr(bound, "stages", ())):
            raise UnsupportedError("positions='compact' is for removal before layer 0 only; use positions='renumber'")
        bound.positions = known_positions(bound.positions)  # type: ignore[attr-defined]
    return bound
