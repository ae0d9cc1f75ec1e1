"""Choosing tokens of a batch, row by row, on the device; and translating between indices and masks.

Lists of indices come in two forms: padded with -1, or with a mask that says which of them exist.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "first_k_mask",
    "gather_tokens",
    "index_mask",
    "inverse",
    "padded_indices",
    "proportional",
    "put",
    "put_tokens",
    "ranked",
    "ranks_within",
    "rounded_ratio",
    "top_k_indices",
    "top_k_mask",
    "true_indices",
]


# ------------------------------------------------------------------------------------------------------ by score
def ranked(scores: Tensor, eligible: Tensor) -> Tensor:
    """Indices by falling score, (B, S); ties go to the lower index, what is not eligible comes last."""
    return torch.where(eligible, scores, -torch.inf).argsort(dim=1, descending=True, stable=True)


def first_k_mask(order: Tensor, eligible: Tensor, k: int | Tensor) -> Tensor:
    """Mask (B, S) of the first `k` (one count, or LongTensor (B,)) in a permutation (B, S), where they are eligible."""
    if isinstance(k, Tensor):
        k = k.to(order.device)[:, None]
    chosen = torch.arange(order.shape[1], device=order.device)[None] < k
    return torch.empty_like(eligible).scatter(1, order, chosen.expand_as(order)) & eligible


def top_k_mask(scores: Tensor, eligible: Tensor, k: int | Tensor) -> Tensor:
    """The `k` highest-scoring eligible slots of every row; ties go to the lower slot.

    Args:
        scores: (B, S).
        eligible: (B, S) bool.
        k: one count, or LongTensor (B,). Rows with fewer eligible slots keep them all.

    Returns:
        (B, S) bool.
    """
    return first_k_mask(ranked(scores, eligible), eligible, k)


def top_k_indices(scores: Tensor, eligible: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices of the `k` highest eligible scores (B, S), falling: (B, k) long; and (B, k) bool, which of them exist."""
    index = ranked(scores, eligible)[:, :k]
    return index, eligible.gather(1, index)


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
    member = torch.where(eligible, groups, groups.shape[1])
    if scores is None:
        member, order = member.sort(dim=1, stable=True)
    else:
        order = scores.argsort(dim=1, descending=True, stable=True)
        member, inner = member.gather(1, order).sort(dim=1, stable=True)
        order = order.gather(1, inner)
    begins = torch.ones_like(eligible)
    begins[:, 1:] = member[:, 1:] != member[:, :-1]
    place = slots - torch.where(begins, slots, 0).cummax(1).values
    return torch.empty_like(place).scatter(1, order, place).masked_fill(~eligible, groups.shape[1])


def proportional(total: Tensor, sizes: Tensor) -> Tensor:
    """Whole shares of `total` in proportion to `sizes`; what is left over goes to the largest remainders.

    Args:
        total: (V,) long, at most the sum of the sizes.
        sizes: (V, T) long.

    Returns:
        (V, T) long, each at most its size, with `total` as their sum; of equal remainders the first gets more.
    """
    together, parts = sizes.sum(1, keepdim=True).clamp_min(1), total[:, None] * sizes
    remainder = (parts % together).masked_fill(sizes == 0, -1)
    place = remainder.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    whole = parts // together
    return whole + (place < (total - whole.sum(1))[:, None]).long()


def rounded_ratio(above: Tensor, below: Tensor | int) -> Tensor:
    """Whole numbers nearest to `above / below` (long), halves to the even one, without any rounding error: long."""
    whole = above // below
    twice = 2 * (above - whole * below)
    return whole + ((twice > below) | ((twice == below) & (whole % 2 == 1))).long()


# --------------------------------------------------------------------------------------------- indices and masks
def true_indices(mask: Tensor, count: int, align: Literal["left", "right"] = "right") -> tuple[Tensor, Tensor]:
    """Ascending indices of the True entries of every row, in `count` columns.

    Args:
        mask: (B, S) bool.
        count: at least as many as are True in a row; with `align="left"`, further ones are cut off.
        align: where the indices stand if a row has fewer.

    Returns:
        index (B, count) long and valid (B, count) bool; an invalid entry points at some False one.
    """
    order = mask.to(torch.int8).argsort(dim=1, descending=align == "left", stable=True)
    order = order[:, :count] if align == "left" else order[:, mask.shape[1] - count :]
    return order, mask.gather(1, order)


def padded_indices(mask: Tensor, count: int) -> Tensor:
    """Ascending indices of the True entries of (B, S), the first `count`: (B, count) long, padded with -1."""
    index, valid = true_indices(mask, count, align="left")
    return torch.where(valid, index, -1)


def index_mask(index: Tensor, length: int) -> Tensor:
    """Mask (B, length) of what is listed in `index` (B, M); -1 and `length` are padding."""
    mask = torch.zeros(index.shape[0], length, dtype=torch.bool, device=index.device)
    return put(mask, index, torch.ones_like(index, dtype=torch.bool))


def put(base: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """`base` (B, S) with `values` (B, M) at `index` (B, M); -1 and S are padding and put nowhere."""
    padded = pad(base, (0, 1))
    return padded.scatter_(1, index.remainder(padded.shape[1]), values)[:, :-1]


def put_tokens(x: Tensor, slots: Tensor, values: Tensor, spare: int) -> Tensor:
    """`x` (B, S, D) with `values` (B, M, D) at `slots` (B, M). Padding, -1, leaves slot `spare` as it is."""
    padding = slots < 0
    values = torch.where(padding[..., None].to(x.device), x[:, spare : spare + 1], values.to(x))
    index = torch.where(padding, spare, slots)[..., None].expand(values.shape).to(x.device)
    return x.scatter(1, index, values)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` (B, M) of `x` (B, S, D): (B, M, D); padding, -1, repeats token 0."""
    return x.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, x.shape[2]))


def inverse(order: Tensor) -> Tensor:
    """The place of every entry in a permutation of each row, (B, S) long."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)
