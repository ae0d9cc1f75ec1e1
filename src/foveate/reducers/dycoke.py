"""DyCoke: in a window of four frames, three keep only the patches that differ most from an earlier one.

Paper: "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models", arXiv 2411.15024 (CVPR 2025).
Official code: KD-TAO/DyCoke @ dd746349 (Apache-2.0), `llava/model/llava_arch.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.dycoke import WINDOW, similarity
from ..ops.select import gather_tokens, padded_indices, proportional, top_k_mask, true_indices
from ..reduction import (
    BEFORE_LAYERS,
    Budget,
    Decision,
    MethodInfo,
    OptionError,
    Reducer,
    UnsupportedError,
    View,
    look_up,
    register,
)
from ._images import renumber_if_possible, truncated
from ._videos import Videos, check_takes_videos, videos_of

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["DyCoke"]

_NOISE = 1e-5


@register("dycoke", MethodInfo(paper="arXiv 2411.15024", acts="before the LLM, on videos", needs="nothing"))
@dataclass
class DyCoke(Reducer):
    """The paper's temporal merging: of every four frames the first stays whole, the others what is new in them.

    Of the second and third frame of a window those patches stay that are least like (cosine) the patch at their place
    in the first, of the fourth those least like the third. The visual tokens are compared as they enter the language
    model; nothing is averaged, as in the code. Images are left alone, and so are row ends and class tokens of frames.
    Positions are renumbered, with M-RoPE kept.

    The paper's second part, which hides cached visual tokens anew in every decoding step, is not offered: methods
    decide in the prefill, and that part must read the attention of each step before the step can go on. It would save
    no memory: all keys stay stored.

    Mended: every window is treated alike, where the code leaves the third frame of the last one whole, loses the last
    of an odd number of frames and fails for fewer than five; what stays is in the order of the prompt, not of the
    similarity; cosines within 1e-5 are equal, and of equals the earlier stays.

    Args:
        keep: visual tokens per video (int), or their fraction (float in (0, 1]): exactly as many stay, but never less
            than the first frame of each window, about a quarter. None: what `merging_ratio` leaves.
        merging_ratio: without `keep`, the share in [0, 1) of a reduced frame that goes. The paper's is 0.7.
        faithful: the official frames, and their order of rising similarity within a reduced frame. With `keep`, the
            largest number of tokens per reduced frame that does not exceed it.

    Raises:
        BudgetError: bad `keep`.
        OptionError: bad `merging_ratio`.
        UnsupportedError: when applied to a model that takes no videos; a video whose frames cannot be told apart; with
            `faithful`, fewer than five frames, where the official code fails.
    """

    keep: int | float | None = None
    merging_ratio: float = 0.7
    faithful: bool = False

    def __post_init__(self) -> None:
        self._budget = None if self.keep is None else Budget(self.keep)
        ratio = self.merging_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
            raise OptionError(f"merging_ratio={ratio!r}: give a number in [0, 1)")
        self.stages = (BEFORE_LAYERS,)

    def prepare(self, anatomy: Anatomy) -> None:
        check_takes_videos(anatomy, "DyCoke")
        self.positions = renumber_if_possible(anatomy)

    def decide(self, view: View) -> Decision | None:
        videos = videos_of(view)
        if videos is None:
            return None
        alike = similarity(videos.states, videos.valid)
        if self.faithful:
            return self._official(videos, alike)
        alike = (alike / _NOISE).round() * _NOISE
        whole = torch.arange(videos.frames, device=alike.device) % WINDOW == 0
        return videos.decision(self._least_alike(videos, alike, whole.expand(len(alike), -1)), -alike)

    def _least_alike(self, videos: Videos, alike: Tensor, whole: Tensor) -> Tensor:
        """Patches that stay (V, T, P), where the frames `whole` (V, T) stay as they are."""
        sizes = videos.valid.sum(2)
        reduced = sizes.masked_fill(whole, 0)
        if self._budget is None:
            counts = look_up(reduced, alike.shape[2], truncated, 1 - self.merging_ratio)
        else:
            left = (videos.counts(self._budget) - (sizes - reduced).sum(1)).clamp_min(0)
            if self.faithful:  # the same number of every frame
                left -= left % (reduced > 0).sum(1).clamp_min(1)
            counts = proportional(left, reduced)
        counts = torch.where(whole, sizes, counts)
        chosen = top_k_mask(-alike.flatten(0, 1), videos.valid.flatten(0, 1), counts.flatten())
        return chosen.view_as(alike)

    def _official(self, videos: Videos, alike: Tensor) -> Decision:
        number = videos.valid.any(2).sum(1, keepdim=True)
        if int(number.min()) <= WINDOW:
            raise UnsupportedError("DyCoke's official code fails for fewer than five frames; use faithful=False")
        time = torch.arange(videos.frames, device=alike.device).expand(len(alike), -1)
        lost = (number % 2 == 1) & (time == number - 1)
        whole = (time % WINDOW == 0) | ((time % WINDOW == 2) & (time >= number - 2))
        kept = self._least_alike(videos, alike, whole) & ~lost[..., None]
        place = torch.arange(alike.shape[2], device=alike.device).expand_as(alike)
        order = torch.where(whole[..., None], place.float(), alike).masked_fill(~kept, torch.inf)
        content = order.argsort(dim=2, stable=True)  # in the order of the code
        home = true_indices(kept.flatten(0, 1), alike.shape[2], align="left")[0].view_as(content)
        slots, filled = videos.by_frame(videos.patches.slots), place < kept.sum(2, keepdim=True)
        carrier = torch.zeros_like(content).scatter(2, content, torch.where(filled, slots.gather(2, home) + 1, 0))
        source = torch.zeros_like(content).scatter(2, home, torch.where(filled, slots.gather(2, content) + 1, 0))
        decision = videos.decision(kept, -alike)
        laid, from_slot = (videos.per_slot(part) for part in (carrier, source))
        own = torch.arange(laid.shape[1], device=laid.device).expand_as(laid)
        shown = videos.per_slot(videos.valid.float()) > 0
        decision.origin = torch.where(shown, laid - 1, own)
        decision.slots = padded_indices(from_slot > 0, int((from_slot > 0).sum(1).max()))
        sources = from_slot.gather(1, decision.slots.clamp_min(0)) - 1
        decision.values = gather_tokens(videos.view.hidden, sources)
        return decision
