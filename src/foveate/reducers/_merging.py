"""What ToMe, PiToMe, AveragePool and Downsample share: from groups of visual tokens to a decision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.merging import Matcher, first_of_each, merge_to_counts
from ..ops.select import padded_indices
from ..reduction import Decision, OptionError, Patches, UnsupportedError, View
from ._images import take

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = [
    "check_tower", "check_where", "decide_by_groups", "decide_by_merging", "decide_by_origin", "spread",
    "tower_leaders",
]  # fmt: skip


def check_where(where: str) -> None:
    """Refuse anything but "tower" and "output". Raises `OptionError`."""
    if where not in ("tower", "output"):
        raise OptionError(f"where={where!r}: use 'tower' (between its layers) or 'output' (after it)")


def check_tower(keep: int | float | None, anatomy: Anatomy) -> None:
    """Refuse what cannot be reduced inside the tower. Raises `UnsupportedError`, `OptionError`."""
    if anatomy.vision is None:
        raise UnsupportedError("there is no vision tower to merge in; use where='output'")
    if isinstance(keep, int) and hasattr(anatomy.base, "pack_image_features"):
        raise OptionError(f"keep={keep}: images have several tiles here; give a fraction, or where='output'")


def tower_leaders(view: View, images: Patches) -> Tensor:
    """For every token of a block the first one that shows the same token of the tower: (I, N) places in the block.

    Raises:
        UnsupportedError: the tower did not run under this session.
    """
    groups = view.tower_groups
    if groups is None:
        raise UnsupportedError("the vision tower did not run in this call: give pixel_values, not image features")
    labels = groups[images.rows[:, None], images.slots.clamp_min(0)]
    return first_of_each(torch.where(images.valid, labels, -1))


def spread(images: Patches, values: Tensor, batch: int, length: int) -> Tensor:
    """Places in a block (I, N) -> slots, as a frame (B, S); slots outside the blocks stand for themselves."""
    own = torch.arange(length, device=values.device).expand(batch, -1)
    slots = images.slots.gather(1, values.clamp(0, images.slots.shape[1] - 1))
    laid = images.to_slots(torch.where(images.valid, slots + 1, 0), batch, length)
    return torch.where(laid > 0, laid - 1, own)


def decide_by_origin(view: View, origin: Tensor, dropped: Tensor | None = None) -> Decision:
    """Keep what stands for itself (every member of a group shows the same already).

    Args:
        origin: (B, S) slot that stands for each slot.
        dropped: (B, S) bool, slots that no token stands for.
    """
    keep = view.active & (origin == torch.arange(origin.shape[1], device=origin.device))
    if dropped is not None:
        keep, origin = keep & ~dropped, torch.where(dropped, -1, origin)
    return Decision(keep=keep, origin=origin)


def decide_by_groups(view: View, images: Patches, leaders: Tensor, dropped: Tensor | None = None) -> Decision:
    """`decide_by_origin` for the token that stands for each token of a block, (I, N) places in the block."""
    return decide_by_origin(view, spread(images, leaders, *view.active.shape), dropped)


def decide_by_merging(
    view: View, images: Patches, counts: Tensor, match: Matcher, weighted: bool, leaders: Tensor | None = None
) -> Decision:
    """Merge the tokens of each image to `counts` (I,); `leaders` says what the tower has merged already."""
    columns = torch.arange(images.slots.shape[1], device=counts.device).expand_as(images.slots)
    alive, size = images.valid, images.valid.long()
    if leaders is not None:
        alive, size = alive & (leaders == columns), torch.zeros_like(size).scatter_add(1, leaders, size)
    final, index, values = merge_to_counts(take(view.hidden, images), size, alive, counts, match, weighted)
    decision = decide_by_groups(view, images, final if leaders is None else final.gather(1, leaders))
    places = torch.arange(index.numel(), device=index.device).view_as(index) + 1
    place = images.to_slots(
        torch.zeros_like(columns).scatter_add(1, index.clamp_min(0), torch.where(index < 0, 0, places)),
        *view.active.shape,
    )
    merged = place > 0
    most = len(index) if view.layout is None else max(map(len, view.layout.images), default=0)
    decision.slots = padded_indices(merged, min(most * index.shape[1], merged.shape[1]))
    cell = place.gather(1, decision.slots.clamp_min(0))
    decision.values = values.flatten(0, 1)[(cell - 1).clamp_min(0)].to(view.hidden.dtype)
    return decision
