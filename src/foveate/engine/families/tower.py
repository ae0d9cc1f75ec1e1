"""How the patches of a vision tower become the visual tokens of a prompt, family by family.

A tower sees patches: in a batch of equal squares (CLIP, SigLIP, InternVL), or in one stream over all images (Qwen-VL,
Pixtral), there possibly sorted by windows. A model may then merge several patches into one token, pool the frames of a
video, and unpad and pack the tiles of an image.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...reduction import UnsupportedError
from .streams import (
    PADDED,
    SHAPES,
    TowerPlan,
    compressed,
    grouped,
    molmo_sizes,
    pixtral_plan,
    positioned_plan,
    shaped_plan,
    stream_plan,
    tabled_plan,
)  # fmt: skip

if TYPE_CHECKING:
    from .parts import Anatomy

__all__ = [
    "check_feature_layer", "check_traceable", "class_token_last", "is_stream", "pack", "plan_tower", "resampler",
    "square_plan", "tiles_of",
]  # fmt: skip

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
    return pixtral or _grids(info, video) is not None or kind in SHAPES.keys() - PADDED


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
        plan = stream_plan(anatomy, grids, info.get("video_merge_sizes" if video else "image_merge_sizes"))
        return compressed(plan, info.get("video_compression_mask")) if video else plan
    kind = "video" if video else "image"
    if f"{kind}_token_pooling" in info:
        return tabled_plan(info[f"{kind}_token_pooling"], molmo_sizes(info[f"{kind}_grids"]))
    if f"{kind}_position_ids" in info:
        return positioned_plan(info[f"{kind}_position_ids"], anatomy.vision_config.pooling_kernel_size)
    shapes = SHAPES.get(getattr(anatomy.config, "model_type", ""))
    if shapes is not None:
        return shaped_plan(anatomy, info.get(f"{shapes}_videos" if video else shapes), tokens)
    if video:
        return _video_plan(anatomy, blocks, tokens, info)
    if is_stream(anatomy, info):
        return pixtral_plan(anatomy, info["image_sizes"])
    return square_plan(anatomy, blocks, tokens, info)


def _grids(info: dict[str, Any], video: bool) -> Tensor | None:
    return info.get("video_grid_thw" if video else "image_grid_thw")


# ------------------------------------------------------------------------------------------------- batches of squares
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
    return TowerPlan(lambda x: grouped(x, side, side, step), index, None, blocks * per_block, grid)


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
