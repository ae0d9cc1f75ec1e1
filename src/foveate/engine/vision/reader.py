"""Reading the vision tower: what a method asks to see of it, laid out by the visual slots of the prompt.

Which patches a visual token is made of is known to `families.tower`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...ops.attention import attention_received, attention_rows
from ...ops.host import to_device, to_host
from ...reduction import Patches, UnsupportedError, VisionSpec
from ..decoder.taps import tap_attention
from ..families.layout_inputs import modality, on_host
from ..families.parts import Anatomy
from ..families.streams import TowerPlan
from ..families.tower import check_feature_layer, check_traceable, class_token_last, is_stream, plan_tower
from ..families.tower_layers import attention_modules, layer_of
from ..stopwatch import deciding
from ..undo import Shared, Undo

__all__ = ["VisionReader"]

_QUANTITIES = ("attention", "key", "query", "features")


@dataclass
class _Reading:
    """One layer's quantities in the order of the tower: lists of (I, n, ...) over its calls."""

    parts: dict[str, list[Tensor]] = field(default_factory=lambda: {name: [] for name in _QUANTITIES})

    def add(self, name: str, value: Tensor) -> None:
        self.parts[name].append(value)

    def joined(self, stream: bool) -> dict[str, Tensor]:
        """(I, N, ...) each; a stream is one block of all tokens."""
        axis = 1 if stream else 0
        return {n: parts[0] if len(parts) == 1 else torch.cat(parts, axis) for n, parts in self.parts.items() if parts}


class VisionReader(Shared):
    """Listens to the tower's layers named in `specs`. What was read belongs to the thread that ran the tower.

    Raises:
        UnsupportedError: no such layer, or a CLS token was asked for where there is none.
    """

    def __init__(self, anatomy: Anatomy, specs: dict[int, VisionSpec]):
        self.anatomy, self.specs = anatomy, specs
        self.has_cls = any(name.endswith(("class_embedding", "cls_token")) for name, _ in anatomy.vision_parameters())
        self._last = class_token_last(anatomy)
        self._local = threading.local()
        self._project: Callable[[Tensor], Tensor] | None = None
        self._project_checked = False

    def install(self, undo: Undo) -> None:
        """Put the taps and hooks in, until `undo` is closed."""
        check_traceable(self.anatomy)
        self.anatomy.vision_attention()  # or the reason why there is none
        for tower, (layer, spec) in itertools.product(self.anatomy.towers, self.specs.items()):
            modules = attention_modules(tower)
            if not -len(modules) <= layer < len(modules):
                raise UnsupportedError(f"vision layer {layer} does not exist, the tower has {len(modules)} layers")
            if spec.attention == "cls" and not self.has_cls:
                raise UnsupportedError(
                    f"{type(self.anatomy.vision).__name__} has no CLS token to read; use attention='received' or 'auto'"
                )
            attention = modules[layer]
            if spec.attention or spec.key or spec.query:
                tap_attention(undo, attention, functools.partial(self._attending, layer, spec))
            if spec.features:
                undo.hook(layer_of(tower, attention), functools.partial(self._leaving, layer))

    def clear(self) -> None:
        """Forget what this thread has read: the call is over."""
        self._local.video, self._local.readings = False, {}

    @property
    def _readings(self) -> dict[tuple[bool, int], _Reading]:
        """Of this thread, by (whether videos were encoded, layer)."""
        if not hasattr(self._local, "readings"):
            self.clear()
        return self._local.readings

    def begin(self, video: bool) -> None:
        """Images, or videos, are about to be encoded: forget earlier ones."""
        kept = {key: reading for key, reading in self._readings.items() if key[0] != video}
        self._local.video, self._local.readings = video, kept

    # ------------------------------------------------------------------------------------------------ listening
    def _reading(self, layer: int) -> _Reading:
        readings = self._readings
        return readings.setdefault((self._local.video, layer), _Reading())

    @deciding
    def _attending(
        self,
        layer: int,
        spec: VisionSpec,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Any,
        kwargs: dict[str, Any],
    ) -> None:
        reading = self._reading(layer)
        if spec.key:
            reading.add("key", key.transpose(1, 2))
        if spec.query:
            reading.add("query", query.transpose(1, 2))
        if spec.attention:
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            reading.add("attention", self._weights(spec, query, key, mask, scaling, kwargs).transpose(1, 2))

    def _weights(
        self, spec: VisionSpec, query: Tensor, key: Tensor, mask: Any, scaling: float, kwargs: dict[str, Any]
    ) -> Tensor:
        if spec.attention != "received" and self.has_cls:
            asking = torch.full_like(query[:, 0, :1, 0], query.shape[2] - 1 if self._last else 0, dtype=torch.long)
            return attention_rows(query, key, asking, None, None, scaling, None)[:, :, 0]
        ends = kwargs.get("cu_seq_lens_q")
        if ends is None:
            return attention_received(
                query, key, scaling, mask if isinstance(mask, Tensor) and mask.dim() == 4 else None
            )
        # FlashAttention is handed all images, or windows, end to end.
        lengths = ends.diff().tolist()
        pairs = zip(query.split(lengths, dim=2), key.split(lengths, dim=2))
        return torch.cat([attention_received(q, k, scaling) for q, k in pairs], dim=2)

    def _leaving(self, layer: int, module: nn.Module, args: tuple, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self._reading(layer).add("features", hidden if hidden.dim() == 3 else hidden[None])

    # -------------------------------------------------------------------------------------------------- aligning
    def patches(self, visual: Tensor, info: dict[str, Any]) -> dict[int, Patches]:
        """What was read, by layer, aligned with the visual slots (B, S).

        Raises:
            UnsupportedError: the tokens of the tower cannot be told apart from here.
        """
        if not self._readings:
            return {}
        check_feature_layer(self.anatomy, info)
        device, (visual, info) = visual.device, on_host(visual, info)
        kinds = sorted({video for video, _ in self._readings})
        slots = dict(zip((False, True), modality(self.anatomy, visual, info))) if len(kinds) > 1 else {kinds[0]: visual}
        out: dict[int, list[Patches]] = {}
        laid: dict[bool, tuple[TowerPlan, Patches]] = {}
        for (video, layer), reading in self._readings.items():
            if len(kinds) > 1 and not bool(slots[video].any()):
                continue  # of an earlier prompt
            stream = is_stream(self.anatomy, info, video)
            parts = reading.joined(stream)
            cls = {}
            if self.has_cls and not stream:
                at, patches = (-1, slice(None, -1)) if self._last else (0, slice(1, None))
                cls = {name: value[:, at] for name, value in parts.items()}
                parts = {name: value[:, patches] for name, value in parts.items()}
            blocks, tokens = next(iter(parts.values())).shape[:2]
            if video not in laid:
                plan = plan_tower(self.anatomy, blocks, tokens, info, video)
                laid[video] = plan, lay(plan, slots[video], device)
            out.setdefault(layer, []).append(fill(*laid[video], parts, cls))
        return {layer: _joined(found) for layer, found in out.items()}

    def projector(self, patches: dict[int, Patches], hidden: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The model's projector on single features, if a visual token is the projection of one patch; else None.

        Found out once, by comparing: nothing about the family is assumed.
        """
        if self._project_checked:
            return self._project
        module = getattr(self.anatomy.base, "multi_modal_projector", None)
        read = next((p for p in patches.values() if p.features is not None), None)
        if module is None or read is None or read.features is None:
            return None
        rows, places = to_host(read.rows, read.slots)
        block, token = (int(i[0]) for i in (places >= 0).nonzero())
        row, slot = int(rows[block]), int(places[block, token])
        found, entered = None, hidden[row, slot].float()
        with contextlib.suppress(RuntimeError, TypeError, ValueError), torch.no_grad():
            projected = module(read.features[block, token][None, None])[0, 0]
            # Half precision differs by more than an element-wise comparison would allow.
            if projected.shape == entered.shape and (projected.float() - entered).norm() <= 0.02 * entered.norm():
                found = module
        # In this order: another thread that sees it checked must see what was found.
        self._project, self._project_checked = found, True
        return found


def lay(plan: TowerPlan, visual: Tensor, device: torch.device) -> Patches:
    """Where the patches of a plan are in visual slots (B, S), which are on the CPU; the result is on `device`."""
    index, filled = plan.index.cpu(), int(visual.sum())
    copies = filled // plan.features if plan.features else 0
    if copies * plan.features != filled or not copies or visual.shape[0] % copies:
        raise UnsupportedError(f"{plan.features} visual features were read, but the prompt has {filled} visual slots")
    rows, slots = [], []
    for copy in range(copies):  # beams and return sequences repeat each row, but the images were encoded once
        places = visual[copy::copies].nonzero()
        row, slot = places[:, 0] * copies + copy, places[:, 1]
        if plan.feature is not None:
            feature = plan.feature.cpu()
            row, slot = row[feature.clamp_min(0)], torch.where(feature >= 0, slot[feature.clamp_min(0)], -1)
        laid = torch.where(index >= 0, slot[index.clamp_min(0)], -1)
        rows.append(torch.where(laid >= 0, row[index.clamp_min(0)], -1).amax(1))
        slots.append(laid)
    row, slot = torch.cat(rows), torch.cat(slots)
    complete = int((slot >= 0).sum()) == filled
    grid = plan.grid.to(device) if plan.grid.device.type != "cpu" else to_device(plan.grid, device)
    return Patches(
        to_device(row, device), to_device(slot, device), _repeated(grid, len(row) // len(index)), complete=complete
    )


def fill(plan: TowerPlan, places: Patches, parts: dict[str, Tensor], cls: dict[str, Tensor]) -> Patches:
    """The same patches with what the tower computed of them."""
    device, index, copies = places.slots.device, plan.index.cpu(), len(places.slots) // len(plan.index)
    whole = bool((index.flatten() == torch.arange(index.numel())).all())  # the order of the tower, without padding
    missing = None if whole or bool((index >= 0).all()) else to_device(index < 0, device)
    there = None if whole else to_device(index.clamp_min(0), device)
    values: dict[str, Any] = {}
    for name, part in parts.items():
        merged = plan.merge(part).to(device)
        value = merged.unflatten(0, index.shape) if there is None else merged[there]
        if missing is not None:
            value = value.masked_fill(missing.view(*index.shape, *([1] * (value.dim() - 2))), 0)
        values[name] = _repeated(value, copies)
    if "attention" in values:
        values["attention"] = values["attention"].transpose(1, 2)
    extra: dict[str, Any] = {f"cls_{n}": _repeated(v.to(device), copies) for n, v in cls.items() if n != "attention"}
    return replace(places, **values, **extra)


def _repeated(value: Tensor, copies: int) -> Tensor:
    return value if copies == 1 else value.repeat(copies, *([1] * (value.dim() - 1)))


def _joined(found: list[Patches]) -> Patches:
    """Images and videos of one layer as one: blocks one after the other, the shorter ones padded."""
    if len(found) == 1:
        return found[0]
    longest = max(part.slots.shape[1] for part in found)

    def padded(name: str, axis: int, value: float) -> Tensor | None:
        parts = [getattr(part, name) for part in found]
        if any(part is None for part in parts):
            return None
        missing = [(0, 0) * (part.dim() - 1 - axis) + (0, longest - part.shape[axis]) for part in parts]
        return torch.cat([pad(part, room, value=value) for part, room in zip(parts, missing)])

    def whole(name: str) -> Any:
        parts = [getattr(part, name) for part in found]
        return None if parts[0] is None else torch.cat(parts)

    slots = padded("slots", 1, -1)
    assert slots is not None
    return Patches(
        whole("rows"), slots, whole("grid"), padded("attention", 2, 0), padded("key", 1, 0), padded("query", 1, 0),
        padded("features", 1, 0), whole("cls_key"), whole("cls_query"), whole("cls_features"),
        all(part.complete for part in found),
    )  # fmt: skip
