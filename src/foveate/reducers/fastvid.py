"""FastVID: of each run of alike frames the salient patches stay, the rest is merged into a few anchors.

Paper: "FastVID: Dynamic Density Pruning for Fast Video Large Language Models" (NeurIPS 2025, openreview 2xS4VtpApy).
Official code: LunarShen/FastVID @ a40a109c (MIT), `fastvid_llavaonevision/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.density_peaks import Clusters, density_peaks
from ..ops.fastvid import anchor_counts, cut_segments, merge_into_anchors
from ..ops.select import padded_indices, proportional, put, top_k_mask, true_indices
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
from ._images import truncated
from ._tower import feature_layer
from ._videos import Videos, check_takes_videos, videos_of

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["FastVID"]

_NEIGHBOURS = 4
"""Of the density, the token itself included."""


@register(
    "fastvid",
    MethodInfo(paper="openreview 2xS4VtpApy", acts="before the LLM, on videos", needs="attention of the vision tower"),
)
@dataclass
class FastVID(Reducer):
    """Cut a video into segments; keep salient patches of every frame, and merge the others into density peaks.

    1. Segments: a cut where neighbouring frames are least alike, `segments` - 1 times, and wherever their cosine is
       below `threshold`.
    2. Every frame has its share of `keep`. Of it, 1 - `context` goes to the patches with most attention in the tower.
    3. The rest goes to anchors: in every `stride`-th frame of a segment, counted from its last one, the patches of
       highest density times distance to a denser one, among those not kept for their attention.
    4. Each patch that is left, of the anchor's frame if it is a segment of its own, else of the whole segment, is
       merged into the most similar anchor of each anchor frame. An anchor of n weighs max(1 / (n + 1), `weight`), the
       mean of the patches in it the rest. It lies in its own slot.

    Visual tokens are compared and merged as they enter the language model. Images are left alone, and so are row ends
    and class tokens of frames. Positions are kept.

    The paper's attention and frame features are those of SigLIP's pooling head, which language models are shipped
    without. Here a frame's feature is the mean of its visual tokens, and attention is that of the CLS token, without
    one the attention received, averaged over the heads, in the layer that gives the features.

    Mended: exactly `keep` tokens stay, where the code loses what it rounds down and fails where a segment has more
    anchors to place than its anchor frames have patches: both are made up for by salient patches of the video. The code
    adds random noise to the density; here of equals the first is denser. It fails for fewer frames than `segments`.
    With `stride=1` it merges frame by frame also within longer segments.

    Args:
        keep: visual tokens per video (int), or their fraction (float in (0, 1]); exactly as many stay. The paper's is
            0.1.
        segments: C, at least as many if there are enough frames.
        threshold: tau, for the cosine of neighbouring frames.
        context: d, share of `keep` that goes to anchors, in [0, 1].
        stride: p, frames from one anchor frame to the next.
        weight: beta, the least weight of an anchor in its mean, in [0, 1].
        faithful: the code's rounding and errors, without its noise.

    Raises:
        BudgetError: bad `keep`.
        OptionError: any other bad option.
        UnsupportedError: when applied to a model that takes no videos; a video whose frames cannot be told apart; with
            `faithful`, where the official code fails.
    """

    keep: int | float
    segments: int = 8
    threshold: float = 0.9
    context: float = 0.4
    stride: int = 4
    weight: float = 0.6
    faithful: bool = False

    def __post_init__(self) -> None:
        self._budget = Budget(self.keep)
        for name in ("segments", "stride"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"{name}={value!r}: give a whole number from 1 on")
        for name, least in (("threshold", -1), ("context", 0), ("weight", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= 1:
                raise OptionError(f"{name}={value!r}: give a number in [{least}, 1]")
        self.stages = (BEFORE_LAYERS,)

    def prepare(self, anatomy: Anatomy) -> None:
        check_takes_videos(anatomy, "FastVID")
        self._layer = feature_layer(anatomy)
        self.vision_taps = {self._layer: VisionSpec()}

    def decide(self, view: View) -> Decision | None:
        videos = videos_of(view)
        if videos is None:
            return None
        x, valid = videos.states, videos.valid
        features = (x * valid[..., None]).sum(2) / valid.sum(2).clamp_min(1)[..., None]
        return self.reduce(videos, x, features, self._attention(videos))

    def _attention(self, videos: Videos) -> Tensor:
        """(V, T, P), mean over the heads."""
        read = videos.view.vision.get(self._layer)
        if read is None or read.attention is None:
            raise UnsupportedError("the vision tower did not run in this call: give pixels, not features")
        spread = read.to_slots(read.attention.float().mean(1), *videos.view.active.shape)
        patches = videos.patches
        return videos.by_frame(spread[patches.rows[:, None], patches.slots.clamp_min(0)])

    def reduce(self, videos: Videos, x: Tensor, features: Tensor, attention: Tensor) -> Decision:
        """Decide from tokens (V, T, P, D), a feature of each frame (V, T, C) and attention (V, T, P)."""
        valid, sizes = videos.valid, videos.valid.sum(2)
        total, share = self._shares(videos, sizes)
        context = look_up(share, x.shape[2], truncated, self.context)
        salient = _best(attention, valid, share - context)
        rest, room = valid & ~salient, sizes - salient.sum(2)
        runs = cut_segments(features, sizes > 0, self.segments, self.threshold)
        wanted = anchor_counts(runs, context, self.stride)
        number = wanted.minimum(room)
        tallies = [number.max(), (number > 0).sum(1).max(), (wanted - room).max(), (sizes > 0).sum(1).min()]
        most, frames, excess, shortest = torch.stack(tallies).tolist()
        if self.faithful and (excess > 0 or shortest < self.segments):
            reason = "more anchors than patches in a frame" if excess > 0 else f"fewer frames than {self.segments}"
            raise UnsupportedError(f"FastVID's official code fails for {reason}; use faithful=False")
        centres = self._centres(x, rest, number, most)
        is_anchor = put(torch.zeros_like(rest).flatten(0, 1), centres.flatten(0, 1), centres.flatten(0, 1) >= 0)
        is_anchor = is_anchor.view_as(rest)
        free = (valid & ~salient & ~is_anchor).flatten(1)
        missing = total - (salient | is_anchor).sum((1, 2))
        kept = salient | is_anchor | videos.by_frame(top_k_mask(attention.flatten(1), free, missing))

        # Anchor frames side by side.
        frame, there = true_indices(number > 0, frames, align="left")
        centres = centres.gather(1, frame[..., None].expand(-1, -1, most)).masked_fill(~there[..., None], -1)
        place = torch.where(centres < 0, -1, centres + frame[..., None] * x.shape[2])
        alone = wanted == context if self.faithful else runs.length == 1
        time = torch.arange(videos.frames, device=x.device)
        same = runs.number[..., None] == runs.number.gather(1, frame)[:, None]
        scope = torch.where(alone.gather(1, frame)[:, None], frame[:, None] == time[:, None], same)
        members = (rest & (is_anchor | ~kept)).flatten(1)
        values, carrier = merge_into_anchors(
            x.flatten(1, 2), members, place, scope.repeat_interleave(x.shape[2], 1), self.weight
        )
        place = place.masked_fill((total >= sizes.sum(1))[:, None, None], -1)  # nothing goes: nothing is touched
        return _decision(videos, kept, attention, place.flatten(1), values.flatten(1, 2), carrier)

    def _shares(self, videos: Videos, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens that stay of each video (V,) and of each frame (V, T)."""
        if not self.faithful:
            total = videos.counts(self._budget)
            return total, proportional(total, sizes)
        if isinstance(self._budget.keep, float):
            share = look_up(sizes, videos.valid.shape[2], truncated, self._budget.keep)
        else:
            share = (videos.counts(self._budget) // (sizes > 0).sum(1).clamp_min(1))[:, None].minimum(sizes)
        return torch.zeros_like(share[:, 0]), share

    def _centres(self, x: Tensor, rest: Tensor, number: Tensor, most: int) -> Tensor:
        """Density peaks of each frame, `number` (V, T) of them: (V, T, most) places in the frame, -1 for padding."""
        if not most:
            return number[..., None][..., :0]
        tokens, valid = x.flatten(0, 1), rest.flatten(0, 1)
        found = frame_peaks(tokens, valid, number.flatten(), most, guarded=not self.faithful)
        return found.centres.unflatten(0, number.shape)


def frame_peaks(tokens: Tensor, valid: Tensor, number: Tensor, most: int, guarded: bool) -> Clusters:
    """Density peaks of frames (F, P, D), the density taken from four neighbours, the token itself included."""
    return density_peaks(tokens, valid, number, most, neighbours=_NEIGHBOURS, guarded=guarded)


def _best(scores: Tensor, valid: Tensor, counts: Tensor) -> Tensor:
    """The `counts` (V, T) highest `scores` (V, T, P) of each frame: (V, T, P) bool."""
    return top_k_mask(scores.flatten(0, 1), valid.flatten(0, 1), counts.flatten()).view_as(valid)


def _decision(videos: Videos, kept: Tensor, scores: Tensor, place: Tensor, values: Tensor, carrier: Tensor) -> Decision:
    """Keep `kept` (V, T, P), with `values` (V, M, D) at the places (V, M) of their videos.

    Args:
        scores: (V, T, P), for the record.
        carrier: (V, T * P), place of the token that carries each content that goes; -1 if none does.
    """
    decision = videos.decision(kept, scores)
    number = torch.arange(1, place.numel() + 1, device=place.device).view_as(place)
    laid = videos.per_slot(videos.by_frame(put(torch.zeros_like(carrier), place, number)))
    slots = padded_indices(laid > 0, min(place.shape[1] * videos.per_row, laid.shape[1]))
    if slots.shape[1]:
        cell = (laid.gather(1, slots.clamp_min(0)) - 1).clamp_min(0)
        decision.slots, decision.values = slots, values.flatten(0, 1)[cell].to(videos.view.hidden.dtype)
    own = torch.arange(laid.shape[1], device=laid.device).expand_as(laid)
    home = torch.where(carrier < 0, -1, videos.patches.slots.gather(1, carrier.clamp_min(0)))
    went = videos.per_slot(videos.by_frame(home + 1)) - 1
    decision.origin = torch.where(decision.keep, own, torch.where(videos.view.visual, went, own))  # type: ignore[arg-type]
    return decision
