"""Uniformly random visual tokens: the baseline that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..ops.select import ranks_within, top_k_mask
from ..reduction import (
    BEFORE_LAYERS,
    Budget,
    Decision,
    MethodInfo,
    OptionError,
    Positions,
    Reducer,
    View,
    known_positions,
    register,
)
from ._images import counts_per_row, image_of_slot
from ._layers import check_layer, resolve_layer

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["Random"]

_BITS = 0xFFFFFFFF
# Odd multipliers below 2^31: a product with 32 bits fits into an int64 without overflow, on every device.
_MULTIPLIERS = (0x7FEB352D, 0x6D2B79F5, 0x45D9F3B3)


def _mix(value: Any) -> Any:
    """Scramble 32-bit numbers held in an int or an int64 tensor: xor-shift and multiply, as integer hashes do."""
    for multiplier in _MULTIPLIERS:
        value = value ^ (value >> 16)
        value = (value * multiplier) & _BITS
    return value ^ (value >> 15)


def _draw(rank: Tensor, seed: int) -> Tensor:
    """Uniform float32 numbers in [0, 1) that depend on the seed and on `rank` (int64) alone."""
    low, high = seed & _BITS, (seed >> 32) & _BITS
    key = _mix(_mix(low ^ 0x2545F491) ^ high)
    # 24 bits are what a float32 holds exactly, so the order is the same on every device.
    return (_mix(_mix(rank & _BITS) ^ key) >> 8).float() / (1 << 24)


@register(
    "random",
    MethodInfo(paper="baseline", acts="before the LLM, or after one of its layers", needs="nothing", text_guided=False),
)
@dataclass
class Random(Reducer):
    """Keep a uniformly random subset of the visual tokens.

    Which tokens stay depends on `seed` and on a token's number among the visual tokens of its sample, on nothing else:
    a sample keeps the same tokens alone, in a batch, with any padding, on any device and at every call, and a smaller
    budget keeps a subset of a larger one. Samples with equally many visual tokens therefore share one pattern; average
    over several seeds when the choice itself is what is measured.

    Args:
        keep: visual tokens of each image that stay (int), or the fraction of all of a sample's (float in (0, 1]).
        layer: the stage: -1 before the language model, i after its decoder layer i; or a fraction of the depth.
        seed: any int of up to 64 bits.
        positions: "keep" leaves positions as they were, "renumber" closes the gaps.
        faithful: accepted like everywhere; there is no official code, so it changes nothing.

    Raises:
        BudgetError: bad `keep`.
        OptionError: bad `layer`, `seed` or `positions`; `layer` beyond the depth of the model when applied.
    """

    keep: int | float
    layer: int | float = BEFORE_LAYERS
    seed: int = 0
    positions: Positions = "keep"
    faithful: bool = False

    def __post_init__(self) -> None:
        self._budget = Budget(self.keep)
        check_layer(self.layer, BEFORE_LAYERS)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise OptionError(f"seed={self.seed!r}: give an int")
        self.positions = known_positions(self.positions)
        if self.positions not in ("keep", "renumber"):
            raise OptionError(f"positions={self.positions!r}: use 'keep' or 'renumber'")

    def prepare(self, anatomy: Anatomy) -> None:
        self.stages = (resolve_layer(self.layer, anatomy.depth, BEFORE_LAYERS),)

    def decide(self, view: View) -> Decision:
        visual = view.visual & view.tokens
        scores = _draw(visual.cumsum(1) - 1, self.seed)
        eligible = view.active_visual
        if isinstance(self._budget.keep, int):
            chosen = ranks_within(image_of_slot(view), eligible, scores) < self._budget.keep
        else:
            chosen = top_k_mask(scores, eligible, counts_per_row(self._budget, view))
        return Decision(keep=view.active & (chosen | ~view.visual))
