"""Images of several sizes, whose patches a vision tower sees end to end: in which order, and what becomes one token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...reduction import UnsupportedError

if TYPE_CHECKING:
    from .parts import Anatomy

__all__ = [
    "PADDED", "SHAPES", "TowerPlan", "compressed", "grouped", "merge_side", "molmo_sizes", "pixtral_plan",
    "positioned_plan", "shaped", "shaped_plan", "stream_plan", "tabled_plan",
]  # fmt: skip

_ROW_MAJOR = {"kimi_k25", "muse_glimmer", "muse_spark", "paddleocr_vl"}
"""Streams in which an image's patches lie row by row."""
_WINDOWS_OF_PATCHES = {"muse_glimmer", "muse_spark"}
"""Of these, towers that sort single patches by windows and sort them back at their end."""
_GROUPED = {
    "cohere_compass", "cosmos3_edge", "cosmos3_omni", "dots3_note", "ernie4_5_vl_moe", "exaone4_5", "glm46v", "glm4v",
    "glm4v_moe", "glm5_next", "glm_ocr", "hyperclovax_vision_v2", "minimax_m3_vl", "qwen2_5_omni_thinker", "qwen2_5_vl",
    "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_omni_moe_thinker", "qwen3_vl_moe", "qwen4_exp",
    "video_llama_3",
}  # fmt: skip
"""Streams in which the patches that will merge follow each other, as Qwen-VL's processor lays them."""
SHAPES = {
    "lfm2_vl": "spatial_shapes", "minicpm_ocr": "target_sizes", "minicpmv4_6": "target_sizes",
    "minicpmv4_7": "target_sizes", "nemotron_h_omni": "image_grid_hw",
}  # fmt: skip
"""Families that are told the height and width of each image in patches, which lie row by row, and under which name."""
PADDED = {"lfm2_vl"}
"""Of these, those whose tower sees a batch of rows as long as the longest image."""


@dataclass
class TowerPlan:
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


def grouped(part: Tensor, height: int, width: int, step: int) -> Tensor:
    """Mean over step x step neighbours of row-major grids: (I, height * width, ...) -> (I * h * w / step^2, ...)."""
    if step == 1:
        return part.reshape(-1, *part.shape[2:])
    part = part.reshape(part.shape[0], height // step, step, width // step, step, *part.shape[2:])
    return part.mean((2, 4)).flatten(0, 2)


def merge_side(anatomy: Anatomy) -> int | None:
    """Patches along each side of the square that makes one visual token; None where the configuration does not say."""
    for owner, name in ((anatomy.vision_config, "spatial_merge_size"), (anatomy.vision_config, "merge_size"),
                        (anatomy.vision_config, "merge_kernel_size")):  # fmt: skip
        value = getattr(owner, name, None)
        if isinstance(value, list | tuple):
            return int(value[0]) if len(set(value)) == 1 else None
        if value is not None:
            return int(value)
    return None


def stream_plan(anatomy: Anatomy, grids: Tensor, merges: Any = None) -> TowerPlan:
    """Qwen-VL, GLM-4V: merge x merge neighbours follow each other in the stream; windows are sorted back."""
    config, frames = anatomy.vision_config, [(h, w) for t, h, w in grids.tolist() for _ in range(t)]
    merge = merge_side(anatomy)
    if merges is not None:  # VideoLLaMA 3
        given = set(torch.as_tensor(merges).tolist())
        merge = given.pop() if len(given) == 1 else None
    if merge is None:
        raise UnsupportedError(
            f"{type(anatomy.model).__name__}: how many patches make one visual token is not known, or differs"
        )
    order = None
    if getattr(config, "window_size", None) and getattr(config, "fullatt_block_indexes", None) is not None:
        from transformers.vision_utils import get_vision_window_index

        windows, _ = get_vision_window_index(grids, merge, config.window_size, config.patch_size)
        order = torch.argsort(windows)
    kind, back = getattr(anatomy.config, "model_type", ""), None
    if kind in _WINDOWS_OF_PATCHES:
        from transformers.vision_utils import get_vision_window_index

        windows, _ = get_vision_window_index(grids, 1, config.pos_emb_height * config.patch_size, config.patch_size)
        back = torch.argsort(windows)
    if kind not in _ROW_MAJOR | _GROUPED and merge > 1:
        raise UnsupportedError(
            f"in which order {kind!r} models lay the patches of a visual token is not known; use a method that does "
            "not read the vision tower"
        )
    sizes = [(h // merge, w // merge) for h, w in frames]

    def join(part: Tensor) -> Tensor:
        if back is not None:
            part = part[:, back.to(part.device)]
        if kind in _ROW_MAJOR:
            images = part[0].split([h * w for h, w in frames])
            return torch.cat([grouped(image[None], h, w, merge) for image, (h, w) in zip(images, frames)])
        part = part[0].reshape(-1, merge * merge, *part.shape[2:]).mean(1)
        return part if order is None else part[order.to(part.device)]

    index = _blocks([h * w for h, w in sizes])
    return TowerPlan(join, index, None, sum(h * w for h, w in sizes), torch.tensor(sizes))


def shaped(anatomy: Anatomy, info: dict[str, Any], slots: int) -> list[tuple[int, int]]:
    """Height and width in visual tokens of each tile of LFM2-VL and MiniCPM-V, which fill `slots` slots in all."""
    shapes = info[SHAPES[anatomy.config.model_type]]
    step = math.isqrt(int(torch.as_tensor(shapes).prod(1).sum()) // slots)
    return [(h // step, w // step) for h, w in torch.as_tensor(shapes).tolist()]


def shaped_plan(anatomy: Anatomy, shapes: Tensor | None, tokens: int) -> TowerPlan:
    """LFM2-VL, MiniCPM-V, Nemotron: images row by row, at their own size, each after the tower's own tokens if any."""
    config, vision = anatomy.config, anatomy.vision_config
    if shapes is None:
        raise UnsupportedError(f"{type(anatomy.model).__name__} was not told the sizes of its images in patches")
    extra = getattr(vision, "num_cls_tokens", 0) + getattr(vision, "num_registers", 0)
    sizes = [(h, w) for h, w in torch.as_tensor(shapes).tolist()]
    if hasattr(config, "merge_kernel_size"):  # MiniCPM-V: the tower may merge in its middle, and the connector often
        step = config.merge_kernel_size[0] ** config.merger_times
        if tokens * 4 == sum(h * w for h, w in sizes):
            sizes = [(h // 2, w // 2) for h, w in sizes]
    elif hasattr(config, "downsample_factor"):
        step = config.downsample_factor
    else:
        step = round(1 / config.downsample_ratio)
    padded = getattr(config, "model_type", "") in PADDED

    def join(part: Tensor) -> Tensor:
        images = list(part) if padded else part[0].split([h * w + extra for h, w in sizes])
        grids = [image[extra : extra + h * w] for image, (h, w) in zip(images, sizes)]
        return torch.cat([grouped(grid[None], h, w, step) for grid, (h, w) in zip(grids, sizes)])

    merged = [(h // step, w // step) for h, w in sizes]
    index = _blocks([h * w for h, w in merged])
    return TowerPlan(join, index, None, sum(h * w for h, w in merged), torch.tensor(merged))


def positioned_plan(positions: Tensor, step: int) -> TowerPlan:
    """Gemma 4: positions (..., N, 2) say where a patch lies, (x, y), and -1 that it is padding."""
    tables, sizes = [], []
    for number, places in enumerate(positions.cpu().flatten(0, -3)):
        there = (places >= 0).all(1).nonzero()[:, 0]
        x, y = (places[there] // step).unbind(1)
        width, height = int(x.max()) + 1, int(y.max()) + 1
        order = there[torch.argsort(y * width + x, stable=True)]
        tables.append(order.view(height * width, step * step) + number * places.shape[0])
        sizes.append((height, width))
    return tabled_plan(torch.cat(tables), sizes)


def molmo_sizes(grids: Tensor) -> list[tuple[int, int]]:
    """Molmo 2: an image is seen whole, then cut into crops that overlap; of a video, every frame."""
    if grids.shape[1] == 3:
        return [(h, w) for frames, h, w in grids.tolist() for _ in range(frames)]
    return [(h, w) for row in grids.tolist() for h, w in (row[:2], row[2:]) if h * w]


def tabled_plan(table: Tensor, sizes: list[tuple[int, int]]) -> TowerPlan:
    """Visual tokens made of the patches that a table (T, k) names, by number through the whole call, -1 for none."""
    table = table[(table >= 0).any(1)]

    def join(part: Tensor) -> Tensor:
        numbers = table.to(part.device)
        there = (numbers >= 0).view(*numbers.shape, *([1] * (part.dim() - 2)))
        return (part.flatten(0, 1)[numbers.clamp_min(0)] * there).sum(1) / there.sum(1)

    index = _blocks([h * w for h, w in sizes])
    if int(index.max()) + 1 != len(table):
        raise UnsupportedError(
            f"{len(table)} visual tokens are made of patches, but the grids say {int(index.max()) + 1}"
        )
    return TowerPlan(join, index, None, len(table), torch.tensor(sizes))


def compressed(plan: TowerPlan, shown: Tensor | None) -> TowerPlan:
    """The same where only some of the features, a mask, became visual tokens: VideoLLaMA 3."""
    if shown is None or len(shown) != plan.features:
        return plan
    return replace(plan, feature=torch.where(shown, shown.cumsum(0) - 1, -1), features=int(shown.sum()))


def pixtral_plan(anatomy: Anatomy, image_sizes: Tensor) -> TowerPlan:
    """Pixtral: images row by row, one after the other, at their own size."""
    step = getattr(anatomy.config, "spatial_merge_size", None) or 1
    patch = anatomy.vision_config.patch_size
    sizes = [(h // patch, w // patch) for h, w in torch.as_tensor(image_sizes).tolist()]

    def join(part: Tensor) -> Tensor:
        images = part[0].split([h * w for h, w in sizes])
        return torch.cat([grouped(image[None], h, w, step) for image, (h, w) in zip(images, sizes)])

    merged = [(h // step, w // step) for h, w in sizes]
    index = _blocks([h * w for h, w in merged])
    return TowerPlan(join, index, None, sum(h * w for h, w in merged), torch.tensor(merged))


def _blocks(lengths: list[int]) -> Tensor:
    """Rows of a concatenation as a padded index: (blocks, longest), -1 for padding."""
    columns = torch.arange(max(lengths))
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    return torch.where(columns < torch.tensor(lengths)[:, None], starts[:, None] + columns, -1)
