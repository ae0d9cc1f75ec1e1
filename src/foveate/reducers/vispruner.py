"""VisPruner: half of the tokens by the CLS token's attention, half by removing near-duplicates from the rest.

Paper: "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs", arXiv 2412.01818
(ICCV 2025). Official code: Theia-4869/VisPruner @ aefa01ad (Apache-2.0), `llava/model/llava_arch.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..ops.select import padded_indices, ranked, top_k_mask
from ..ops.vispruner import remove_duplicates
from ..reduction import (
    BEFORE_LAYERS,
    Budget,
    Decision,
    MethodInfo,
    OptionError,
    Reducer,
    UnsupportedError,
    View,
    VisionSpec,
    look_up,
    register,
)
from ._images import renumber_if_possible, truncated
from ._tower import Blocks, feature_layer

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["VisPruner"]


@register(
    "vispruner", MethodInfo(paper="arXiv 2412.01818", acts="before the LLM", needs="attention of the vision tower")
)
@dataclass
class VisPruner(Reducer):
    """int(keep * ratio) patches stay for their attention; the others lose duplicates, round by round, to the budget.

    In a round the remaining patches at even places are compared with those at odd places, by the cosine of their
    features, and the eight that are most similar to one of them go. Attention is that of the CLS token (without one:
    attention received), averaged over the heads, in the layer that gives the features. Every tile of an image has its
    share of `keep`, learnt row ends go. Positions are renumbered, with M-RoPE kept.

    Mended: the official code fails for an odd number of remaining patches. It orders them by similarity after each
    round, and as only even places may go, one rounding error changes a quarter of what stays; here they stay in the
    order of the image, and everything is compared in float32. Above 576 patches more than eight go in a round, so that
    there are never more than 72 rounds.

    Args:
        keep: visual tokens per image (int), or their fraction (float in (0, 1]); exactly as many stay.
        important_ratio: share of `keep` that attention decides, in [0, 1].
        faithful: the official order of the remaining patches (by attention, then by similarity) and eight per round.

    Raises:
        BudgetError: bad `keep`.
        OptionError: bad `important_ratio`.
        UnsupportedError: with `faithful`, where the official code fails.
    """

    keep: int | float
    important_ratio: float = 0.5
    faithful: bool = False

    def __post_init__(self) -> None:
        self._budget = Budget(self.keep)
        ratio = self.important_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
            raise OptionError(f"important_ratio={ratio!r}: give a number in [0, 1]")
        self.stages = (BEFORE_LAYERS,)

    def prepare(self, anatomy: Anatomy) -> None:
        self.positions = renumber_if_possible(anatomy)
        self._layer = feature_layer(anatomy)
        self.vision_taps = {self._layer: VisionSpec(features=True)}

    def decide(self, view: View) -> Decision | None:
        blocks = Blocks.of(view, self._budget)
        scores, valid, shares = blocks.attention(self._layer), blocks.valid, blocks.shares()
        features = blocks.patches[self._layer].features
        assert features is not None
        by_attention = look_up(shares, valid.shape[1], truncated, self.important_ratio)
        important = top_k_mask(scores, valid, by_attention)
        rest = valid & ~important
        counts, tokens, size = rest.sum(1), valid.shape[1], blocks.size
        if self.faithful:
            order = ranked(scores, rest)
        else:
            order = padded_indices(rest, tokens).clamp_min(0)
        per_round = 8 if self.faithful else ((size + 71) // 72).clamp_min(8)
        try:
            diverse = remove_duplicates(features, order, counts, shares - by_attention, per_round, not self.faithful)
        except ValueError as error:
            raise UnsupportedError(f"VisPruner with faithful=True: {error}; use faithful=False") from error
        kept = blocks.keep(important | diverse)
        return Decision(keep=kept, scores=blocks.per_slot(torch.where(valid, scores, 0.0)))
