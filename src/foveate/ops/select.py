"""Choosing slots of a batch, row by row, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["top_k_mask", "true_indices"]


def top_k_mask(scores: Tensor, eligible: Tensor, k: int | Tensor) -> Tensor:
    """The `k` highest-scoring eligible slots of every row; ties go to the lower slot.

    Args:
        scores: (B, S).
        eligible: (B, S) bool.
        k: one count, or LongTensor (B,). Rows with fewer eligible slots keep them all.

    Returns:
        (B, S) bool.
    """
    ranked = scores.masked_fill(~eligible, float("-inf")).argsort(dim=1, descending=True, stable=True)
    if isinstance(k, Tensor):
        k = k.to(scores.device)[:, None]
    chosen = torch.arange(scores.shape[1], device=scores.device)[None] < k
    out = torch.zeros_like(eligible)
    return out.scatter(1, ranked, chosen.expand_as(ranked)) & eligible


def true_indices(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ascending indices of the True slots of every row, right-aligned in `count` columns.

    Args:
        mask: (B, S) bool, at most `count` True per row.

    Returns:
        index (B, count) long and valid (B, count) bool; an invalid entry points at some False slot.
    """
    order = torch.argsort(mask.to(torch.int8), dim=1, stable=True)[:, mask.shape[1] - count :]
    return order, mask.gather(1, order)
