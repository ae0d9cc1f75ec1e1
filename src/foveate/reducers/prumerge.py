"""PruMerge and PruMerge+: keep the patches that stand out in the CLS token's attention, merge the others into them.

Paper: "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", arXiv 2403.15388 (ICCV 2025).
Official code: 42Shawn/LLaVA-PruMerge @ 097c0411 (Apache-2.0), `llava/model/multimodal_encoder/clip_encoder.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ..ops.host import to_device, to_host
from ..ops.outliers import upper_outliers
from ..ops.prumerge import class_attention, evenly_spaced, merge_neighbours, merge_official, official_selection
from ..ops.select import index_mask, padded_indices, top_k_mask
from ..reduction import (
    BEFORE_LAYERS,
    Budget,
    Decision,
    MethodInfo,
    OptionError,
    Reducer,
    UnsupportedError,
    View,
    register,
)
from ._images import renumber_if_possible
from ._layers import check_flag
from ._tower import Blocks, attention_after, decide_in_place, decide_reordered, feature_layer, states

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["PruMerge", "PruMergePlus"]


@register(
    "prumerge", MethodInfo(paper="arXiv 2403.15388", acts="before the LLM", needs="attention of the vision tower")
)
@dataclass
class PruMerge(Reducer):
    """Important patches stay, and to each is added the attention-weighted sum of the pruned ones most similar to it.

    Important is what the CLS token attends to (without one: what gets most attention from all patches), in the layer
    after that of the features: the `keep` highest, or, without `keep`, those above the third quartile by more than 1.5
    interquartile ranges, at least one, so that samples of a batch differ. Similarity is the cosine of that layer's
    keys. Merged features are projected and lie in the slot of the important patch. Where a visual token is made of
    several patches (Qwen-VL, InternVL), for which there is no official code, the visual tokens themselves are merged.
    Tiles of an image are served one by one and share `keep` by their size. Positions are renumbered, with M-RoPE kept.

    Mended: outliers are counted in each image, not in the batch; any number of tokens; pruned patches only are merged;
    attention is that of the model's own heads; no additional token (see `extra`).

    Args:
        keep: visual tokens per image (int), or their fraction (float in (0, 1]), merged ones included; exactly as many
            stay. None: as many as there are outliers.
        neighbours: patches merged into one, at most.
        merge: "sum" (code): the patch plus the weighted sum of its neighbours. As the weights are a softmax, little is
            added. "mean" (paper): the weighted mean of patch and neighbours. Without training it does harm: on the
            small LLaVA of 196 tokens that the project tests with, keep=22 answers .37 of the questions instead of .69.
        extra: one token of `keep` is the weighted mean of all pruned patches (code), in the slot of the last of them.
        faithful: the official code: one head over the whole width, outliers counted over the whole batch, kept patches
            among the neighbours, tokens in descending order of attention, and one more that pools the rest. A fraction
            `keep` is then the official ratio (int(N * keep) tokens and one more). Where nothing is removed the
            additional token, a zero, is left out.

    Raises:
        BudgetError: bad `keep`.
        OptionError: any other bad option.
        UnsupportedError: where the official code fails, with `faithful`.
    """

    keep: int | float | None = None
    neighbours: int = 32
    merge: Literal["sum", "mean"] = "sum"
    extra: bool = False
    faithful: bool = False

    _plus: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._budget = None if self.keep is None else Budget(self.keep)
        if isinstance(self.neighbours, bool) or not isinstance(self.neighbours, int) or self.neighbours < 0:
            raise OptionError(f"neighbours={self.neighbours!r}: give a number of patches, 0 for pruning alone")
        if self.merge not in ("mean", "sum"):
            raise OptionError(f"merge={self.merge!r}: use 'mean' or 'sum'")
        check_flag(self.extra, "extra")
        self.stages = (BEFORE_LAYERS,)

    def prepare(self, anatomy: Anatomy) -> None:
        self.positions = renumber_if_possible(anatomy)
        self._features = feature_layer(anatomy)
        self._keys, self.vision_taps = attention_after(self._features)

    def decide(self, view: View) -> Decision | None:
        blocks = Blocks.of(view, self._budget)
        return self._official(blocks) if self.faithful else self._mended(blocks)

    # ----------------------------------------------------------------------------------------------- mended
    def _choose(self, attention: Tensor, valid: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor]:
        """Patches that stay (I, N), and in which blocks one more token pools the rest (I,)."""
        size, outliers = valid.sum(1), upper_outliers(attention, valid)
        total = self._adaptive(outliers, size) + int(self.extra) if shares is None else shares
        pooled = (total < size) & (total > 1) & self.extra
        wanted = torch.minimum(total, size) - pooled.long()
        if not self._plus:
            return top_k_mask(attention, valid, wanted), pooled
        most = wanted if shares is None else (wanted + 1) // 2
        important = top_k_mask(attention, valid, torch.minimum(outliers, most))
        return important | evenly_spaced(valid & ~important, wanted - important.sum(1)), pooled

    def _adaptive(self, outliers: Tensor, size: Tensor) -> Tensor:
        """Tokens that stay without a budget, of `size`: (I,)."""
        return torch.minimum(outliers.clamp_min(1), size)

    def _mended(self, blocks: Blocks) -> Decision:
        attention, valid = blocks.attention(self._keys), blocks.valid
        # Which patches stay depends on one number for each; that is settled on the host, after one wait.
        seen = [attention, valid, *([blocks.shares()] if self._budget else [])]
        scores, there, *shares = map(torch.from_numpy, to_host(*seen))
        chosen, pooling = self._choose(scores, there, shares[0] if shares else None)
        kept, pooled = (to_device(part, valid.device) for part in (chosen, pooling))
        pruned = valid & ~kept
        key = blocks.patches[self._keys].key
        assert key is not None
        centres = to_device(padded_indices(chosen, int(chosen.sum(1).max())), valid.device)
        x, project = states(blocks, self._features)
        merged, column = merge_neighbours(
            x, key.flatten(2), attention, centres, pruned, self.neighbours, self.merge == "mean"
        )
        own = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
        owner = torch.where(kept, own, -1)
        if centres.shape[1]:
            owner = torch.where(pruned & (column >= 0), centres.gather(1, column.clamp_min(0)), owner)
        overwritten = torch.where(pruned.any(1, keepdim=True) & bool(self.neighbours), centres, -1)
        if self.extra:
            weight = torch.where(pruned, attention.clamp_min(1e-30), 0.0).to(x.dtype)
            pool = (weight[:, None] @ x) / weight.sum(1).clamp_min(1e-30)[:, None, None]
            last = torch.where(pruned, own, -1).amax(1)
            last = torch.where(pooled, last, -1)[:, None]
            kept = kept | (own == last)
            owner = torch.where(pruned & ((owner < 0) | (own == last)) & pooled[:, None], last, owner)
            overwritten, merged = torch.cat([overwritten, last], 1), torch.cat([merged, pool.to(merged.dtype)], 1)
        return decide_in_place(blocks, kept, overwritten, project(merged), owner, attention)

    # --------------------------------------------------------------------------------------------- official
    def _official(self, blocks: Blocks) -> Decision:
        read, valid = blocks.patches[self._keys], blocks.valid
        assert read.key is not None
        attention = blocks.attention(self._keys)
        if read.cls_query is not None and read.cls_key is not None:
            attention = class_attention(read.cls_query, read.cls_key, read.key)
        if not bool(valid.all()):
            raise UnsupportedError("faithful=True serves images of one size without padding; use faithful=False")
        tokens = valid.shape[1]
        if self._budget is None:
            everything = attention.reshape(1, -1)
            ratio = (
                upper_outliers(everything, torch.ones_like(everything, dtype=torch.bool)).item() / everything.numel()
            )
        else:
            share = self._budget.keep
            ratio = share if isinstance(share, float) else (int(blocks.shares()[0]) - 1 + 1e-6) / tokens
        try:
            chosen = official_selection(attention, ratio, self._plus, self._budget is None)
        except ValueError as error:
            raise UnsupportedError(f"PruMerge+ with faithful=True: {error}; use faithful=False") from error
        x, project = states(blocks, self._features)
        centres, extra = merge_official(x, read.key.flatten(2), attention, chosen, self.neighbours)
        homes = index_mask(chosen, tokens)
        values = torch.cat([centres, extra], 1) if chosen.shape[1] < tokens else centres
        count = values.shape[1]
        key = torch.arange(valid.shape[0] * count, device=valid.device).view(-1, count)
        column = torch.arange(chosen.shape[1], device=valid.device).expand_as(chosen)
        owner = torch.full_like(valid, count - 1, dtype=torch.long).scatter(1, chosen, column)
        return decide_reordered(blocks, homes, project(values), key, owner, attention)


@register(
    "prumerge+", MethodInfo(paper="arXiv 2403.15388", acts="before the LLM", needs="attention of the vision tower")
)
@dataclass
class PruMergePlus(PruMerge):
    """PruMerge whose important patches are joined by evenly spaced ones, so that no part of the image is lost.

    Without `keep` there are three spatial samples for each outlier (the official grid has about as many), so about four
    times as many tokens stay as with `PruMerge`. With `keep` the outliers stay, the most attended ones if there are too
    many, but at most half of the budget (official shares with a fixed ratio), and spatial samples fill it exactly. They
    are spaced evenly over the other patches, row by row.

    Mended: any number of tokens and of images; no outlier at all (spatial samples alone, a 16th of the patches), and
    shares above a sixth (where the official grid has every patch) or a third (where it fails).

    Everything else, options included, is as in `PruMerge`. With `faithful` and a fixed `keep` the grid may name
    important patches again, which then are there twice, as in the official code.
    """

    _plus: ClassVar[bool] = True

    def _adaptive(self, outliers: Tensor, size: Tensor) -> Tensor:
        wanted = torch.where(outliers > 0, 4 * outliers, (size / 16).ceil().long())
        return torch.minimum(wanted.clamp_min(1), size)
