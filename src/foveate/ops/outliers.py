"""Outliers of one-dimensional scores: Tukey's fence and the local outlier factor. Ragged samples, all at once."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["count_outliers", "local_outlier_factor", "upper_outliers"]

THRESHOLD = 1.5
"""A local outlier factor above this marks an outlier (scikit-learn's `contamination="auto"`)."""


def _quartiles(ordered: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """First and third quartile (I, 1), interpolated, of the first `counts` of ascending values (I, N)."""
    thirds = torch.arange(1, 4, 2, device=counts.device) * (counts - 1).clamp_min(0)[:, None]
    low, step = thirds // 4, (thirds % 4).to(ordered.dtype) / 4
    high = (low + 1).clamp_max(ordered.shape[1] - 1)
    left, right = ordered.gather(1, low), ordered.gather(1, high)
    quartiles = torch.where(step > 0, left + step * (right - left), left)
    return quartiles[:, :1], quartiles[:, 1:]


def upper_outliers(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores above the third quartile by more than 1.5 interquartile ranges, counted in each sample.

    Args:
        scores: (I, N).
        valid: (I, N) bool.

    Returns:
        (I,) long.
    """
    scores = scores.float()
    ordered, counts = torch.where(valid, scores, torch.inf).sort(1).values, valid.sum(1)
    first, third = _quartiles(ordered, counts)
    return ((scores > third + 1.5 * (third - first)) & valid).sum(1)


def local_outlier_factor(values: Tensor, neighbours: int, valid: Tensor | None = None, double: bool = False) -> Tensor:
    """Local outlier factor of numbers on a line: how much sparser a place is than the places of its neighbours.

    On a line the k nearest are among the k before and the k after, so no N x N distances are needed. As in
    scikit-learn, k is at most the number of the others, and a mean distance is increased by 1e-10.

    Source: Breunig et al., "LOF: Identifying Density-Based Local Outliers", SIGMOD 2000.

    Args:
        values: (I, N).
        neighbours: k.
        valid: (I, N) bool; all by default.
        double: compute in float64, as scikit-learn does, on devices that have it.

    Returns:
        (I, N) float, 1 for a lone value and where not valid; above `THRESHOLD` is an outlier.
    """
    valid = torch.ones_like(values, dtype=torch.bool) if valid is None else valid
    samples, length = values.shape
    most = min(neighbours, length - 1)
    if most < 1 or samples == 0:
        return torch.ones_like(values, dtype=torch.float32)
    precise = torch.float64 if double and values.device.type != "mps" else torch.float32
    line, order = values.to(precise).masked_fill(~valid, torch.inf).sort(dim=1, stable=True)
    counts = valid.sum(1)[:, None, None]
    own = torch.arange(length, device=values.device)[:, None]
    step = torch.arange(1, most + 1, device=values.device)
    window = torch.cat([own - step, own + step], 1)
    exists = (window >= 0) & (window < counts) & (own < counts)
    window = window.clamp(0, length - 1)
    distance = (line[:, window] - line[:, :, None]).abs().masked_fill(~exists, torch.inf)
    distance, pick = distance.topk(most, dim=2, largest=False)
    nearest = window.expand(samples, -1, -1).gather(2, pick).flatten(1)
    k = (counts - 1).clamp(1, most)
    used = torch.arange(most, device=values.device) < k
    reach = distance.gather(2, (k - 1).expand(-1, length, -1))[..., 0]

    def mean(x: Tensor) -> Tensor:
        return torch.where(used, x, 0.0).sum(2) / k[..., 0]

    density = 1 / (mean(torch.maximum(distance, reach.gather(1, nearest).view_as(distance))) + 1e-10)
    factor = mean(density.gather(1, nearest).view_as(distance)) / density
    factor = factor.masked_fill((own[:, 0] >= counts[:, 0]) | (counts[:, 0] < 2), 1.0)
    return torch.empty_like(factor).scatter(1, order, factor).float()


def count_outliers(values: Tensor, neighbours: int, valid: Tensor, double: bool = False) -> Tensor:
    """Values in each sample whose local outlier factor is above 1.5, on both sides: (I,) long."""
    return ((local_outlier_factor(values, neighbours, valid, double) > THRESHOLD) & valid).sum(1)
