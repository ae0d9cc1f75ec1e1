"""VidCom2's scores and frame budgets.

Source: arXiv 2505.14454; xuyang-liu16/VidCom2 @ 944a17d1 (re-implemented from the formulas).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["frame_counts", "frame_shares", "likeness", "rounded_counts"]

_WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
_TEMPERATURE = 0.01
_TIE = 256
"""Remainders are compared in steps of 1 / 256: below lies the noise of a softmax this sharp."""


def likeness(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """How like its video and how like its frame every token is: sums of Gaussians around the two means.

    Tokens are compared on the half of the channels that vary least over the video, normalised on these.

    Args:
        x: (V, T, P, C) float.
        valid: (V, T, P) bool.

    Returns:
        Likeness to the video and to the frame, (V, T, P) each; no meaning where not valid.
    """
    there, tokens = valid[..., None], valid.sum((1, 2))[:, None].clamp_min(1)
    x = x.masked_fill(~there, 0.0)
    mean = x.sum((1, 2)) / tokens
    variance = (x - mean[:, None, None]).masked_fill_(~there, 0.0).square_().sum((1, 2)) / tokens
    quiet = variance.argsort(dim=1, stable=True)[:, : x.shape[-1] // 2]
    units = normalize(x.gather(3, quiet[:, None, None].expand(*x.shape[:3], -1)), dim=-1)
    of_video = (units.sum((1, 2)) / tokens)[:, None, None]
    of_frame = units.sum(2, keepdim=True) / valid.sum(2).clamp_min(1)[..., None, None]
    return _gaussians(units, of_video), _gaussians(units, of_frame)


def _gaussians(x: Tensor, centre: Tensor) -> Tensor:
    apart = (x - centre).square().sum(-1)
    return torch.stack([(-apart / (2 * width)).exp() for width in _WIDTHS]).sum(0)


def frame_shares(to_video: Tensor, valid: Tensor, share: Tensor) -> Tensor:
    """The share of each frame that stays, unlike frames more: share * (1 + softmax - 1 / frames). May exceed 1.

    Args:
        to_video: (V, T, P), from `likeness`.
        valid: (V, T, P) bool.
        share: (V,) of the whole video.

    Returns:
        (V, T), 0 for padding.
    """
    there = valid.any(2)
    unlike = -(to_video * valid).sum(2) / valid.sum(2).clamp_min(1)
    # A video without any token is padding from end to end: all of its frames alike, in place of NaN.
    odd = (unlike / _TEMPERATURE).masked_fill(~there, torch.finfo(unlike.dtype).min).softmax(1)
    frames = there.sum(1, keepdim=True).clamp_min(1)
    return (share[:, None] * (1 + odd - 1 / frames)).masked_fill(~there, 0.0)


def rounded_counts(shares: Tensor, sizes: Tensor) -> Tensor:
    """The code's counts (V, T): shares of `sizes` (both (V, T)), at most 1, rounded half to even, at least one."""
    return (shares.clamp_max(1.0) * sizes).round().long().clamp_min(1).minimum(sizes)


def frame_counts(shares: Tensor, sizes: Tensor, total: Tensor) -> Tensor:
    """Tokens of each frame that sum up to `total`, as near as may be to their shares.

    What a frame cannot hold goes to the others in proportion to their room; what is needed to give every frame one
    token (if there are as many as frames) is taken from the others alike. Fractions go to the largest remainders.

    Args:
        shares: (V, T), of `frame_shares`.
        sizes: (V, T) long, tokens of each frame.
        total: (V,) long, at most the sum of the sizes.

    Returns:
        (V, T) long.
    """
    there = sizes > 0
    least = (there & (total >= there.sum(1))[:, None]).to(shares.dtype)
    wanted = torch.minimum((shares * sizes).maximum(least), sizes.to(shares.dtype))
    over = total - wanted.sum(1)
    room = torch.where(over[:, None] > 0, sizes - wanted, wanted - least)
    wanted = wanted + room * (over / room.sum(1).clamp_min(1e-6))[:, None]
    whole = (wanted + 1e-4).floor().long().minimum(sizes)
    remainder = ((wanted - whole) * _TIE).round().masked_fill(whole >= sizes, -torch.inf)
    place = remainder.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return whole + (place < (total - whole.sum(1))[:, None]).long()
