"""Farthest-point selection: tokens that are as far from each other as possible. All samples at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from .greedy import Candidates, beats, padded
from .host import BLOCK, to_device, to_host
from .select import gather_tokens

__all__ = ["farthest_points"]

_ROWS = 256
"""Tokens whose nearest neighbours are looked for at a time."""


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.baddbmm(a.new_ones(1, 1, 1), a, b.transpose(1, 2), alpha=-1)


@torch.no_grad()
def farthest_points(features: Tensor, valid: Tensor, counts: Tensor, repeat: bool = False) -> Tensor:
    """Greedy max-min selection by cosine distance.

    The first token is the one whose nearest neighbour is farthest away; then, again and again, the token whose nearest
    chosen one is farthest away. Ties go to the lower index. Distances are taken in float32 whatever `features` is. The
    choice is made on the host, the distances on the device: up to `BLOCK` tokens are handed over with one wait; of more
    the most promising ones, block by block, and no N x N distances are ever held.

    Source: DivPrune, arXiv 2503.02175, algorithm 1; vbdi/divprune @ 799e2d95 (re-implemented from the formulas).

    Args:
        features: (I, N, C).
        valid: (I, N) bool, tokens that exist.
        counts: (I,) tokens to choose, at most the valid ones of a sample unless `repeat`.
        repeat: as the official code, do not exclude what was chosen: with fewer distinct tokens than `counts`, a token
            is then chosen again and again.

    Returns:
        (I, most) long, indices in the order of selection, -1 where a sample wants fewer.
    """
    points = normalize(features.float(), dim=-1)
    dead = torch.zeros_like(points[..., 0]).masked_fill_(~valid, -torch.inf)
    distances = None
    if valid.shape[1] <= BLOCK:
        distances = _distances(points, points)
        closed = distances.masked_fill(~valid[:, None], torch.inf)
        closed.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        nearest = closed.amin(2)
        distances.diagonal(dim1=1, dim2=2).fill_(0.0)
    else:
        nearest = _nearest_others(points, valid)
    # A sample of one token has no neighbour at all, but it is a token.
    picks = (nearest.clamp_max(4.0) + dead).argmax(1, keepdim=True)
    closest, after = dead + 4.0, 0.0 if repeat else -torch.inf
    orders: list[list[int]] = [[] for _ in counts]
    while True:
        if distances is not None:
            apart = distances.gather(1, picks[..., None].expand(-1, -1, distances.shape[2])).amin(1)
        else:
            there = gather_tokens(points, picks)
            apart = torch.cat([_distances(part, there).amin(2) for part in points.split(BLOCK, 1)], 1)
        closest = torch.minimum(closest, apart).scatter_(1, picks, after)
        candidates = Candidates.of(closest, BLOCK)
        worth, block = closest, distances
        if block is None:
            there = gather_tokens(points, candidates.index)
            worth, block = closest.gather(1, candidates.index), _distances(there, there)
            block.diagonal(dim1=1, dim2=2).fill_(0.0)
        wanted, first, *handed = to_host(
            counts, picks, candidates.index, candidates.other, worth, candidates.bound, block
        )
        new = []
        for row, order in enumerate(orders):
            if not order and wanted[row]:
                order.append(int(first[row, 0]))
            index, other, closest_, bound, apart_ = (part[row] for part in handed)
            beyond = float(bound[0]), int(other[0])
            found = _choose(index, closest_, apart_, beyond, int(wanted[row]) - len(order), after)
            new.append(found)
            order += found
        if all(len(order) >= count for order, count in zip(orders, wanted)):
            return to_device(padded(orders), features.device)
        picks = to_device(padded(new, [order[0] if order else 0 for order in orders]), features.device)


def _choose(
    index: np.ndarray, worth: np.ndarray, apart: np.ndarray, beyond: tuple[float, int], wanted: int, after: float
) -> list[int]:
    """Up to `wanted` of the candidates `index` (m,), as long as they beat the best of the others; see `Candidates`.

    Args:
        worth: (m,) distance of each to its nearest chosen token.
        apart: (m, m) distances.
        beyond: what the best of the others is worth, and which it is.
        after: what a token is worth once it is chosen.
    """
    chosen = list[int]()
    worth = worth.copy()
    while len(chosen) < wanted:
        best = int(worth.argmax())
        if not beats(worth[best], index[best], *beyond):
            break
        chosen.append(int(index[best]))
        np.minimum(worth, apart[best], out=worth)
        worth[best] = after
    return chosen


def _nearest_others(points: Tensor, valid: Tensor) -> Tensor:
    """For every point a bound of the distance to its nearest other valid one, exact where it is largest: (I, N).

    Distances to a few are a bound for all. Those with the largest bounds are measured exactly, which gives more bounds,
    until no bound is above the largest exact distance.
    """
    nearest = torch.full_like(points[..., 0], 4.0).masked_fill_(~valid, -torch.inf)
    exact = ~valid
    while True:
        rows = nearest.masked_fill(exact, -torch.inf).topk(min(_ROWS, valid.shape[1]), dim=1).indices
        apart = _distances(gather_tokens(points, rows), points)
        apart.scatter_(2, rows[..., None], torch.inf)
        own = apart.masked_fill(~valid[:, None], torch.inf).amin(2)
        there = valid.gather(1, rows)
        nearest = torch.minimum(nearest, apart.masked_fill_(~there[..., None], torch.inf).amin(1))
        nearest = nearest.scatter(1, rows, torch.where(there, own, -torch.inf))
        exact = exact.scatter(1, rows, True)
        left = nearest.masked_fill(exact, -torch.inf).amax(1) >= nearest.masked_fill(~exact, -torch.inf).amax(1)
        if not bool((left & ~exact.all(1)).any()):
            return nearest.masked_fill(~exact, -torch.inf)
