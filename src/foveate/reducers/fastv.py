"""FastV: after an early layer, keep the visual tokens that the last prompt token attends to most.

Paper: "An Image is Worth 1/2 Tokens After Layer 2", arXiv 2403.06764 (ECCV 2024). Official code: pkunlp-icler/FastV @
d1659729, `src/FastV/lmms-eval/fastv_kvcache.py` (no licence; re-implemented from the formulas). This is its KV-cache
version: the ranking is made once, in the prefill. (The older masking version ranks anew at every generated token.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..ops.select import rounded_ratio, top_k_mask
from ..reduction import Budget, Decision, MethodInfo, OptionError, Reducer, TapSpec, View, look_up, register
from ._images import counts_per_row, truncated
from ._layers import check_layer, resolve_layer

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["FastV"]


@register(
    "fastv",
    MethodInfo(
        paper="arXiv 2403.06764",
        acts="after an early decoder layer",
        needs="attention of the last token",
        text_guided=True,
    ),
)
@dataclass
class FastV(Reducer):
    """Keep the visual tokens with the highest attention from the last prompt token, averaged over the heads.

    The attention is that of decoder layer `layer - 1` (softmax over all tokens, not only the visual ones). Kept tokens
    keep their positions; a sample keeps at least one visual token.

    Args:
        keep: visual tokens per image (int), or their fraction (float in (0, 1]), that stay from `layer` on. This is how
            FastV's budgets are quoted; averaged over all layers more than `keep` are computed, because the first
            `layer` ones see every token (LLaVA-1.5-7B: 192 after layer 2 of 32 are 216 on average).
        layer: K, the first decoder layer (counted from 0) that runs on fewer tokens: an int from 1 on, or a float in
            (0, 1), a fraction of the depth. The paper's default is 2.
        average: "after_layer": `keep` as above. "all_layers": `keep` is the mean of the visual tokens that enter the
            decoder layers, so that fewer than `keep` stay from `layer` on. Where even one token is too many for that
            mean, one stays, and `Trace.mean_visual_tokens` says what the mean became.
        faithful: the official file's rounding, int(visual tokens * `keep`) for a fraction. Its constants (35 and 576:
            start and length of LLaVA-1.5's image) are replaced by the slots the image really has.

    Raises:
        BudgetError: bad `keep`.
        OptionError: bad `layer` or `average`; `layer` beyond the depth of the model, or a fraction that cannot be met
            with `average="all_layers"`, when applied.
    """

    keep: int | float
    layer: int | float = 2
    average: Literal["after_layer", "all_layers"] = "after_layer"
    faithful: bool = False

    def __post_init__(self) -> None:
        self._budget = Budget(self.keep)
        check_layer(self.layer, first=1)
        if self.average not in ("after_layer", "all_layers"):
            raise OptionError(f"average={self.average!r}: use 'after_layer' or 'all_layers'")
        if self.faithful and self.average != "after_layer":
            raise OptionError("average='all_layers' is not in the official code; it cannot go with faithful=True")

    def prepare(self, anatomy: Anatomy) -> None:
        self._depth = anatomy.depth
        self._first = resolve_layer(self.layer, anatomy.depth, first=1)
        self.stages = (self._first - 1,)
        self.taps = {self._first - 1: TapSpec(queries="last", heads="mean")}
        fraction = self._budget.keep
        if self.average == "all_layers" and isinstance(fraction, float) and fraction * self._depth <= self._first:
            raise OptionError(
                f"keep={self.keep} as a mean over {self._depth} layers cannot be met: "
                f"the first {self._first} see all tokens; choose a smaller layer"
            )

    def _counts(self, view: View) -> Tensor:
        """(B,) visual tokens that stay."""
        keep, visual, most = self._budget.keep, view.active_visual.sum(1), view.visual.shape[1]
        if self.faithful and isinstance(keep, float):
            return look_up(visual, most, truncated, keep)
        if self.average == "after_layer":
            return counts_per_row(self._budget, view)
        if isinstance(keep, float):
            return look_up(visual, most, _rest, keep, self._depth, self._first)
        computed = counts_per_row(self._budget, view) * self._depth
        rest = rounded_ratio(computed - visual * self._first, self._depth - self._first)
        return torch.minimum(rest.clamp_min(1), visual)

    def decide(self, view: View) -> Decision:
        assert view.tap is not None  # asked for in `prepare`
        scores = view.tap.per_slot(view.active.shape[1])
        eligible = view.active_visual
        chosen = top_k_mask(scores, eligible, self._counts(view))
        return Decision(keep=view.active & (chosen | ~view.visual), scores=scores)


def _rest(tokens: int, share: float, depth: int, first: int) -> int:
    """Of `tokens`, those left from layer `first` on for a mean of `share` over all layers."""
    return min(max(round((tokens * share * depth - tokens * first) / (depth - first)), 1), tokens)
