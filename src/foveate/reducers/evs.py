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
from ..reduction import BEFORE_LAYERS, Budget, Decision, MethodInfo, Patches, Reducer, UnsupportedError, View, register
from ._images import by_block, by_image, renumber_if_possible, take

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["EVS"]

_FIRST = 255.0
"""Score of every patch of the first frame, as in the code."""
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
        UnsupportedError: when applied to a model that takes no videos.
    """

    keep: int | float
    faithful: bool = False

    def __post_init__(self) -> None:
        self._budget = Budget(self.keep)
        self.stages = (BEFORE_LAYERS,)

    def prepare(self, anatomy: Anatomy) -> None:
        if not hasattr(anatomy.base, "get_video_features"):
            raise UnsupportedError(f"{type(anatomy.model).__name__} takes no videos, and EVS leaves images alone")
        self.positions = renumber_if_possible(anatomy)

    def decide(self, view: View) -> Decision | None:
        frames, follows = _frames(view)
        if not len(frames.rows):
            return None
        units = normalize(take(view.hidden, frames).float(), dim=-1)
        change = 1 - (units[1:] * units[:-1]).sum(2)
        if not self.faithful:
            change = (change / _NOISE).round() * _NOISE
        scores = torch.full(frames.slots.shape, _FIRST, device=units.device)
        scores[1:] = torch.where(follows[1:, None], change, _FIRST)
        spread = frames.to_slots(torch.where(frames.valid, scores, 0.0), *view.active.shape)
        shown = frames.to_slots(frames.valid.float(), *view.active.shape) > 0
        videos = by_image(view)
        place = videos.rows[:, None], videos.slots.clamp_min(0)
        score, valid = spread[place], shown[place] & videos.valid
        counts = self._counts(valid.sum(1), ((score == _FIRST) & valid).sum(1), valid.shape[1])
        kept = videos.to_slots(top_k_mask(score, valid, counts).float(), *view.active.shape) > 0
        return Decision(keep=view.active & (kept | ~shown), scores=spread)

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


def _frames(view: View) -> tuple[Patches, Tensor]:
    """Frames of videos (F, P), and whether each follows another one of its video (F,)."""
    blocks = by_block(view)
    if view.layout is None:
        return Patches(blocks.rows[:0], blocks.slots[:0], blocks.grid[:0]), blocks.rows[:0] > 0
    marks = [
        (b.kind == "frame", i > 0) for row in view.layout.images for image in row for i, b in enumerate(image.blocks)
    ]
    is_frame, follows = (torch.tensor(part, dtype=torch.bool, device=blocks.rows.device) for part in zip(*marks))
    return Patches(blocks.rows[is_frame], blocks.slots[is_frame], blocks.grid[is_frame]), follows[is_frame]
