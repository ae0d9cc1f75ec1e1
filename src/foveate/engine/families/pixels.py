"""Pixels as processors hand them to vision towers: their normalisation, what they show, and pictures out of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, cat

__all__ = ["normalisation", "pictures", "shown", "unfold_stream"]

_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_NORMALISED = {"siglip_vision_model": _HALF, "siglip": _HALF, "internvl_vision": _IMAGENET}
"""Mean and deviation of a tower's pixels, by its model type; CLIP's for all others."""


def normalisation(vision: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation, by channel, with which the pixels of a tower are normalised.

    Args:
        vision: configuration of the tower.
    """
    return _NORMALISED.get(getattr(vision, "model_type", ""), _CLIP)


def pictures(arguments: Mapping[str, Any], rows: Tensor, vision: Any) -> list[Tensor]:
    """The pictures (3, H, W) that a call of a model was given, tile by tile; [] if its pixels are laid out otherwise.

    Args:
        arguments: of the call; `pixel_values`, `image_grid_thw`.
        rows: (blocks,) row of the batch of each tile or whole image.
        vision: configuration of the tower.
    """
    pixels, grids = arguments.get("pixel_values"), arguments.get("image_grid_thw")
    if not isinstance(pixels, Tensor):
        return []
    if grids is not None:
        return unfold_stream(pixels, grids, vision)
    if pixels.dim() == 5:
        pixels = _without_padding(pixels, rows)
    return list(pixels) if pixels.dim() == 4 else []


def _without_padding(pixels: Tensor, rows: Tensor) -> Tensor:
    """Pixels (images, tiles, 3, H, W) -> (blocks, 3, H, W), without the empty tiles that fill up a batch."""
    counts = rows.bincount(minlength=len(pixels)).tolist()
    if len(counts) == len(pixels) and max(counts) <= pixels.shape[1]:  # one image in each row
        return cat([tiles[:count] for tiles, count in zip(pixels, counts)])
    flat = pixels.flatten(0, 1)
    return flat if len(flat) == len(rows) else flat[flat.flatten(1).any(1)]


def unfold_stream(pixels: Tensor, grids: Tensor, vision: Any) -> list[Tensor]:
    """Pictures (3, H, W), one for each time step, of a stream of patches as Qwen-VL and GLM-4V are fed with.

    Args:
        pixels: (patches, 3 * time * p * p), groups of merge x merge neighbours following each other.
        grids: (images, 3), time steps, height and width in patches.
        vision: configuration of the tower.
    """
    merge, p, time = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
    found: list[Tensor] = []
    for (steps, h, w), part in zip(grids.tolist(), pixels.split(grids.prod(1).tolist())):
        part = part.view(steps, h // merge, w // merge, merge, merge, 3, time, p, p)[:, :, :, :, :, :, 0]
        found += part.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(steps, 3, h * p, w * p)
    return found


def shown(processor: Any, width: int, height: int) -> tuple[tuple[int, int], tuple[float, ...]] | None:
    """What a processor shows of a photograph around its middle, before it resizes.

    Args:
        processor: of the model, with an `image_processor`, or an image processor.
        width, height: of the photograph, in pixels.

    Returns:
        Width and height of the part, larger than the photograph where it is padded, and the colour of the padding;
        None for the whole photograph (one that only resizes or tiles: SigLIP, Gemma, Qwen-VL).
    """
    rules = getattr(processor, "image_processor", processor)
    size, crop = getattr(rules, "size", None), getattr(rules, "crop_size", None)
    if getattr(rules, "do_pad", False) and type(rules).__name__.startswith("LlavaImageProcessor"):
        side = max(width, height)
        return (side, side), tuple(getattr(rules, "image_mean", None) or (0.0, 0.0, 0.0))
    if not (getattr(rules, "do_center_crop", False) and size and crop):
        return None
    size, crop = dict(size), dict(crop)
    if "shortest_edge" in size:
        across = down = size["shortest_edge"] / min(width, height)
    else:
        across, down = size["width"] / width, size["height"] / height
    return (round(crop["width"] / across), round(crop["height"] / down)), (0.0, 0.0, 0.0)
