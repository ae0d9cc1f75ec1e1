"""How the patches of a vision tower become the visual tokens of a prompt, family by family.

A tower sees patches: in a batch of equal squares (CLIP, SigLIP, InternVL), or in one stream over all images (Qwen-VL,
Pixtral), there possibly sorted by windows. A model may then merge several patches into one token, pool the frames of a
video, and unpad and pack the tiles of an image.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...reduction import UnsupportedError

if TYPE_CHECKING:
    from .parts import Anatomy

__all__ = [
    "TowerPlan", "check_feature_layer", "check_traceable", "class_token_last", "is_stream", "merge_side", "pack",
    "plan_tower", "resampler", "shaped", "square_plan", "tiles_of",
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
_SHAPES = {
    "lfm2_vl": "spatial_shapes", "minicpm_ocr": "target_sizes", "minicpmv4_6": "target_sizes",
    "minicpmv4_7": "target_sizes", "nemotron_h_omni": "image_grid_hw",
}  # fmt: skip
"""Families that are told the height and width of each image in patches, which lie row by row, and under which name."""
_PADDED = {"lfm2_vl"}
"""Of these, those whose tower sees a batch of rows as long as the longest image."""
_MIXES = {
    "deepseek_ocr2": "an encoder with queries of its own", "lfm3_vl": "overlapping windows",
    "step3p7": "overlapping convolutions",
}  # fmt: skip
"""Families whose visual tokens overlap, or see all patches, by something that no name in the model tells."""
_LOCAL_ATTENTION = {"molmo2"}
"""Families whose connector attends within the patches of one visual token only."""
_CLASS_TOKEN_LAST = {"llama4"}
"""Families whose tower has its class token after the patches."""
_CONNECTORS = ("projector", "connector", "resampler", "perceiver", "qformer", "abstractor", "image_to_text_projection")


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


def resampler(anatomy: Anatomy) -> str | None:
    """What mixes patches between tower and decoder, so that no visual token is made of some of them; None: nothing."""
    kind = getattr(anatomy.config, "model_type", "")
    if kind in _MIXES or kind in _LOCAL_ATTENTION:
        return _MIXES.get(kind)
    elsewhere = [root for root in (anatomy.vision, anatomy.decoder) if root is not None]
    inside = {id(module) for root in elsewhere for module in root.modules()}
    for name, module in anatomy.base.named_modules():
        connects = any(word in name for word in _CONNECTORS) and "audio" not in name
        if connects and id(module) not in inside and "attention" in type(module).__name__.lower():
            return type(module).__name__
    return None


def class_token_last(anatomy: Anatomy) -> bool:
    """Whether the class token of the tower, if it has one, stands after the patches."""
    return getattr(anatomy.config, "model_type", "") in _CLASS_TOKEN_LAST


def check_traceable(anatomy: Anatomy) -> None:
    """Refuse models of which no visual token can be traced back to patches.

    Raises:
        UnsupportedError: names what mixes the patches.
    """
    mixer = anatomy.resampler
    if mixer is not None:
        raise UnsupportedError(
            f"{type(anatomy.model).__name__} resamples the tower's patches ({mixer}): visual tokens are not made of "
            "patches of their own, so a method cannot choose between them by what it reads in the tower"
        )


def check_feature_layer(anatomy: Anatomy, info: dict[str, Any]) -> None:
    """Refuse a call that takes its features from other layers than the configuration says.

    Raises:
        UnsupportedError: names both.
    """
    given = info.get("vision_feature_layer")
    if given is not None and anatomy.counted_from_end(given) != anatomy.feature_layers:
        raise UnsupportedError(
            f"the model was called with vision_feature_layer={given}, but its configuration says "
            f"{anatomy.feature_layers}; set it there before foveate.apply"
        )


def is_stream(anatomy: Anatomy, info: dict[str, Any], video: bool = False) -> bool:
    """Whether the tower sees all images of a call end to end, in place of a batch of squares."""
    pixtral = getattr(getattr(anatomy.vision, "config", None), "model_type", "") == "pixtral"
    kind = getattr(anatomy.config, "model_type", "")
    return pixtral or _grids(info, video) is not None or kind in _SHAPES.keys() - _PADDED


def plan_tower(anatomy: Anatomy, blocks: int, tokens: int, info: dict[str, Any], video: bool) -> TowerPlan:
    """How what one call of the vision encoder computed became visual tokens.

    Args:
        anatomy: of the model.
        blocks: images, tiles or frames that the tower saw; 1 for a stream.
        tokens: of each, class token excluded.
        info: what the model was called with.
        video: the call encoded videos.

    Raises:
        UnsupportedError: the tokens of the tower cannot be told apart.
    """
    grids = _grids(info, video)
    if grids is not None:
        plan = _stream_plan(anatomy, grids, info.get("video_merge_sizes" if video else "image_merge_sizes"))
        return _compressed(plan, info.get("video_compression_mask")) if video else plan
    kind = "video" if video else "image"
    if f"{kind}_token_pooling" in info:
        return _tabled_plan(info[f"{kind}_token_pooling"], _molmo_sizes(info[f"{kind}_grids"]))
    if f"{kind}_position_ids" in info:
        return _positioned_plan(info[f"{kind}_position_ids"], anatomy.vision_config.pooling_kernel_size)
    shapes = _SHAPES.get(getattr(anatomy.config, "model_type", ""))
    if shapes is not None:
        return _shaped_plan(anatomy, info.get(f"{shapes}_videos" if video else shapes), tokens)
    if video:
        return _video_plan(anatomy, blocks, tokens, info)
    if is_stream(anatomy, info):
        return _pixtral_plan(anatomy, info["image_sizes"])
    return square_plan(anatomy, blocks, tokens, info)


def _grids(info: dict[str, Any], video: bool) -> Tensor | None:
    return info.get("video_grid_thw" if video else "image_grid_thw")


# ------------------------------------------------------------------------------------------------- batches of squares
def _grouped(part: Tensor, height: int, width: int, step: int) -> Tensor:
    """Mean over step x step neighbours of row-major grids: (I, height * width, ...) -> (I * h * w / step^2, ...)."""
    if step == 1:
        return part.reshape(-1, *part.shape[2:])
    part = part.reshape(part.shape[0], height // step, step, width // step, step, *part.shape[2:])
    return part.mean((2, 4)).flatten(0, 2)


def square_plan(anatomy: Anatomy, blocks: int, tokens: int, info: dict[str, Any]) -> TowerPlan:
    """Blocks of equal squares, possibly pooled (InternVL, Idefics, Gemma 3) or packed (LLaVA-NeXT)."""
    if hasattr(anatomy.base, "pack_image_features"):
        return _packed_plan(anatomy, blocks, tokens, info)
    # Idefics hands over one tensor for each row, all its images and tiles in it: count them all.
    features = info.get("image_features")
    lengths = [] if features is None else [part.shape[:-1].numel() for part in features]
    per_block = sum(lengths) // blocks if lengths and sum(lengths) % blocks == 0 else tokens
    return _pooled_plan(blocks, tokens, per_block)


def _pooled_plan(blocks: int, tokens: int, per_block: int) -> TowerPlan:
    side = math.isqrt(tokens)
    step = math.isqrt(tokens // per_block) if per_block else 0
    if side * side != tokens or not step or step * step * per_block != tokens or side % step:
        raise UnsupportedError(f"{tokens} patches became {per_block} visual tokens in a way that cannot be followed")
    index = torch.arange(blocks * per_block).view(blocks, per_block)
    grid = torch.full((blocks, 2), side // step)
    return TowerPlan(lambda x: _grouped(x, side, side, step), index, None, blocks * per_block, grid)


def _video_plan(anatomy: Anatomy, blocks: int, tokens: int, info: dict[str, Any]) -> TowerPlan:
    """Frames as squares, pooled one by one: LLaVA-NeXT-Video, LLaVA-OneVision (a newline slot after each video)."""
    features, kind = info.get("video_features"), type(anatomy.model).__name__
    if features is None:
        raise UnsupportedError(f"{kind}: the features of its videos were not seen")
    lengths = [part.shape[:-1].numel() for part in features]
    if hasattr(anatomy.base, "apply_pooling"):
        return _interpolated_plan(blocks, tokens, lengths, kind)
    total = sum(lengths)
    if not blocks or total % blocks:
        raise UnsupportedError(f"{kind}: {blocks} frames of videos became {total} visual tokens")
    if total == blocks * (tokens + 1):  # Video-LLaVA: the class token of a frame is a visual token, too
        plan = _pooled_plan(blocks, tokens, tokens)
        places = torch.arange(total).view(blocks, -1)[:, 1:]
        return replace(plan, feature=places.flatten(), features=total)
    return _pooled_plan(blocks, tokens, total // blocks)


def _interpolated_plan(blocks: int, tokens: int, lengths: list[int], kind: str) -> TowerPlan:
    """LLaVA-OneVision: each frame resized to half its sides, as the model resizes its features."""
    side = math.isqrt(tokens)
    short = -(-side // 2)
    per_frame = short * short
    frames = [(length - 1) // per_frame for length in lengths]
    if side * side != tokens or sum(frames) != blocks or any((n - 1) % per_frame for n in lengths):
        raise UnsupportedError(f"{kind}: {blocks} frames of videos became {sum(lengths)} visual tokens")

    def shrink(part: Tensor) -> Tensor:
        rest = part.shape[2:]
        picture = part.float().reshape(part.shape[0], side, side, -1).permute(0, 3, 1, 2)
        picture = interpolate(picture, size=(short, short), mode="bilinear").permute(0, 2, 3, 1)
        return picture.reshape(-1, *rest).to(part.dtype)

    index = torch.arange(blocks * per_frame).view(blocks, per_frame)
    newlines = torch.arange(len(frames)).repeat_interleave(torch.tensor(frames) * per_frame)
    feature = torch.arange(blocks * per_frame) + newlines  # each video's newline slot follows its last frame
    return TowerPlan(shrink, index, feature, sum(lengths), torch.full((blocks, 2), short))


# ---------------------------------------------------------------------------------------- LLaVA-NeXT's tiles, packed
def tiles_of(anatomy: Anatomy, info: Any) -> list[int]:
    """Tiles of each image, its base included. LLaVA-OneVision leaves images whole if a prompt has several."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    sizes = torch.as_tensor(info["image_sizes"]).tolist()
    counts = info.get("batch_num_images")
    counts = [1] * len(sizes) if counts is None else torch.as_tensor(counts).tolist()
    cut = [count == 1 for count in counts for _ in range(count)]
    pinpoints, side = anatomy.config.image_grid_pinpoints, anatomy.vision_config.image_size
    return [image_size_to_num_patches(size, pinpoints, side) if c else 1 for size, c in zip(sizes, cut)]


def pack(anatomy: Anatomy, patches: list[Tensor], sizes: list[list[int]]) -> list[Tensor]:
    """The model's own packing, run on numbers: every rounding in it is the model's.

    Args:
        anatomy: of the model.
        patches: per image (tiles, N, 1), numbers of patches >= 0.
        sizes: (height, width) of each image in pixels.

    Returns:
        Per image (features,): the number shown by each visual feature, -1 for a newline.
    """
    base = anatomy.base
    options: dict[str, Any] = {"image_newline": torch.full((1,), -1.0, dtype=patches[0].dtype)}
    accepted = inspect.signature(base.pack_image_features).parameters
    if "vision_feature_select_strategy" in accepted:
        options["vision_feature_select_strategy"] = "full"  # only asked for a warning
    if "vision_aspect_ratio" in accepted:
        options["vision_aspect_ratio"] = anatomy.config.vision_aspect_ratio
    packed, _ = base.pack_image_features(patches, sizes, **options)
    return [part.reshape(-1) for part in packed]


def _packed_plan(anatomy: Anatomy, blocks: int, tokens: int, info: dict[str, Any]) -> TowerPlan:
    """LLaVA-NeXT, LLaVA-OneVision: base image, then the unpadded mosaic of its tiles."""
    tiles = tiles_of(anatomy, info)
    if sum(tiles) != blocks:
        raise UnsupportedError(f"{blocks} tiles were encoded, but the image sizes ask for {sum(tiles)}")
    numbers = torch.arange(blocks * tokens, dtype=torch.double).view(blocks, tokens, 1)  # on the CPU
    packed = torch.cat(pack(anatomy, list(numbers.split(tiles)), torch.as_tensor(info["image_sizes"]).tolist()))
    if bool((packed != packed.round()).any()):
        raise UnsupportedError("the tiles of an image were resized after the tower; lower the image's resolution")
    feature = torch.full((blocks * tokens,), -1)
    shown = packed >= 0
    feature[packed[shown].long()] = shown.nonzero()[:, 0]
    side = math.isqrt(tokens)
    index = torch.arange(blocks * tokens).view(blocks, tokens)
    grid = torch.full((blocks, 2), side)
    return TowerPlan(lambda x: x.reshape(-1, *x.shape[2:]), index, feature, len(packed), grid)


# -------------------------------------------------------------------------------------------------------- streams
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


def _stream_plan(anatomy: Anatomy, grids: Tensor, merges: Any = None) -> TowerPlan:
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
            return torch.cat([_grouped(image[None], h, w, merge) for image, (h, w) in zip(images, frames)])
        part = part[0].reshape(-1, merge * merge, *part.shape[2:]).mean(1)
        return part if order is None else part[order.to(part.device)]

    index = _blocks([h * w for h, w in sizes])
    return TowerPlan(join, index, None, sum(h * w for h, w in sizes), torch.tensor(sizes))


def shaped(anatomy: Anatomy, info: dict[str, Any], slots: int) -> list[tuple[int, int]]:
    """Height and width in visual tokens of each tile of LFM2-VL and MiniCPM-V, which fill `slots` slots in all."""
    shapes = info[_SHAPES[anatomy.config.model_type]]
    step = math.isqrt(int(torch.as_tensor(shapes).prod(1).sum()) // slots)
    return [(h // step, w // step) for h, w in torch.as_tensor(shapes).tolist()]


def _shaped_plan(anatomy: Anatomy, shapes: Tensor | None, tokens: int) -> TowerPlan:
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
    padded = getattr(config, "model_type", "") in _PADDED

    def join(part: Tensor) -> Tensor:
        images = list(part) if padded else part[0].split([h * w + extra for h, w in sizes])
        grids = [image[extra : extra + h * w] for image, (h, w) in zip(images, sizes)]
        return torch.cat([_grouped(grid[None], h, w, step) for grid, (h, w) in zip(grids, sizes)])

    merged = [(h // step, w // step) for h, w in sizes]
    index = _blocks([h * w for h, w in merged])
    return TowerPlan(join, index, None, sum(h * w for h, w in merged), torch.tensor(merged))


def _positioned_plan(positions: Tensor, step: int) -> TowerPlan:
    """Gemma 4: positions (..., N, 2) say where a patch lies, (x, y), and -1 that it is padding."""
    tables, sizes = [], []
    for number, places in enumerate(positions.cpu().flatten(0, -3)):
        there = (places >= 0).all(1).nonzero()[:, 0]
        x, y = (places[there] // step).unbind(1)
        width, height = int(x.max()) + 1, int(y.max()) + 1
        order = there[torch.argsort(y * width + x, stable=True)]
        tables.append(order.view(height * width, step * step) + number * places.shape[0])
        sizes.append((height, width))
    return _tabled_plan(torch.cat(tables), sizes)


def _molmo_sizes(grids: Tensor) -> list[tuple[int, int]]:
    """Molmo 2: an image is seen whole, then cut into crops that overlap; of a video, every frame."""
    if grids.shape[1] == 3:
        return [(h, w) for frames, h, w in grids.tolist() for _ in range(frames)]
    return [(h, w) for row in grids.tolist() for h, w in (row[:2], row[2:]) if h * w]


def _tabled_plan(table: Tensor, sizes: list[tuple[int, int]]) -> TowerPlan:
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


def _compressed(plan: TowerPlan, shown: Tensor | None) -> TowerPlan:
    """The same where only some of the features, a mask, became visual tokens: VideoLLaMA 3."""
    if shown is None or len(shown) != plan.features:
        return plan
    return replace(plan, feature=torch.where(shown, shown.cumsum(0) - 1, -1), features=int(shown.sum()))


def _pixtral_plan(anatomy: Anatomy, image_sizes: Tensor) -> TowerPlan:
    """Pixtral: images row by row, one after the other, at their own size."""
    step = getattr(anatomy.config, "spatial_merge_size", None) or 1
    patch = anatomy.vision_config.patch_size
    sizes = [(h // patch, w // patch) for h, w in torch.as_tensor(image_sizes).tolist()]

    def join(part: Tensor) -> Tensor:
        images = part[0].split([h * w for h, w in sizes])
        return torch.cat([_grouped(image[None], h, w, step) for image, (h, w) in zip(images, sizes)])

    merged = [(h // step, w // step) for h, w in sizes]
    index = _blocks([h * w for h, w in merged])
    return TowerPlan(join, index, None, sum(h * w for h, w in merged), torch.tensor(merged))


def _blocks(lengths: list[int]) -> Tensor:
    """Rows of a concatenation as a padded index: (blocks, longest), -1 for padding."""
    columns = torch.arange(max(lengths))
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    return torch.where(columns < torch.tensor(lengths)[:, None], starts[:, None] + columns, -1)
