"""Pivots, and the tokens that duplicate them least. All samples at once."""

from __future__ import annotations

from torch import Tensor

from .select import top_k_mask

__all__ = ["least_duplicated"]


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
