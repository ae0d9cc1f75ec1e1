"""FoPru: keep the patches, or the rows of patches, that the vision tower itself attends to.

Paper: "FoPru: Focal Pruning for Efficient Large Vision-Language Models", arXiv 2411.14164. There is no official code;
the reference is a third party's, dongxianzhe/hydrainfer @ 9a4ce5ab, `hydrainfer/layer/token_prunning.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..ops.fopru import best_rows, given_and_received, significance
from ..ops.select import top_k_mask
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

__all__ = ["FoPru"]


@register("fopru", MethodInfo(paper="arXiv 2411.14164", acts="before the LLM", needs="attention of the vision tower"))
@dataclass
class FoPru(Reducer):
    """Significance of a patch is the attention it gets from all tokens of its image, averaged over the heads.

    Read in the layer that gives the features. "rank" keeps the most significant patches; "row" keeps whole rows of the
    image, those with the highest mean, and of the last row that fits in part the most significant patches, so that the
    budget is met exactly. Kept patches are in the order of the image. Every tile of an image has its share of `keep`,
    learnt row ends go. Positions are renumbered, with M-RoPE kept.

    The third party's code takes the attention given instead of the attention received where it varies more over the
    patches; as the weights of a query sum to one, that is never the case without a CLS token and hardly ever with one.

    Args:
        keep: visual tokens per image (int), or their fraction (float in (0, 1]); exactly as many stay.
        strategy: "rank" or "row".
        faithful: the third party's rule for the significance, floor(N * keep) patches, and for "row" floor(keep * rows)
            whole rows. Attention between the patches alone is then computed anew, block by block.

    Raises:
        BudgetError: bad `keep`.
        OptionError: bad `strategy`.
        UnsupportedError: "row" where the grid of the patches is not known.
    """

    keep: int | float
    strategy: Literal["rank", "row"] = "rank"
    faithful: bool = False

    def __post_init__(self) -> None:
        self._budget = Budget(self.keep)
        if self.strategy not in ("rank", "row"):
            raise OptionError(f"strategy={self.strategy!r}: use 'rank' or 'row'")
        self.stages = (BEFORE_LAYERS,)

    def prepare(self, anatomy: Anatomy) -> None:
        self.positions = renumber_if_possible(anatomy)
        self._layer = feature_layer(anatomy)
        self.vision_taps = {self._layer: VisionSpec("received", key=self.faithful, query=self.faithful)}

    def _scores(self, blocks: Blocks) -> Tensor:
        read = blocks.patches[self._layer]
        if not self.faithful or read.cls_key is None:
            return blocks.attention(self._layer)
        assert read.query is not None
        assert read.key is not None
        scaling = read.key.shape[3] ** -0.5
        given = given_and_received(read.query, read.key, read.cls_key, scaling, blocks.valid)
        return significance(*given, blocks.valid)

    def _counts(self, blocks: Blocks, height: Tensor, width: Tensor) -> Tensor:
        share, size, most = self._budget.keep, blocks.size, blocks.valid.shape[1]
        if not self.faithful:
            return blocks.shares()
        if self.strategy == "rank":
            return look_up(size, most, truncated, share) if isinstance(share, float) else blocks.shares()
        rows = blocks.shares() // width.clamp_min(1)
        if isinstance(share, float):
            rows = look_up(height, most, truncated, share)
        return rows * width

    def decide(self, view: View) -> Decision | None:
        blocks = Blocks.of(view, self._budget)
        height, width = blocks.any.grid.unbind(1)
        if self.strategy == "row" and bool((width < 1).any()):
            raise UnsupportedError("FoPru: the grid of the patches is not known here; use strategy='rank'")
        scores, counts = self._scores(blocks), self._counts(blocks, height, width)
        if self.strategy == "row":
            kept = best_rows(scores, blocks.valid, width, counts)
        else:
            kept = top_k_mask(scores, blocks.valid, counts)
        if self.faithful:
            blocks.quota = None
        return Decision(keep=blocks.keep(kept), scores=blocks.per_slot(torch.where(blocks.valid, scores, 0.0)))
