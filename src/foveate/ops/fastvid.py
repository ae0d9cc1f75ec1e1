"""FastVID's segments, anchors and merging.

Source: NeurIPS 2025, openreview 2xS4VtpApy; LunarShen/FastVID @ a40a109c (re-implemented from the formulas).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .select import gather_tokens, ranks_within

__all__ = ["Segments", "anchor_counts", "cut_segments", "merge_into_anchors"]


@dataclass(frozen=True)
class Segments:
    """Runs of alike frames.

    Attributes:
        number: (V, T) long, of the segment in its video.
        length: (V, T) long, frames of the segment that a frame is in; 0 for padding.
        to_last: (V, T) long, frames after this one in its segment.
    """

    number: Tensor
    length: Tensor
    to_last: Tensor


def cut_segments(features: Tensor, there: Tensor, segments: int, threshold: float) -> Segments:
    """Cut a video where neighbouring frames are least alike, `segments` - 1 times and wherever below `threshold`.

    Args:
        features: (V, T, C) float, one vector for each frame.
        there: (V, T) bool, False for padding, which comes last.
        segments: of a video at least, if it has as many frames.
        threshold: for the cosine of neighbours.
    """
    units = normalize(features, dim=2)
    alike = (units[:, :-1] * units[:, 1:]).sum(2)
    pairs = there[:, 1:]
    place = ranks_within(torch.zeros_like(pairs, dtype=torch.long), pairs, -alike)
    cut = pairs & ((place < segments - 1) | (alike < threshold))
    number = torch.zeros_like(there, dtype=torch.long)
    number[:, 1:] = cut.cumsum(1)
    same = (number[:, :, None] == number[:, None]) & there[:, :, None] & there[:, None]
    return Segments(number, same.sum(2), same.triu(1).sum(2))


def anchor_counts(segments: Segments, context: Tensor, stride: int) -> Tensor:
    """Anchors of each frame: every `stride`-th frame of a segment, from its last on, has as many as the others.

    Args:
        segments: as cut.
        context: (V, T) long, tokens of each frame that go to anchors.
        stride: p.

    Returns:
        (V, T) long.
    """
    together = torch.zeros_like(context).scatter_add(1, segments.number, context).gather(1, segments.number)
    frames = (segments.length + stride - 1) // stride
    has = (segments.to_last % stride == 0) & (segments.length > 0)
    return torch.where(has, together // frames.clamp_min(1), 0)


def merge_into_anchors(
    x: Tensor, members: Tensor, anchors: Tensor, scope: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """Every member goes into the most similar anchor of each anchor frame in whose scope it is.

    Args:
        x: (V, N, D) float, the tokens of a video, frame after frame.
        members: (V, N) bool, tokens that are merged; the anchors are among them.
        anchors: (V, A, q) long, places of the anchors of each anchor frame; -1 for padding.
        scope: (V, N, A) bool, whether a token may go into anchors of that frame.
        weight: an anchor of n members weighs max(1 / (n + 1), weight), their mean the rest.

    Returns:
        Values (V, A, q, D); and for every token the place of the anchor that is most like it of those it went into,
        (V, N), -1 for none.
    """
    real, each = anchors >= 0, anchors.shape[2]
    if not real.numel():
        return x.new_zeros(*anchors.shape, x.shape[2]), torch.full_like(members, -1, dtype=torch.long)
    units, flat = normalize(x, dim=-1), anchors.flatten(1)
    alike = units @ gather_tokens(units, flat).transpose(1, 2)
    alike = alike.masked_fill_(~real.flatten(1)[:, None], -torch.inf).unflatten(2, anchors.shape[1:])
    best, into = alike.max(3)
    inside = scope & members[..., None] & real.any(2)[:, None]
    joined = torch.zeros_like(alike).scatter_(3, into[..., None], inside[..., None].to(alike.dtype)).flatten(2)
    number, own = joined.sum(1)[..., None], gather_tokens(x, flat)
    mean = joined.transpose(1, 2) @ x / number.clamp_min(1)
    share = (1 / (number + 1)).clamp_min(weight)
    values = torch.where(number > 0, share * own + (1 - share) * mean, own).unflatten(1, anchors.shape[1:])
    nearest = best.masked_fill(~inside, -torch.inf).argmax(2, keepdim=True)
    carrier = flat.gather(1, (nearest * each + into.gather(2, nearest))[..., 0])
    return values, torch.where(inside.any(2), carrier, -1)
