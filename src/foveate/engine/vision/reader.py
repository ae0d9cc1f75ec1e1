"""Reading the vision tower, and which of its patches became which visual token of the prompt.

A tower sees patches: in a batch of equal squares (CLIP, SigLIP, InternVL), or in one stream over all images (Qwen-VL,
Pixtral), there possibly sorted by windows. A model may then merge several patches into one token, and may unpad and
pack the tiles of an image. `VisionReader` undoes all of it, so that a method finds its scores by prompt slot.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.attention import attention_received, attention_rows
from ...reduction import Patches, UnsupportedError, VisionSpec
from ..decoder.taps import tap_attention
from ..families.parts import Anatomy
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
        return {name: torch.cat(parts, 1 if stream else 0) for name, parts in self.parts.items() if parts}


class VisionReader(Shared):
    """Listens to the tower's layers named in `specs`. What was read belongs to the thread that ran the tower.

    Raises:
        UnsupportedError: no such layer, or a CLS token was asked for where there is none.
    """

    def __init__(self, anatomy: Anatomy, specs: dict[int, VisionSpec]):
        self.anatomy, self.specs = anatomy, specs
        self.has_cls = any(name.endswith(("class_embedding", "cls_token")) for name, _ in anatomy.vision_parameters())
        self._local = threading.local()
        self._project: Callable[[Tensor], Tensor] | None = None
        self._project_checked = False

    def install(self, undo: Undo) -> None:
        """Put the taps and hooks in, until `undo` is closed."""
        modules = self.anatomy.vision_attention()
        for layer, spec in self.specs.items():
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
                undo.hook(self.anatomy.parent(attention), functools.partial(self._leaving, layer))

    def clear(self) -> None:
        """Forget what this thread has read: new images are about to be encoded, or the call is over."""
        self._local.readings = {}

    @property
    def _readings(self) -> dict[int, _Reading]:
        if not hasattr(self._local, "readings"):
            self.clear()
        return self._local.readings

    # ------------------------------------------------------------------------------------------------ listening
    def _reading(self, layer: int) -> _Reading:
        return self._readings.setdefault(layer, _Reading())

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
            first = query.new_zeros(query.shape[0], 1, dtype=torch.long)
            return attention_rows(query, key, first, None, None, scaling, None)[:, :, 0]
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
        grids = info.get("image_grid_thw") if info.get("image_grid_thw") is not None else info.get("video_grid_thw")
        stream = grids is not None or self._is_pixtral
        out = {}
        for layer, reading in self._readings.items():
            parts = reading.joined(stream)
            cls = {name: value[:, 0] for name, value in parts.items()} if self.has_cls and not stream else {}
            if cls:
                parts = {name: value[:, 1:] for name, value in parts.items()}
            blocks, tokens = next(iter(parts.values())).shape[:2]
            if grids is not None:
                plan = _stream_plan(self.anatomy, grids)
            elif stream:
                plan = _pixtral_plan(self.anatomy, info["image_sizes"])
            else:
                plan = _square_plan(self.anatomy, blocks, tokens, info)
            out[layer] = _lay(plan, parts, cls, visual)
        return out

    @property
    def _is_pixtral(self) -> bool:
        return getattr(getattr(self.anatomy.vision, "config", None), "model_type", "") == "pixtral"

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
        self._project_checked = True
        block, token = (int(i) for i in read.valid.nonzero()[0])
        row, slot = int(read.rows[block]), int(read.slots[block, token])
        try:
            with torch.no_grad():
                projected = module(read.features[block, token][None, None])[0, 0]
        except (RuntimeError, TypeError, ValueError):
            return None
        entered = hidden[row, slot].float()
        # Half precision differs by more than an element-wise comparison would allow.
        if projected.shape == entered.shape and (projected.float() - entered).norm() <= 0.02 * entered.norm():
            self._project = module
        return self._project


@dataclass
class _Plan:
    """How tokens of the tower become visual tokens.

    Attributes:
        merge: (I, N, ...) in the order of the tower -> (T, ...), one row per visual token (means over its patches).
        index: (blocks, n) long, row of T of each token of a block, -1 for padding.
        feature: (T,) long, place of each token among the features that fill the slots, -1 if it was left out; None if
            they are in order.
        features: number of features that fill the slots.
        grid: (blocks, 2) long.
    """

    merge: Callable[[Tensor], Tensor]
    index: Tensor
    feature: Tensor | None
    features: int
    grid: Tensor


def _lay(plan: _Plan, parts: dict[str, Tensor], cls: dict[str, Tensor], visual: Tensor) -> Patches:
    device = visual.device
    index = plan.index.to(device)
    filled = visual.sum().item()
    copies = int(filled) // plan.features if plan.features else 0
    if copies * plan.features != filled or not copies or visual.shape[0] % copies:
        raise UnsupportedError(
            f"{plan.features} visual features were read, but the prompt has {int(filled)} visual slots"
        )
    rows, slots = [], []
    for copy in range(copies):  # beams and return sequences repeat each row, but the images were encoded once
        places = visual[copy::copies].nonzero()
        row, slot = places[:, 0] * copies + copy, places[:, 1]
        if plan.feature is not None:
            feature = plan.feature.to(device)
            row, slot = row[feature.clamp_min(0)], torch.where(feature >= 0, slot[feature.clamp_min(0)], -1)
        laid = torch.where(index >= 0, slot[index.clamp_min(0)], -1)
        rows.append(torch.where(laid >= 0, row[index.clamp_min(0)], -1).amax(1))
        slots.append(laid)
    values = {}
    for name, part in parts.items():
        merged = plan.merge(part).to(device)
        value = merged[index.clamp_min(0)]
        value = value.masked_fill((index < 0).reshape(*index.shape, *([1] * (value.dim() - 2))), 0)
        values[name] = value.repeat(copies, *([1] * (value.dim() - 1)))
    if "attention" in values:
        values["attention"] = values["attention"].transpose(1, 2)
    extra = {
        f"cls_{n}": v.to(device).repeat(copies, *([1] * (v.dim() - 1))) for n, v in cls.items() if n != "attention"
    }
    return Patches(torch.cat(rows), torch.cat(slots), plan.grid.to(device).repeat(copies, 1), **values, **extra)


def _grouped(part: Tensor, height: int, width: int, step: int) -> Tensor:
    """Mean over step x step neighbours of row-major grids: (I, height * width, ...) -> (I * h * w / step^2, ...)."""
    if step == 1:
        return part.reshape(-1, *part.shape[2:])
    part = part.reshape(part.shape[0], height // step, step, width // step, step, *part.shape[2:])
    return part.mean((2, 4)).flatten(0, 2)


def _square_plan(anatomy: Anatomy, blocks: int, tokens: int, info: dict[str, Any]) -> _Plan:
    """Blocks of equal squares, possibly pooled (InternVL, Idefics, Gemma 3) or packed (LLaVA-NeXT)."""
    if hasattr(anatomy.base, "pack_image_features"):
        return _packed_plan(anatomy, blocks, tokens, info)
    # Idefics hands over one tensor for each row, all its images and tiles in it: count them all.
    features = info.get("image_features")
    lengths = [] if features is None else [part.shape[:-1].numel() for part in features]
    per_block = sum(lengths) // blocks if lengths and sum(lengths) % blocks == 0 else tokens
    side = math.isqrt(tokens)
    step = math.isqrt(tokens // per_block) if per_block else 0
    if side * side != tokens or not step or step * step * per_block != tokens or side % step:
        raise UnsupportedError(f"{tokens} patches became {per_block} visual tokens in a way that cannot be followed")
    index = torch.arange(blocks * per_block).view(blocks, per_block)
    grid = torch.full((blocks, 2), side // step)
    return _Plan(lambda x: _grouped(x, side, side, step), index, None, blocks * per_block, grid)


def _packed_plan(anatomy: Anatomy, blocks: int, tokens: int, info: dict[str, Any]) -> _Plan:
    """LLaVA-NeXT, LLaVA-OneVision: the model's own packing is run on the numbers of the patches."""
    packed = _pack_numbers(anatomy, blocks, tokens, info)
    if bool((packed != packed.round()).any()):
        raise UnsupportedError("the tiles of an image were resized after the tower; lower the image's resolution")
    feature = torch.full((blocks * tokens,), -1)
    shown = packed >= 0
    feature[packed[shown].long()] = shown.nonzero()[:, 0]
    side = math.isqrt(tokens)
    index = torch.arange(blocks * tokens).view(blocks, tokens)
    return _Plan(lambda x: x.reshape(-1, *x.shape[2:]), index, feature, len(packed), torch.full((blocks, 2), side))


def _pack_numbers(anatomy: Anatomy, blocks: int, tokens: int, info: dict[str, Any]) -> Tensor:
    """Number of the patch that each visual feature shows, (features,) float; -1 for newlines."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    sizes, config = torch.as_tensor(info["image_sizes"]).tolist(), anatomy.config
    counts = torch.as_tensor(info.get("batch_num_images", [1] * len(sizes))).tolist()
    cut = [count == 1 for count in counts for _ in range(count)]  # several images in a prompt are left whole
    pinpoints, side = config.image_grid_pinpoints, anatomy.vision_config.image_size
    tiles = [image_size_to_num_patches(s, pinpoints, side) if c else 1 for s, c in zip(sizes, cut)]
    if sum(tiles) != blocks:
        raise UnsupportedError(f"{blocks} tiles were encoded, but the image sizes ask for {sum(tiles)}")
    numbers = torch.arange(blocks * tokens, dtype=torch.double).view(blocks, tokens, 1)
    options: dict[str, Any] = {"image_newline": torch.full((1,), -1.0, dtype=torch.double)}
    accepted = inspect.signature(anatomy.base.pack_image_features).parameters
    if "vision_feature_select_strategy" in accepted:
        options["vision_feature_select_strategy"] = "full"  # only asked for a warning
    if "vision_aspect_ratio" in accepted:
        options["vision_aspect_ratio"] = config.vision_aspect_ratio
    packed, _ = anatomy.base.pack_image_features(list(numbers.split(tiles)), sizes, **options)
    return torch.cat([part.reshape(-1) for part in packed])


def _stream_plan(anatomy: Anatomy, grids: Tensor) -> _Plan:
    """Qwen-VL, GLM-4V: merge x merge neighbours follow each other in the stream; windows are sorted back."""
    config = anatomy.vision_config
    merge = config.spatial_merge_size
    order = None
    if getattr(config, "window_size", None) and getattr(config, "fullatt_block_indexes", None) is not None:
        from transformers.vision_utils import get_vision_window_index

        windows, _ = get_vision_window_index(grids, merge, config.window_size, config.patch_size)
        order = torch.argsort(windows)
    sizes = [(h // merge, w // merge) for t, h, w in grids.tolist() for _ in range(t)]
    index = _blocks([h * w for h, w in sizes])

    def join(part: Tensor) -> Tensor:
        part = part[0].reshape(-1, merge * merge, *part.shape[2:]).mean(1)
        return part if order is None else part[order.to(part.device)]

    return _Plan(join, index, None, sum(h * w for h, w in sizes), torch.tensor(sizes))


def _pixtral_plan(anatomy: Anatomy, image_sizes: Tensor) -> _Plan:
    """Pixtral: images row by row, one after the other, at their own size."""
    step = getattr(anatomy.config, "spatial_merge_size", None) or 1
    patch = anatomy.vision_config.patch_size
    sizes = [(h // patch, w // patch) for h, w in torch.as_tensor(image_sizes).tolist()]

    def join(part: Tensor) -> Tensor:
        images = part[0].split([h * w for h, w in sizes])
        return torch.cat([_grouped(image[None], h, w, step) for image, (h, w) in zip(images, sizes)])

    merged = [(h // step, w // step) for h, w in sizes]
    return _Plan(join, _blocks([h * w for h, w in merged]), None, sum(h * w for h, w in merged), torch.tensor(merged))


def _blocks(lengths: list[int]) -> Tensor:
    """Rows of a concatenation as a padded index: (blocks, longest), -1 for padding."""
    columns = torch.arange(max(lengths))
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    return torch.where(columns < torch.tensor(lengths)[:, None], starts[:, None] + columns, -1)
