"""What the methods share that decide from the vision tower: blocks of patches, budgets, and the way to a decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.select import padded_indices, put
from ..reduction import Budget, Decision, Patches, UnsupportedError, View, VisionSpec
from ._images import take

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["Blocks", "attention_after", "decide_in_place", "decide_reordered", "feature_layer", "states"]


def feature_layer(anatomy: Anatomy) -> int:
    """Vision layer whose output the model projects: -2 in LLaVA, -1 as a rule."""
    return anatomy.vision_layer


def attention_after(features: int) -> tuple[int, dict[int, VisionSpec]]:
    """The layer that the features of layer `features` enter (itself, if it is the last), and what to read in both.

    PruMerge and Recoverable Compression take attention and keys from there.
    """
    layer = min(features + 1, -1)
    if layer == features:
        return layer, {layer: VisionSpec(key=True, query=True, features=True)}
    return layer, {
        layer: VisionSpec(key=True, query=True),
        features: VisionSpec(attention=None, features=True),
    }


@dataclass
class Blocks:
    """Patches of the images of a batch, tile by tile, and how many of each may stay.

    Attributes:
        view: what the method was shown.
        patches: by vision layer, as read; slots of tokens that are gone already are -1.
        quota: tokens of each image that may stay; None: any number.
        single: every image is one block, and all its tokens are patches: known without asking the device.
    """

    view: View
    patches: dict[int, Patches]
    quota: Budget | None
    single: bool

    @classmethod
    def of(cls, view: View, quota: Budget | None) -> Blocks:
        """Read a view.

        Raises:
            UnsupportedError: the vision tower did not run under this session.
        """
        if not view.vision:
            raise UnsupportedError("the vision tower did not run in this call: give pixel_values, not image features")
        patches, there = {}, view.active_visual
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, read in view.vision.items():
            if id(read.slots) not in seen:
                rows = read.rows.clamp_min(0)
                alive = read.valid & there[rows[:, None], read.slots.clamp_min(0)]
                seen[id(read.slots)] = rows, torch.where(alive, read.slots, -1)
            rows, slots = seen[id(read.slots)]
            patches[layer] = replace(read, rows=rows, slots=slots)
        blocks = next(iter(patches.values()))
        images = -1 if view.layout is None else sum(map(len, view.layout.images))
        return cls(view, patches, quota, blocks.complete and len(blocks.rows) == images)

    @cached_property
    def image_of_slot(self) -> Tensor:
        """(B, S) long, number of the image at each slot."""
        view = self.view
        batch, length = view.active.shape
        first = torch.arange(batch, device=view.active.device)[:, None] * (length + 1)  # no more images than slots
        return first.expand(-1, length) if view.layout is None else first + view.layout.image_index.clamp_min(0)

    @cached_property
    def image(self) -> Tensor:
        """(I,) long, number of the image that a block belongs to."""
        return self.image_of_slot[self.any.rows, self.any.slots.amax(1).clamp_min(0)]

    @cached_property
    def budget(self) -> Tensor:
        """(images,) tokens of each image that may stay."""
        assert self.quota is not None
        batch, length = self.view.active.shape
        tokens = torch.zeros(batch * (length + 1), dtype=torch.long, device=self.view.active.device)
        tokens = tokens.scatter_add(0, self.image_of_slot.flatten(), self.view.active_visual.flatten().long())
        return self.quota.per_row(tokens, most=length)

    @property
    def any(self) -> Patches:
        """One layer's patches, for rows, slots and grids."""
        return next(iter(self.patches.values()))

    @property
    def valid(self) -> Tensor:
        """(I, N) bool."""
        return self.any.valid

    @cached_property
    def size(self) -> Tensor:
        """(I,) tokens of each block that are still there."""
        return self.valid.sum(1)

    def shares(self) -> Tensor:
        """(I,) tokens of each block that stay, in proportion to its size; they sum to the budget of the image."""
        assert self.quota is not None
        size = self.size
        if self.single:
            return self.quota.per_row(size, most=self.valid.shape[1])
        together = torch.zeros_like(self.budget).scatter_add(0, self.image, size)[self.image]
        whole = torch.minimum(self.budget[self.image], together)
        share, remainder = whole * size // together.clamp_min(1), whole * size % together.clamp_min(1)
        same = self.image[:, None] == self.image
        missing = whole - torch.where(same, share, 0).sum(1)
        number = torch.arange(len(size), device=size.device)
        ahead = (remainder > remainder[:, None]) | ((remainder == remainder[:, None]) & (number < number[:, None]))
        return share + ((ahead & same).sum(1) < missing).long()

    def most(self, counts: Tensor, of: Callable[[int], int] = int) -> int:
        """A bound of `counts` (I,), the shares of the blocks or `of` them, which grows with them.

        Where every image is one block it is known without asking the device.
        """
        if not self.single or self.quota is None:
            return int(counts.max()) if len(counts) else 0
        return of(self.quota.of(self.valid.shape[1]))

    @property
    def per_row(self) -> int:
        """Blocks in a row, at most."""
        assert self.view.layout is not None or not self.single
        return max(map(len, self.view.layout.images)) if self.single else len(self.any.rows)  # type: ignore[union-attr]

    def attention(self, layer: int) -> Tensor:
        """(I, N) float32, mean over the heads."""
        attention = self.patches[layer].attention
        assert attention is not None
        return attention.float().mean(1)

    def per_slot(self, values: Tensor) -> Tensor:
        """Values (I, N) by slot of the prompt: (B, S), 0 where no patch is."""
        return self.any.to_slots(values, *self.view.active.shape)

    def keep(self, kept: Tensor) -> Tensor:
        """(B, S) bool: text, the patches that stay (I, N), and learnt row ends as far as the budget is not used up."""
        view, stays = self.view, self.per_slot(kept)
        if self.quota is not None and not self.any.complete:
            used = torch.zeros_like(self.budget).scatter_add(0, self.image, self.size)
            free = (self.budget - used).clamp_min(0)[self.image_of_slot]
            ends = view.active_visual & ~self.per_slot(self.valid)
            before, length = ends.cumsum(1) - ends.long(), view.active.shape[1]
            first = torch.full_like(self.budget, length)
            first = first.scatter_reduce(
                0, self.image_of_slot.flatten(), torch.where(ends, before, length).flatten(), "amin"
            )
            stays = stays | (ends & (before - first[self.image_of_slot] < free))
        return view.active & (stays | ~view.visual)


def states(blocks: Blocks, layer: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What is merged, (I, N, C), and how it becomes states of the language model, (I, M, C) -> (I, M, D).

    Features of the tower before its projector where that is possible, else the visual tokens as they enter.
    """
    patches, view = blocks.patches[layer], blocks.view
    project, features = view.project, patches.features
    if project is not None and features is not None:
        return features, lambda x: project(x.to(features.dtype))
    return take(view.hidden, patches), lambda x: x


def decide_in_place(
    blocks: Blocks, kept: Tensor, merged: Tensor, values: Tensor, owner: Tensor, scores: Tensor
) -> Decision:
    """Every token that stays lies in its own slot; merged ones overwrite theirs.

    Args:
        kept: (I, N) bool, with the merged ones.
        merged: (I, M) long, tokens that are overwritten, -1 for padding.
        values: (I, M, D).
        owner: (I, N) long, for every token the token that carries its content, -1 if none does.
        scores: (I, N) float, for the record.
    """
    patches = blocks.any
    places = torch.arange(1, merged.numel() + 1, device=merged.device).view_as(merged)
    place = blocks.per_slot(put(torch.zeros_like(owner), merged, places))
    slots = padded_indices(place > 0, min(merged.shape[1] * blocks.per_row, place.shape[1]))
    laid = None
    if slots.numel():
        laid = values.flatten(0, 1)[(place.gather(1, slots.clamp_min(0)) - 1).clamp_min(0)]
    carrier = torch.where(owner < 0, -1, patches.slots.gather(1, owner.clamp_min(0)))
    keep = blocks.keep(kept)
    return Decision(
        keep=keep,
        slots=None if laid is None else slots,
        values=laid,
        origin=_origin(blocks, keep, carrier),
        scores=blocks.per_slot(scores),
    )


def decide_reordered(
    blocks: Blocks, homes: Tensor, values: Tensor, key: Tensor, owner: Tensor, scores: Tensor
) -> Decision:
    """Contents are laid in an order of their own into the slots of `homes` and, for those without one, freed slots.

    Args:
        homes: (I, N) bool, tokens whose slots stay.
        values: (I, M, D), in any order.
        key: (I, M) long, not negative, the order within the image; -1 for padding.
        owner: (I, N) long, for every token the column of the content it went into, -1 if none.
        scores: (I, N) float, for the record.

    Raises:
        UnsupportedError: there are more contents than slots.
    """
    view, valid = blocks.view, blocks.valid
    wanted = (key >= 0).sum(1)
    if bool((wanted > valid.sum(1)).any()):
        raise UnsupportedError("the official code adds more tokens here than it removes; use faithful=False")
    spare = valid & ~homes
    homes = homes | (spare & (spare.cumsum(1) <= (wanted - homes.sum(1))[:, None]))
    keep = view.active & (~view.visual | (blocks.per_slot(homes.float()) > 0))
    hosts = blocks.per_slot(homes.float()) > 0
    # By row, then image, then key; images lie one after the other in a row.
    block, column = (key >= 0).nonzero(as_tuple=True)
    order = key[block, column].argsort(stable=True)
    order = order[blocks.image[block[order]].argsort(stable=True)]
    block, column = block[order], column[order]
    row, slot = hosts.nonzero(as_tuple=True)
    slot_of = torch.full_like(key, -1).index_put((block, column), slot)
    count = hosts.sum(1)
    first = count.cumsum(0) - count
    place = torch.arange(len(row), device=row.device) - first[row]
    width = int(count.max())
    slots = torch.full((len(count), width), -1, device=row.device).index_put((row, place), slot)
    laid = values.new_zeros(len(count), width, values.shape[2]).index_put((row, place), values[block, column])
    carrier = torch.where(owner < 0, -1, slot_of.gather(1, owner.clamp_min(0)))
    return Decision(keep, slots, laid, _origin(blocks, keep, carrier), blocks.per_slot(scores))


def _origin(blocks: Blocks, keep: Tensor, carrier: Tensor) -> Tensor:
    """(B, S): slot that carries each slot's content, from (I, N) for the patches; -1 for what is dropped."""
    view = blocks.view
    own = torch.arange(view.active.shape[1], device=view.active.device).expand(view.active.shape)
    laid = blocks.per_slot(torch.where(blocks.valid, carrier + 2, 0))
    return torch.where(laid > 0, laid - 2, torch.where(view.visual & ~keep, -1, own))
