"""Farthest-point selection: tokens that are as far from each other as possible. All samples at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["farthest_points"]

_LARGEST_MATRIX = 4096
"""Tokens up to which the N x N distances are held; above, they are recomputed chosen token by chosen token."""
_BLOCK = 1024


def _distances(points: Tensor) -> Tensor:
    return torch.baddbmm(points.new_ones(1, 1, 1), points, points.transpose(1, 2), alpha=-1)


def _nearest_other(points: Tensor, usable: Tensor) -> Tensor:
    """Distance of every point to its nearest other usable one, in blocks: (I, N)."""
    slots = torch.arange(points.shape[1], device=points.device)
    nearest = []
    for part, own in zip(points.split(_BLOCK, 1), slots.split(_BLOCK)):
        apart = 1 - part @ points.transpose(1, 2)
        closed = ~usable[:, None] | (own[:, None] == slots)
        nearest.append(apart.masked_fill_(closed, torch.inf).amin(2))
    return torch.cat(nearest, 1)


def farthest_points(features: Tensor, valid: Tensor, counts: Tensor, most: int, repeat: bool = False) -> Tensor:
    """Greedy max-min selection by cosine distance, in O(N) per chosen token.

    The first token is the one whose nearest neighbour is farthest away; then, again and again, the token whose nearest
    chosen one is farthest away. Ties go to the lower index. Distances are taken in float32 whatever `features` is.

    Source: DivPrune, arXiv 2503.02175, algorithm 1; vbdi/divprune @ 799e2d95 (re-implemented from the formulas).

    Args:
        features: (I, N, C).
        valid: (I, N) bool, tokens that exist.
        counts: (I,) tokens to choose, at most the valid ones of a sample unless `repeat`.
        most: the largest of `counts`.
        repeat: as the official code, do not exclude what was chosen: with fewer distinct tokens than `counts`, a token
            is then chosen again and again.

    Returns:
        (I, most) long, indices in the order of selection, -1 where a sample wants fewer.
    """
    points = normalize(features.float(), dim=-1)
    samples, tokens = valid.shape
    dead = torch.zeros_like(points[..., 0]).masked_fill(~valid, -torch.inf)
    distances = _distances(points) if tokens <= _LARGEST_MATRIX else None
    if distances is None:
        score = _nearest_other(points, valid)
    else:
        distances.masked_fill_(~valid[:, None], torch.inf).diagonal(dim1=1, dim2=2).fill_(torch.inf)
        score = distances.amin(2)
        distances.diagonal(dim1=1, dim2=2).fill_(0.0)
    # A sample of one token has no neighbour at all, but it is a token.
    current = (score.clamp_max(4.0) + dead).argmax(1, keepdim=True)
    order = current.new_full((samples, most), -1)
    closest = torch.full_like(score, 4.0) + dead
    sample = torch.arange(samples, device=features.device)
    for step in range(most):
        order[:, step : step + 1] = current
        if step + 1 == most:
            break
        if distances is None:
            apart = 1 - (points @ points[sample, current[:, 0], :, None])[..., 0]
        else:
            apart = distances[sample, current[:, 0]]
        closest = torch.minimum(closest, apart)
        if not repeat:
            closest.scatter_(1, current, -torch.inf)
        current = closest.argmax(1, keepdim=True)
    wanted = torch.arange(most, device=order.device) < counts[:, None]
    return order.masked_fill_(~wanted, -1)
