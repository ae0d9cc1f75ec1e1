"""Greedy maximum a posteriori selection of a determinantal point process (DPP). All samples at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["determinantal_points"]

_LARGEST_MATRIX = 4096


def determinantal_points(
    features: Tensor, relevance: Tensor, valid: Tensor, counts: Tensor, most: int, guard: bool = True
) -> Tensor:
    """Greedy MAP of the DPP with kernel diag(r) S diag(r), S the cosines of the features.

    Each step chooses the token with the largest conditional variance given the chosen ones (its gain in log-volume) and
    updates the variances by one row of the Cholesky factor: O(N) plus O(N) per token chosen before. In float32.

    Source: CDPruner, arXiv 2506.10967, section 3; Theia-4869/CDPruner @ 9541616c; the greedy algorithm is that of Chen
    et al., arXiv 1709.05135.

    Args:
        features: (I, N, C).
        relevance: (I, N), not negative.
        valid: (I, N) bool, tokens that exist.
        counts: (I,) tokens to choose, at most the valid ones of a sample.
        most: the largest of `counts`.
        guard: once the rank of the kernel is used up (all variances are rounding noise) go on by relevance. Without it,
            as in the official code, the root of a negative variance is NaN, and the NaN is chosen again and again.

    Returns:
        (I, most) long, indices in the order of selection, -1 where a sample wants fewer.
    """
    points = normalize(features.float(), dim=-1)
    weight = relevance.float().masked_fill(~valid, 0.0)
    samples, tokens = valid.shape
    sample = torch.arange(samples, device=features.device)
    kernel = None
    if tokens <= _LARGEST_MATRIX:
        kernel = (points @ points.transpose(1, 2)).mul_(weight[:, :, None]).mul_(weight[:, None])
        variance = kernel.diagonal(dim1=1, dim2=2).clone()
    else:
        points = points * weight[..., None]
        variance = points.square().sum(-1)
    variance = variance.masked_fill(~valid, -torch.inf)
    noise = 1e-6 * variance.amax(1, keepdim=True).clamp_min(1e-30)
    rest = noise * weight / weight.amax(1, keepdim=True).clamp_min(1e-30)
    factor = points.new_zeros(samples, most, tokens)
    order = torch.full((samples, most), -1, device=features.device)
    for step in range(most):
        ranking = variance
        if guard:
            ranking = torch.where((variance > noise) | variance.isneginf(), variance, rest)
        current = ranking.argmax(1, keepdim=True)
        order[:, step : step + 1] = current
        if step + 1 == most:
            break
        chosen = current[:, 0]
        row = kernel[sample, chosen] if kernel is not None else (points @ points[sample, chosen, :, None])[..., 0]
        if step:
            known = factor[:, :step]
            row = torch.baddbmm(row[:, None], known[sample, :, chosen][:, None], known, alpha=-1)[:, 0]
        left = variance.gather(1, current)
        update = row / left.sqrt() if not guard else row * left.clamp_min(noise).rsqrt() * (left > noise)
        factor[:, step] = update
        variance = variance - update.square()
        variance.scatter_(1, current, -torch.inf)
    wanted = torch.arange(most, device=order.device) < counts[:, None]
    return order.masked_fill_(~wanted, -1)
