"""What was kept where in the last prefill: feeds every figure and every picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..reduction import BEFORE_LAYERS
from .layout import Layout

__all__ = ["StageRecord", "TowerCall", "Trace"]


class TowerCall(NamedTuple):
    """One call of a vision tower in which a method works on fewer tokens."""

    images: int
    tokens: list[tuple[int, int]]
    """For each layer the tokens per image, class token included: those that attend, and those in its MLP."""


@dataclass(frozen=True)
class StageRecord:
    """One decision, as carried out."""

    stage: int
    active: Tensor
    """(B, S) bool, slots still computed after the stage."""
    origin: Tensor | None
    scores: Tensor | None


@dataclass
class Trace:
    """Record of one prefill of `B` rows and `S` slots through `n_layers` decoder layers.

    Two averages of the visual tokens are in use: over what *entered* each layer (what the compute really is,
    `mean_visual_tokens`) and over what was left *after* each layer (SparseVLM's tables, `mean_visual_tokens_after`).
    """

    n_layers: int
    visual: Tensor
    """(B, S) bool, slots of visual tokens."""
    tokens: Tensor
    """(B, S) bool, not padding."""
    layout: Layout | None = None
    records: list[StageRecord] = field(default_factory=list)
    kv_lengths: list[int] = field(default_factory=list)
    """Keys stored per layer after the prefill (row maximum in a ragged batch)."""
    moved: dict[int, int] = field(default_factory=dict)
    """Stages of the method that were carried out after another layer, since theirs has no attention to read."""
    tower: list[TowerCall] = field(default_factory=list)
    """What the vision tower computed, if the method works there; empty: all tokens in all its layers."""

    @property
    def stages(self) -> list[int]:
        """Stages after which the method's decisions were carried out, in order."""
        return list(dict.fromkeys(record.stage for record in self.records))

    def active(self, stage: int) -> Tensor:
        """(B, S) bool: slots, text included, that are still computed after `stage`."""
        active = self.tokens
        for record in self.records:
            if record.stage <= stage:
                active = record.active
        return active

    def _after(self) -> list[Tensor]:
        """Visual tokens per row after each stage -1, 0, ... n_layers - 1; each (B,)."""
        count, counts = (self.tokens & self.visual).sum(1), []
        by_stage = {record.stage: record.active for record in self.records}
        for stage in range(BEFORE_LAYERS, self.n_layers):
            if stage in by_stage:
                count = (by_stage[stage] & self.visual).sum(1)
            counts.append(count)
        return counts

    @property
    def visual_tokens(self) -> Tensor:
        """LongTensor (B, n_layers): visual tokens, merged ones included, that entered each layer."""
        return torch.stack(self._after()[:-1], dim=1)

    @property
    def visual_tokens_after(self) -> Tensor:
        """LongTensor (B, n_layers): visual tokens, merged ones included, left after each layer."""
        return torch.stack(self._after()[1:], dim=1)

    @property
    def mean_visual_tokens(self) -> Tensor:
        """(B,) float64 on the CPU: mean over the layers of the visual tokens that entered them."""
        return self.visual_tokens.cpu().double().mean(1)

    @property
    def mean_visual_tokens_after(self) -> Tensor:
        """(B,) float64 on the CPU: mean over the layers of the visual tokens left after them."""
        return self.visual_tokens_after.cpu().double().mean(1)

    def _carriers(self, stage: int) -> Tensor:
        """(B, S) long: the slot that carries each original slot's content after `stage`, -1 if dropped."""
        length = self.tokens.shape[1]
        slots = torch.arange(length, device=self.tokens.device).expand(self.tokens.shape)
        carrier = torch.where(self.tokens, slots, -1)
        for record in self.records:
            if record.stage > stage:
                break
            step = slots if record.origin is None else record.origin
            # An origin may point at a slot that did not survive: decisions are ANDed with what is active.
            step = torch.where((step >= 0) & record.active.gather(1, step.clamp_min(0)), step, -1)
            carrier = torch.where(carrier >= 0, step.gather(1, carrier.clamp_min(0)), -1)
        return carrier

    def origins(self, stage: int) -> Tensor:
        """(B, S) long: for every original slot the slot of the patch that stands for it after `stage`, -1 if dropped.

        A patch that survives by itself stands for itself; the members of a merged token share one of them.
        """
        carrier = self._carriers(stage)
        batch, length = carrier.shape
        slots = torch.arange(length, device=carrier.device).expand(batch, length)
        target = torch.where(carrier >= 0, carrier, length)
        first = torch.full((batch, length + 1), length, device=carrier.device)
        first = first.scatter_reduce(1, target, slots, "amin")
        # The slot's own patch speaks for the token if it is a member of it, else its first member does.
        own = torch.zeros(batch, length + 1, dtype=torch.bool, device=carrier.device)
        own[:, :length] = carrier == slots
        speaker = torch.where(own, torch.arange(length + 1, device=carrier.device), first)
        return torch.where(carrier >= 0, speaker.gather(1, target), -1)

    def kept(self, stage: int) -> Tensor:
        """(B, S) bool: original patches, at their own slots, that are left after `stage`; one mark per merged token."""
        origins = self.origins(stage)
        slots = torch.arange(origins.shape[1], device=origins.device)
        return (origins == slots) & self.visual

    def scores(self, stage: int) -> Tensor | None:
        """(B, S) float scores by which the method chose at `stage`, None if it has none."""
        place = self.moved.get(stage, stage)
        return next((record.scores for record in self.records if record.stage == place), None)
