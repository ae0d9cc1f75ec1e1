"""VisionZip: dominant patches by the CLS token's attention, the rest averaged into a few contextual tokens.

Paper: "VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv 2412.04467 (CVPR 2025). Official
code: dvlab-research/VisionZip @ 3151f6df (Apache-2.0), `visionzip/clip_encoder.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.select import gather_tokens, index_mask, padded_indices, put, top_k_mask
from ..ops.visionzip import contextual_groups, merge_into_targets, split_counts
from ..reduction import (
    BEFORE_LAYERS,
    Budget,
    BudgetError,
    Decision,
    MethodInfo,
    OptionError,
    Reducer,
    UnsupportedError,
    View,
    VisionSpec,
    register,
)
from ._images import renumber_if_possible
from ._tower import Blocks, decide_in_place, decide_reordered, feature_layer, states

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["VisionZip"]

OFFICIAL_SHARE = 10 / 64
"""Contextual tokens of all: 10 of 64, 20 of 128, 30 of 192."""


@register(
    "visionzip", MethodInfo(paper="arXiv 2412.04467", acts="before the LLM", needs="attention of the vision tower")
)
@dataclass
class VisionZip(Reducer):
    """The most attended patches stay; of the others every (n // T)-th is a target, and each goes to its nearest target.

    Attention is that of the CLS token, summed over the heads, in the layer that gives the features (without a CLS
    token: attention received from all patches). Nearest is by the cosine of that layer's keys, averaged over the heads.
    A contextual token is the mean of its group; its features are projected, and it lies in the target's slot. Where a
    visual token is made of several patches (Qwen-VL, InternVL) the visual tokens themselves are averaged. Every tile of
    an image has its share of `keep`, learnt row ends go. Positions are renumbered, with M-RoPE kept.

    Mended: the official code adds the mean of a group to its target, about twice the norm, and gives one token of the
    budget to the CLS token, on which LLaVA was never trained; it fails without contextual tokens, or with more of them
    than there are patches.

    Args:
        keep: visual tokens per image (int), or their fraction (float in (0, 1]), contextual ones included; exactly as
            many stay.
        contextual: T, contextual tokens per tile (int), or their share in what stays (float in [0, 1)).
        faithful: the official tokens in the official order: CLS token, dominant patches, contextual tokens; for tiles
            the whole image first, then the patches of all tiles row by row, their CLS tokens, their contextual tokens.
            Only for towers with a CLS token whose features the model projects one by one. What the model cuts away as
            padding does not compete.

    Raises:
        BudgetError: bad `keep`; too small for the CLS token, with `faithful`.
        OptionError: bad `contextual`.
        UnsupportedError: `faithful` without a CLS token or such a projector, or with more contextual tokens than
            patches.
    """

    keep: int | float
    contextual: int | float = OFFICIAL_SHARE
    faithful: bool = False

    def __post_init__(self) -> None:
        self._budget = Budget(self.keep)
        number = self.contextual
        good = not isinstance(number, bool) and isinstance(number, int | float)
        if not good or number < 0 or (isinstance(number, float) and not number < 1):
            raise OptionError(f"contextual={number!r}: give a count, or a share in [0, 1)")
        self.stages = (BEFORE_LAYERS,)

    def prepare(self, anatomy: Anatomy) -> None:
        self.positions = renumber_if_possible(anatomy)
        self._layer = feature_layer(anatomy)
        self.vision_taps = {self._layer: VisionSpec(key=True, features=True)}

    def _counts(self, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Dominant and contextual tokens of each block (I,)."""
        if isinstance(self.contextual, float):
            return split_counts(shares, self.contextual)
        contextual = torch.minimum(torch.full_like(shares, self.contextual), (shares - 1).clamp_min(0))
        return shares - contextual, contextual

    def _contextual(self, share: int) -> int:
        """Contextual tokens of a block of which `share` tokens stay."""
        return int(self._counts(torch.tensor(share))[1])

    def decide(self, view: View) -> Decision | None:
        blocks = Blocks.of(view, self._budget)
        read = blocks.patches[self._layer]
        assert read.key is not None
        scores = blocks.attention(self._layer) * read.attention.shape[1]  # type: ignore[union-attr]
        metric, shares = read.key.float().mean(2), blocks.shares()
        dominant, contextual = self._counts(shares)
        x, project = states(blocks, self._layer)
        if self.faithful:
            return self._official(blocks, scores, metric, x, dominant, contextual)
        kept = top_k_mask(scores, blocks.valid, dominant)
        rest = blocks.valid & ~kept
        most = blocks.most(contextual, self._contextual)
        targets, assigned = contextual_groups(metric, rest, contextual, most)
        values = merge_into_targets(x, targets, assigned)
        own = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        place = targets.gather(1, assigned.clamp_min(0)) if targets.shape[1] else assigned
        is_target = index_mask(targets, kept.shape[1])
        owner = torch.where(assigned >= 0, place, torch.where(kept | is_target, own, -1))
        merged = torch.where((assigned >= 0).any(1, keepdim=True), targets, -1)
        return decide_in_place(blocks, kept | is_target, merged, project(values), owner, scores)

    def _official(
        self, blocks: Blocks, scores: Tensor, metric: Tensor, x: Tensor, dominant: Tensor, contextual: Tensor
    ) -> Decision:
        view, read, valid = blocks.view, blocks.patches[self._layer], blocks.valid
        if view.project is None or read.cls_features is None:
            raise UnsupportedError(
                "VisionZip with faithful=True needs a tower with a CLS token whose patches are projected one by one "
                "(LLaVA); use faithful=False"
            )
        smallest = torch.stack([dominant.min(), contextual.min(), (valid.sum(1) + 1 - dominant - contextual).min()])
        least, fewest, left = smallest.tolist()
        if least < 2:
            raise BudgetError(f"keep={self.keep}: too few for the official CLS token, a patch and contextual tokens")
        if fewest < 1 or left < 0:
            raise UnsupportedError("VisionZip's official code needs contextual tokens, and patches for them")
        kept = top_k_mask(scores, valid, dominant - 1)
        targets, assigned = contextual_groups(metric, valid & ~kept, contextual, int(contextual.max()))
        merged = merge_into_targets(x, targets, assigned, target_weighs=False)
        chosen = padded_indices(kept, int(kept.sum(1).max()))
        features = gather_tokens(x, chosen)
        values = torch.cat([read.cls_features[:, None].to(merged.dtype), features.to(merged.dtype), merged], 1)
        key, n = self._order(blocks, chosen, targets), chosen.shape[1]
        column = torch.full_like(assigned, -1)
        for part, first in ((chosen, 1), (targets, 1 + n)):
            number = torch.arange(first, first + part.shape[1], device=kept.device).expand_as(part)
            column = put(column, part, number)
        owner = torch.where(assigned >= 0, assigned + 1 + n, column)
        homes = kept | (valid & (column > n))
        return decide_reordered(blocks, homes, view.project(values.to(x.dtype)), key, owner, scores)

    def _order(self, blocks: Blocks, chosen: Tensor, targets: Tensor) -> Tensor:
        """Place of [CLS, dominant, contextual] in the official order of the image: (I, 1 + D + T), -1 for padding."""
        number, length = torch.arange(len(chosen), device=chosen.device)[:, None], blocks.view.active.shape[1]
        tile = (blocks.image[:, None] == blocks.image).int().argmax(1, keepdim=True) < number
        step = 3 * length  # wider than any run of slots and contextual tokens
        place = torch.arange(targets.shape[1], device=chosen.device)
        cls = torch.where(tile, 2 * step + number, 0)
        patches = torch.where(tile, step, 1) + blocks.any.slots.gather(1, chosen.clamp_min(0))
        contextual = place + torch.where(tile, 3 * step + number * targets.shape[1], length + 1)
        patches, contextual = patches.masked_fill(chosen < 0, -1), contextual.masked_fill(targets < 0, -1)
        return torch.cat([cls, patches, contextual], 1)
