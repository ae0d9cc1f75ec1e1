"""Choosing slots of a batch, row by row, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ranks_within", "rounded_ratio", "top_k_mask", "true_indices"]


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


def ranks_within(groups: Tensor, eligible: Tensor, scores: Tensor | None = None) -> Tensor:
    """Place of every eligible slot among those of its group, the highest score first; ties go to the lower slot.

    Args:
        groups: (B, S) long, number of the group in its row.
        eligible: (B, S) bool.
        scores: (B, S); None: in the order of the slots.

    Returns:
        (B, S) long, S where not eligible.
    """
    slots = torch.arange(groups.shape[1], device=groups.device).expand_as(groups)
    order = slots if scores is None else scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, torch.where(eligible, groups, groups.shape[1]).gather(1, order).argsort(dim=1, stable=True))
    member = torch.where(eligible, groups, groups.shape[1]).gather(1, order)
    begins = torch.ones_like(eligible)
    begins[:, 1:] = member[:, 1:] != member[:, :-1]
    place = slots - torch.where(begins, slots, 0).cummax(1).values
    return torch.empty_like(place).scatter(1, order, place).masked_fill(~eligible, groups.shape[1])


def rounded_ratio(above: Tensor, below: Tensor | int) -> Tensor:
    """Whole numbers nearest to `above / below` (long), halves to the even one, without any rounding error: long."""
    whole = above // below
    twice = 2 * (above - whole * below)
    return whole + ((twice > below) | ((twice == below) & (whole % 2 == 1))).long()


def true_indices(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ascending indices of the True slots of every row, right-aligned in `count` columns.

    Args:
        mask: (B, S) bool, at most `count` True per row.

    Returns:
        index (B, count) long and valid (B, count) bool; an invalid entry points at some False slot.
    """
    order = torch.argsort(mask.to(torch.int8), dim=1, stable=True)[:, mask.shape[1] - count :]
    return order, mask.gather(1, order)
