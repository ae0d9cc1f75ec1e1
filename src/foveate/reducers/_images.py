"""The visual tokens of a batch, image by image, in rectangular tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.select import ranks_within
from ..reduction import Budget, Patches, Positions, View

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = [
    "by_block",
    "by_image",
    "can_renumber",
    "counts_per_image",
    "counts_per_row",
    "image_of_slot",
    "renumber_if_possible",
    "take",
    "truncated",
]


def _grouped(rows: Tensor, slots: Tensor, group: Tensor) -> Patches:
    """Collect (row, slot) pairs (M,) of the same group, in the order in which they are given."""
    order = group.argsort(stable=True)
    rows, slots = rows[order], slots[order]
    _, member, lengths = group[order].unique_consecutive(return_inverse=True, return_counts=True)
    starts = lengths.cumsum(0) - lengths
    place = torch.arange(len(slots), device=slots.device) - starts[member]
    table = slots.new_full((len(lengths), int(lengths.max()) if len(lengths) else 0), -1)
    table[member, place] = slots
    return Patches(rows[starts], table, torch.zeros(len(lengths), 2, dtype=torch.long, device=slots.device))


def by_image(view: View) -> Patches:
    """Visual tokens that are still there, one block per image (learnt row ends included), slots ascending."""
    rows, slots = view.active_visual.nonzero(as_tuple=True)
    if view.layout is None:
        return _grouped(rows, slots, rows)
    image = view.layout.image_index[rows, slots]
    return _grouped(rows, slots, rows * (view.active.shape[1] + 1) + image)


def by_block(view: View) -> Patches:
    """Patches one block per tile, frame or whole image, with their grids; one block per image without a layout."""
    if view.layout is None:
        return by_image(view)
    blocks = [(image.row, block) for images in view.layout.images for image in images for block in image.blocks]
    device = view.visual.device
    longest = max((len(block.slots) for _, block in blocks), default=0)
    slots = torch.full((len(blocks), longest), -1)
    for i, (_, block) in enumerate(blocks):
        slots[i, : len(block.slots)] = block.slots
    rows = torch.tensor([row for row, _ in blocks], dtype=torch.long)
    grids = torch.tensor([block.grid for _, block in blocks], dtype=torch.long).view(-1, 2)
    return Patches(rows.to(device), slots.to(device), grids.to(device))


def can_renumber(anatomy: Anatomy) -> bool:
    """Whether positions can be renumbered: RoPE with one axis, no sliding window that a prompt might exceed."""
    if anatomy.mrope or not hasattr(anatomy.decoder, "rotary_emb"):
        return False
    return all(window is None for window in anatomy.sliding_windows)


def renumber_if_possible(anatomy: Anatomy) -> Positions:
    """Positions as if removed tokens had never been there ("renumber") where the model allows it, else "keep"."""
    return "renumber" if can_renumber(anatomy) else "keep"


def counts_per_image(budget: Budget, images: Patches) -> Tensor:
    """(I,) tokens of each image that stay."""
    return budget.per_row(images.valid.sum(1), most=images.slots.shape[1])


def image_of_slot(view: View) -> Tensor:
    """(B, S) long, number of the image or video in its row to which each visual slot belongs; 0 without a layout."""
    if view.layout is None:
        return torch.zeros_like(view.visual, dtype=torch.long)
    return view.layout.image_index.to(view.visual.device).clamp_min(0)


def counts_per_row(budget: Budget, view: View) -> Tensor:
    """(B,) visual tokens of each row that stay: a fraction of all, or a count from every image of it."""
    there = view.active_visual
    if isinstance(budget.keep, float):
        return budget.per_row(there.sum(1), most=there.shape[1])
    return (ranks_within(image_of_slot(view), there) < budget.keep).sum(1)


def truncated(tokens: int, share: float) -> int:
    """int(tokens * share), as official codes count."""
    return int(tokens * share)


def take(hidden: Tensor, images: Patches) -> Tensor:
    """States (B, S, D) of the tokens of each block: (I, N, D); padding repeats slot 0."""
    return hidden[images.rows[:, None], images.slots.clamp_min(0)]
