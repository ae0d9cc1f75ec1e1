"""Pivots, and the tokens that duplicate them least. All samples at once."""

from __future__ import annotations

import torch
from torch import Tensor

from .select import top_k_mask

__all__ = ["least_duplicated", "top_indices"]


def top_indices(scores: Tensor, eligible: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices of the `k` highest eligible scores (B, S), falling: (B, k) long; and (B, k) bool, which of them exist."""
    ranked = scores.masked_fill(~eligible, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :k]
    return ranked, eligible.gather(1, ranked)


def least_duplicated(similarity: Tensor, eligible: Tensor, takes: Tensor) -> Tensor:
    """Pivots take turns; each takes the tokens that are least similar to it among those that are left.

    Source: DART, arXiv 2502.11494, section 3; ZichenWen1/DART, `get_retained_image_token`.

    Args:
        similarity: (B, P, S) cosines of each pivot to each slot; the order of the pivots matters.
        eligible: (B, S) bool.
        takes: (B, P) tokens that each pivot takes.

    Returns:
        (B, S) bool, tokens taken; ties go to the lower slot.
    """
    left = eligible
    for pivot in range(similarity.shape[1]):
        left = left & ~top_k_mask(-similarity[:, pivot], left, takes[:, pivot])
    return eligible & ~left
