"""The visual tokens of a batch, image by image, in rectangular tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..ops.host import to_device
from ..reduction import Budget, Patches, Positions, View

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy
    from ..engine.layout import Layout

__all__ = [
    "blocks_on_host",
    "by_block",
    "by_image",
    "can_renumber",
    "counts_per_image",
    "counts_per_row",
    "image_of_slot",
    "on_device",
    "renumber_if_possible",
    "take",
    "truncated",
]


def _table(rows: list[int], slots: list[Tensor], grids: list[tuple[int, int]]) -> Patches:
    """Blocks whose slots (n,) are known on the host, there."""
    table = pad_sequence(slots, batch_first=True, padding_value=-1) if slots else torch.empty(0, 0, dtype=torch.long)
    facts = torch.tensor([(row, *grid) for row, grid in zip(rows, grids)], dtype=torch.long).view(-1, 3)
    return Patches(facts[:, 0], table, facts[:, 1:])


def on_device(patches: Patches, device: torch.device) -> Patches:
    """Blocks that are known on the host."""
    facts = to_device(torch.cat([patches.rows[:, None], patches.grid], 1), device)
    return Patches(facts[:, 0], to_device(patches.slots, device), facts[:, 1:])


def by_image(view: View) -> Patches:
    """Visual tokens, one block per image (learnt row ends included), slots ascending; -1 for those that are gone."""
    if view.layout is None:
        slots = torch.arange(view.active.shape[1], device=view.active.device)
        rows = torch.arange(len(view.active), device=slots.device)
        return Patches(rows, torch.where(view.active_visual, slots, -1), slots.new_zeros(len(rows), 2))
    images = [image for images in view.layout.images for image in images]
    host = _table([image.row for image in images], [image.slots for image in images], [(0, 0)] * len(images))
    found = on_device(host, view.active.device)
    there = found.valid & view.active[found.rows[:, None], found.slots.clamp_min(0)]
    return replace(found, slots=torch.where(there, found.slots, -1))


def blocks_on_host(layout: Layout) -> tuple[Patches, list[int]]:
    """Patches, one block per tile, frame or whole image, with their grids; and the number of each block's image."""
    images = [image for images in layout.images for image in images]
    blocks = [(number, block) for number, image in enumerate(images) for block in image.blocks]
    owners, rows = [number for number, _ in blocks], [images[number].row for number, _ in blocks]
    return _table(rows, [block.slots for _, block in blocks], [block.grid for _, block in blocks]), owners


def by_block(view: View) -> Patches:
    """Patches, one block per tile, frame or whole image, with their grids; one block per image without a layout."""
    if view.layout is None:
        return by_image(view)
    return on_device(blocks_on_host(view.layout)[0], view.visual.device)


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
    # No more images than slots; those of all rows are counted in one tensor.
    number = torch.zeros_like(there, dtype=torch.long).scatter_add(1, image_of_slot(view), there.long())
    return number.clamp_max(budget.keep).sum(1)


def truncated(tokens: int, share: float) -> int:
    """int(tokens * share), as official codes count."""
    return int(tokens * share)


def take(hidden: Tensor, images: Patches) -> Tensor:
    """States (B, S, D) of the tokens of each block: (I, N, D); padding repeats slot 0."""
    return hidden[images.rows[:, None], images.slots.clamp_min(0)]
