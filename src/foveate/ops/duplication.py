"""Pivots, and the tokens that duplicate them least. All samples at once."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .host import to_device, to_host

__all__ = ["least_duplicated"]


def least_duplicated(similarity: Tensor, eligible: Tensor, takes: Tensor) -> Tensor:
    """Pivots take turns; each takes the tokens that are least similar to it among those that are left.

    The turns are taken on the host, after one wait.

    Source: DART, arXiv 2502.11494, section 3; ZichenWen1/DART, `get_retained_image_token`.

    Args:
        similarity: (B, P, S) cosines of each pivot to each slot; the order of the pivots matters.
        eligible: (B, S) bool.
        takes: (B, P) tokens that each pivot takes.

    Returns:
        (B, S) bool, tokens taken; ties go to the lower slot.
    """
    near, free, counts = to_host(similarity, eligible, takes)
    taken = np.zeros_like(free)
    for row, each in enumerate(counts.tolist()):
        left = np.flatnonzero(free[row])
        for pivot, count in enumerate(each):
            order = np.argsort(near[row, pivot, left], kind="stable")
            taken[row, left[order[:count]]] = True
            left = np.sort(left[order[count:]])
    return to_device(taken, similarity.device)
