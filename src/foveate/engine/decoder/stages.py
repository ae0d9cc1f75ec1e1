"""The stages of one prefill: what a method is shown at each, what it says, and the record of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...reduction import BEFORE_LAYERS, Decision, Patches, Reducer, Tap, TapSpec, UnsupportedError, View
from ..families.parts import Anatomy
from ..layout import Layout
from ..trace import StageRecord, Trace
from ..vision.reader import VisionReader
from .ahead import read_ahead
from .taps import choose_rows

__all__ = ["Stages"]


@dataclass
class Stages:
    """One method in one prefill of `B` rows. `P` slots are the prompt: what follows it is never shown to a method.

    Attributes:
        visual: (B, P) bool.
        tokens: (B, P) bool, not padding.
        layout, info, tower_groups: as in `View`.
        vision: what is read in the vision tower.
        places: after which layer a stage is carried out, where that is not its own.
        due: stages to carry out, by layer.
        trace: the record.
    """

    anatomy: Anatomy
    reducer: Reducer
    visual: Tensor
    tokens: Tensor
    layout: Layout | None = None
    info: dict[str, Any] = field(default_factory=dict)
    vision: VisionReader | None = None
    tower_groups: Tensor | None = None
    places: Mapping[int, int] = field(default_factory=dict)

    due: dict[int, list[int]] = field(default_factory=dict, init=False)
    _taps: dict[int, Tap] = field(default_factory=dict, init=False)
    _state: dict[str, Any] = field(default_factory=dict, init=False)
    _patches: dict[int, Patches] | None = field(default=None, init=False)
    _project: Callable[[Tensor], Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for stage in sorted(self.reducer.stages):
            self.due.setdefault(self.places.get(stage, stage), []).append(stage)
        self.trace = Trace(self.anatomy.depth, self.visual, self.tokens, self.layout)
        self.trace.moved = dict(self.places)

    @property
    def prompt(self) -> int:
        """P."""
        return self.visual.shape[1]

    def read_in(self, layer: int) -> Iterator[tuple[int, TapSpec]]:
        """The stages that want rows of the attention of a layer, and which."""
        for stage in self.due.get(layer, ()):
            spec = self.reducer.taps.get(stage)
            if spec is not None and spec.queries is not None:
                yield stage, spec

    def rows(self, spec: TapSpec, active: Tensor) -> Tensor:
        """Slots (B, P) whose rows are wanted, of those that are still there."""
        return choose_rows(spec, active, self.visual, self._state)

    def heard(self, stage: int, tap: Tap) -> None:
        """Rows were read for a stage."""
        self._taps[stage] = tap

    def decide(self, stage: int, hidden: Tensor, active: Tensor, positions: Tensor | None) -> Decision:
        """Ask the method.

        Args:
            stage: number of the stage.
            hidden: by slot, as the decoder has it: (B, S, D), or several streams of it.
            active: (B, P) bool, slots still there.
            positions: (B, S) for RoPE where they were renumbered.

        Raises:
            UnsupportedError: it merges one of several streams.
            ValueError: tensors of wrong shapes.
        """
        streams = self.anatomy.streams
        states = hidden if streams is None else streams.seen(hidden)
        patches, project = self._seen(states)
        copies = None if streams is None else streams.by_token(hidden)[:, : self.prompt].flatten(2).to(active.device)
        # Methods see one device, that of the prompt, however the layers are spread.
        view = View(
            stage, states[:, : self.prompt].to(active.device), active, self.visual, self.tokens,
            self._taps.pop(stage, None), patches, self.layout, self.info, self._state, project,
            tower_groups=self.tower_groups, streams=copies,
        )  # fmt: skip
        spec = self.reducer.taps.get(stage)
        if spec is not None and spec.ahead:
            view.ahead = functools.partial(read_ahead, self.anatomy, stage + 1, positions=positions)
        decision = self.reducer.decide(view)
        if decision is None:
            return Decision()
        slots, values, keep = decision.slots, decision.values, decision.keep
        if values is not None and streams is not None and values.shape[-1] == states.shape[-1]:
            if streams.attends is not None or stage != BEFORE_LAYERS:
                raise UnsupportedError(
                    f"{type(self.anatomy.model).__name__} keeps {streams.count} hidden states of each token, and "
                    f"{type(self.reducer).__name__} merges one (View.hidden, not View.states); use a method that only "
                    "removes"
                )
            decision.values = values = values.repeat(1, 1, streams.count)
        if slots is not None and (values is None or values.shape[:2] != slots.shape):
            raise ValueError("Decision(slots=(B, m), values=(B, m, D)): both are needed, with the same B and m")
        if keep is not None and (keep.shape != active.shape or keep.dtype != torch.bool):
            raise ValueError(
                f"Decision.keep must be a BoolTensor {tuple(active.shape)}, got {keep.dtype} {tuple(keep.shape)}"
            )
        return decision

    def record(self, stage: int, decision: Decision, active: Tensor) -> None:
        """Write down what was decided, and the slots (B, P) that are left."""
        origin, scores = decision.origin, decision.scores
        if origin is not None and decision.keep is not None:  # what stays against the method's word stands for itself
            slots = torch.arange(origin.shape[1], device=origin.device)
            origin = torch.where(active & ~decision.keep.to(active.device), slots, origin)
        place, scores = self.places.get(stage, stage), None if scores is None else scores.detach()
        self.trace.records.append(StageRecord(place, active, origin, scores))

    def release(self) -> None:
        """The last stage is done: let go of what was read in the vision tower."""
        self._patches, self._project = None, None
        if self.vision is not None:
            self.vision.clear()

    def _seen(self, hidden: Tensor) -> tuple[dict[int, Patches], Callable[[Tensor], Tensor] | None]:
        """What was read in the vision tower, aligned once per pass, and the projector if single features have one."""
        if self.vision is not None and self._patches is None:
            self._patches = self.vision.patches(self.visual, self.info)
            self._project = self.vision.projector(self._patches, hidden) if BEFORE_LAYERS in self.due else None
        return self._patches or {}, self._project
