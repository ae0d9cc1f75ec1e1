"""Greedy maximum a posteriori selection of a determinantal point process (DPP). All samples at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from .greedy import Candidates, beats, padded
from .host import BLOCK, to_device, to_host
from .select import gather_tokens, index_mask

__all__ = ["determinantal_points"]

_NOISE = 1e-6
"""Of the largest variance: what is below is taken for rounding errors."""


@torch.no_grad()
def determinantal_points(
    features: Tensor, relevance: Tensor, valid: Tensor, counts: Tensor, guard: bool = True
) -> Tensor:
    """Greedy MAP of the DPP with kernel diag(r) S diag(r), S the cosines of the features.

    Each step chooses the token with the largest conditional variance given the chosen ones (its gain in log-volume) and
    updates the variances by one row of the Cholesky factor. In float32. The choice is made on the host, the kernel on
    the device: up to `BLOCK` tokens are handed over with one wait; of more the most promising ones, block by block, and
    what the chosen ones explain is taken out of all features, so that no N x N kernel is ever held.

    Source: CDPruner, arXiv 2506.10967, section 3; Theia-4869/CDPruner @ 9541616c; the greedy algorithm is that of Chen
    et al., arXiv 1709.05135.

    Args:
        features: (I, N, C).
        relevance: (I, N), not negative.
        valid: (I, N) bool, tokens that exist.
        counts: (I,) tokens to choose, at most the valid ones of a sample.
        guard: once the rank of the kernel is used up (all variances are rounding noise) go on by relevance. Without it,
            as in the official code, the root of a negative variance is NaN, and the NaN is chosen again and again.

    Returns:
        (I, most) long, indices in the order of selection, -1 where a sample wants fewer.
    """
    points, tokens = normalize(features.float(), dim=-1), valid.shape[1]
    weight = relevance.float().masked_fill(~valid, 0.0)
    # Below the noise a token is worth its relevance; that is less than any variance above it.
    share = weight / weight.amax(1, keepdim=True).clamp_min(1e-30)
    orders: list[list[int]] = [[] for _ in counts]
    if tokens <= BLOCK:
        kernel = (points @ points.transpose(1, 2)).mul_(weight[:, :, None]).mul_(weight[:, None])
        wanted, *handed = to_host(counts, valid, share, kernel)
        for row, order in enumerate(orders):
            exists, least, block = (part[row] for part in handed)
            limit = _NOISE * max(float(block.diagonal().max(where=exists, initial=0.0)), 1e-30)
            order += _choose(np.arange(tokens), exists, limit * least, block, limit, int(wanted[row]), guard)[0]
        return to_device(padded(orders), features.device)

    rest, open_ = points.mul_(weight[..., None]), valid
    noise = _NOISE * rest.square().sum(-1).amax(1, keepdim=True).clamp_min(1e-30)
    share = noise * share
    while True:
        variance = rest.square().sum(-1)
        worth = torch.where(variance > noise, variance, share).masked_fill_(~open_, -torch.inf)
        candidates = Candidates.of(worth, BLOCK)
        there = gather_tokens(rest, candidates.index)
        wanted, *handed = to_host(
            counts, candidates.index, candidates.other, candidates.bound, noise, open_.gather(1, candidates.index),
            share.gather(1, candidates.index), there @ there.transpose(1, 2),
        )  # fmt: skip
        chosen, factors = list[list[int]](), list[np.ndarray]()
        for row, order in enumerate(orders):
            index, other, bound, limits, exists, least, block = (part[row] for part in handed)
            beyond = float(bound[0]), int(other[0])
            left = int(wanted[row]) - len(order)
            new, factor = _choose(index, exists, least, block, float(limits[0]), left, guard, beyond)
            order += new
            chosen.append(new)
            factors.append(factor)
        if all(len(order) >= count for order, count in zip(orders, wanted)):
            return to_device(padded(orders), features.device)
        picks = to_device(padded(chosen), features.device)
        open_ = open_ & ~index_mask(picks, tokens)
        rest = _without(rest, picks, factors)


def _choose(
    index: np.ndarray, exists: np.ndarray, least: np.ndarray, kernel: np.ndarray, noise: float, wanted: int,
    guard: bool, beyond: tuple[float, int] | None = None,
) -> tuple[list[int], np.ndarray]:  # fmt: skip
    """Up to `wanted` of the candidates `index` (m,), as long as they beat the best of the others; see `Candidates`.

    Args:
        exists: (m,) bool.
        least: (m,) what a token is worth of which only noise is left.
        kernel: (m, m), given what was chosen before.
        noise: below it, a variance is none.
        beyond: what the best of the others is worth, and which it is.

    Returns:
        The chosen tokens, and the lower Cholesky factor of those chosen for their variance, the first ones.
    """
    variance = np.where(exists, kernel.diagonal(), -np.inf).astype(np.float32)
    factor = np.empty((max(min(wanted, len(index)), 0), len(index)), np.float32)
    chosen: list[int] = []

    def first(worth: np.ndarray, best: int) -> bool:
        return beyond is None or beats(worth[best], index[best], *beyond)

    with np.errstate(invalid="ignore", divide="ignore"):
        while len(chosen) < wanted:
            best, step = int(variance.argmax()), len(chosen)
            left = variance[best]
            if (guard and left <= noise) or not (first(variance, best) or np.isnan(left)):
                break
            chosen.append(best)
            row = kernel[best] - factor[:step, best] @ factor[:step]
            factor[step] = row / np.sqrt(left)
            variance -= np.square(factor[step])
            variance[best] = -np.inf
    rank = len(chosen)
    if guard and rank < wanted and variance.max(initial=-np.inf) <= noise:
        worth = np.where(variance > -np.inf, least, -np.inf)
        for best in np.argsort(-worth, kind="stable")[: wanted - rank].tolist():
            if worth[best] == -np.inf or not first(worth, best):
                break
            chosen.append(best)
    return index[chosen].tolist(), factor[:rank, chosen[:rank]].T


def _without(rest: Tensor, picks: Tensor, factors: list[np.ndarray]) -> Tensor:
    """Features (I, N, C) less what the first of the picks (I, p), those with a Cholesky factor, explain of them."""
    most = max(len(factor) for factor in factors)
    if not most:
        return rest
    table = np.tile(np.eye(most, dtype=np.float32), (len(factors), 1, 1))
    for whole, factor in zip(table, factors):
        whole[: len(factor), : len(factor)] = factor
    lengths = to_device([len(factor) for factor in factors], rest.device)
    used = torch.arange(most, device=rest.device) < lengths[:, None]
    chosen = gather_tokens(rest, picks[:, :most]) * used[..., None]
    basis = torch.linalg.solve_triangular(to_device(table, rest.device), chosen, upper=False)
    return torch.baddbmm(rest, rest @ basis.transpose(1, 2), basis, alpha=-1)
