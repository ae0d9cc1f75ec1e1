"""Pixels as processors hand them to vision towers: their normalisation, what they show, and pictures out of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, cat, tensor

__all__ = ["normalisation", "pictures", "shown", "tiles_whole_photographs", "unfold_stream"]

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
        paved = all(hasattr(vision, name) for name in ("spatial_merge_size", "temporal_patch_size"))
        return unfold_stream(pixels, grids, vision) if paved and pixels.dim() == 2 else []
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


def shown(processor: Any, width: int, height: int) -> tuple[tuple[int, int, int, int], tuple[float, ...]] | None:
    """What a processor shows of a photograph as a whole, found out by showing it one whose colours say where they are.

    Args:
        processor: of the model, with an `image_processor`, or an image processor.
        width, height: of the photograph, in pixels.

    Returns:
        (left, top, right, bottom) in pixels of the photograph, beyond it where it is padded, and the colour of the
        padding; None for the whole photograph, and where only parts of it are shown (tiles).
    """
    rules = getattr(processor, "image_processor", processor)
    ramps = np.full((height, width, 3), 255, dtype=np.uint8)  # a photograph may have many megapixels
    ramps[..., 0] = np.linspace(0, 255, width).round()
    ramps[..., 1] = np.linspace(0, 255, height).round()[:, None]
    try:
        made = rules(images=Image.fromarray(ramps), return_tensors="pt")
        pixels = made["pixel_values" if "pixel_values" in made else "pixel_values_images"]
    except Exception:  # a processor of the user's own
        return None
    if tiles_whole_photographs(rules) and pixels.dim() == 5:
        pixels = pixels[0, :1]
    if pixels.dim() != 4 or pixels.shape[:2] != (1, 3):
        return None
    picture = pixels[0].float()
    if getattr(rules, "do_normalize", False):
        mean, deviation = (tensor(part)[:, None, None] for part in (rules.image_mean, rules.image_std))
        picture = picture * deviation + mean
    inside = picture[2] > 0.95 * picture[2].max()
    sides = [
        _extent(picture[channel] * (length - 1) / picture[2].max(), inside, axis)
        for channel, axis, length in ((0, 1, width), (1, 0, height))
    ]
    (left, right), (top, bottom) = sides
    if max(abs(left) / width, abs(top) / height, abs(right / width - 1), abs(bottom / height - 1)) < 0.02:
        return None
    padding = picture[:, ~inside]
    colour = padding.median(1).values.clamp(0, 1).tolist() if padding.numel() else [0.0] * 3
    return (round(left), round(top), round(right), round(bottom)), tuple(colour)


def tiles_whole_photographs(processor: Any) -> bool:
    """Whether tiles show all of a photograph of which the picture beside them shows the middle (LLaVA-NeXT)."""
    return hasattr(getattr(processor, "image_processor", processor), "image_grid_pinpoints")


def _extent(places: Tensor, inside: Tensor, axis: int) -> tuple[float, float]:
    """Where a picture begins and ends along an axis, from the place (H, W) that each of its pixels shows."""
    lines = inside.any(1 - axis).nonzero()[:, 0].double()
    means = (places * inside).sum(1 - axis) / inside.sum(1 - axis).clamp_min(1)
    shows = means[lines.long()].double()
    slope = ((lines - lines.mean()) * (shows - shows.mean())).sum() / (lines - lines.mean()).square().sum()
    start = shows.mean() + 0.5 - slope * (lines.mean() + 0.5)
    return float(start), float(start + slope * places.shape[axis])
