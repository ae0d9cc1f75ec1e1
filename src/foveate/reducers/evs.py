"""EVS, efficient video sampling: of a video keep the patches that changed since the frame before.

Paper: "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference", arXiv 2510.14624. Code:
vllm-project/vllm @ 926c71f6, `vllm/multimodal/evs.py` (re-implemented from the formulas).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..ops.select import top_k_mask
from ..reduction import BEFORE_LAYERS, Budget, Decision, MethodInfo, Reducer, View, register
from ._images import renumber_if_possible
from ._videos import check_takes_videos, videos_of

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["EVS"]

_FIRST = 255.0
"""Score of every patch of the first frame, as in the code."""
_UNLIKE = 2.0
"""1 - cosine of a patch that has none at its place in the frame before: as much as can be."""
_NOISE = 1e-5


@register("evs", MethodInfo(paper="arXiv 2510.14624", acts="before the LLM, on videos", needs="nothing"))
@dataclass
class EVS(Reducer):
    """A patch counts by 1 - cosine to the patch at its place in the frame before; the first frame stays whole.

    The visual tokens themselves are compared, as they enter the language model. Frames keep as many tokens as changed
    in them, possibly none; images are left alone, and so are row ends. What drifts slowly is never kept: the frame
    before is what counts, not the last one kept. Positions are renumbered, with M-RoPE kept.

    Mended: patches of identical frames differ by rounding errors, and the code lets these decide; here differences
    below 1e-5 are none, and of equal patches the earlier stays. Several videos in one call.

    Args:
        keep: visual tokens per video (int), or their fraction (float in (0, 1]); at least one frame.
        faithful: the code's truncation of the fraction, and its rounding errors.

    Raises:
        BudgetError: bad `keep`.
        UnsupportedError: when applied to a model that takes no videos; a video whose frames cannot be told apart.
    """

    keep: int | float
    faithful: bool = False

    def __post_init__(self) -> None:
        self._budget = Budget(self.keep)
        self.stages = (BEFORE_LAYERS,)

    def prepare(self, anatomy: Anatomy) -> None:
        check_takes_videos(anatomy, "EVS")
        self.positions = renumber_if_possible(anatomy)

    def decide(self, view: View) -> Decision | None:
        videos = videos_of(view)
        if videos is None:
            return None
        units, valid = normalize(videos.states, dim=-1), videos.valid
        change = 1 - (units[:, 1:] * units[:, :-1]).sum(3)
        if not self.faithful:
            change = (change / _NOISE).round() * _NOISE
        scores = torch.full(valid.shape, _FIRST, device=units.device)
        scores[:, 1:] = torch.where(valid[:, :-1], change, _UNLIKE)
        counts = self._counts(valid.sum((1, 2)), valid[:, 0].sum(1), valid[0].numel())
        kept = top_k_mask(scores.flatten(1), valid.flatten(1), counts)
        return videos.decision(videos.by_frame(kept), scores)

    def _counts(self, tokens: Tensor, frame: Tensor, most: int) -> Tensor:
        """(I,) of `tokens` (I,), at most `most`, in frames of `frame` (I,) ones."""
        if self.faithful and isinstance(self._budget.keep, float):
            wanted = official_count(tokens, torch.tensor(self._budget.keep, dtype=torch.double))
        else:
            wanted = self._budget.per_row(tokens, most=most)
        return torch.maximum(wanted, frame)


def official_count(tokens: Tensor, keep: Tensor) -> Tensor:
    """The code's share of `tokens` (long): truncated, in double precision."""
    return (tokens.double() * keep).long()
