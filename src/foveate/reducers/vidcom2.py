"""VidCom2: of a video keep the patches that are least like the video and their frame, more of them in odd frames.

Paper: "Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models", arXiv
2505.14454 (EMNLP 2025). Official code: xuyang-liu16/VidCom2 @ 944a17d1 (Apache-2.0), `token_compressor/vidcom2/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..ops.select import top_k_mask
from ..ops.vidcom2 import frame_counts, frame_shares, likeness, rounded_counts
from ..reduction import BEFORE_LAYERS, Budget, Decision, MethodInfo, Reducer, View, register
from ._images import renumber_if_possible
from ._videos import check_takes_videos, videos_of

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["VidCom2"]


@register("vidcom2", MethodInfo(paper="arXiv 2505.14454", acts="before the LLM, on videos", needs="nothing"))
@dataclass
class VidCom2(Reducer):
    """A patch counts by how unlike the mean of its video and the mean of its frame it is; odd frames keep more.

    The visual tokens are compared as they enter the language model, on the half of their channels that vary least over
    the video. A frame's share is `keep` times 1 + p - 1 / frames, where p is a softmax (temperature .01) over how
    unlike the video the frames are: nearly one for the oddest. Images are left alone, and so are row ends and class
    tokens of frames, which do not count in the budget. Positions are renumbered, with M-RoPE kept.

    Mended: the code rounds frame by frame and loses what the oddest frame cannot hold; here exactly `keep` tokens of
    each video stay, every frame keeping one if there are enough. Several videos in one call, where the code does
    nothing.

    Args:
        keep: visual tokens per video (int), or their fraction (float in (0, 1]). The paper's are 0.25 and 0.15.
        faithful: the code's rounding.

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
        check_takes_videos(anatomy, "VidCom2")
        self.positions = renumber_if_possible(anatomy)

    def decide(self, view: View) -> Decision | None:
        videos = videos_of(view)
        if videos is None:
            return None
        valid, sizes = videos.valid, videos.valid.sum(2)
        to_video, to_frame = likeness(videos.states, valid)
        counts = videos.counts(self._budget)
        share = counts / sizes.sum(1).clamp_min(1)
        if self.faithful:
            if isinstance(self._budget.keep, float):
                share = share.new_full(share.shape, self._budget.keep)
            counts = rounded_counts(frame_shares(to_video, valid, share), sizes)
        else:
            counts = frame_counts(frame_shares(to_video, valid, share), sizes, counts)
        unlike = -(to_video + to_frame)
        kept = top_k_mask(unlike.flatten(0, 1), valid.flatten(0, 1), counts.flatten())
        return videos.decision(kept.view_as(valid), unlike)
