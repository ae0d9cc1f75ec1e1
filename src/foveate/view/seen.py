"""The part of a photograph that a model is shown: what its processor crops away is not drawn, what it adds is."""

from __future__ import annotations

from typing import Any

from PIL import Image

__all__ = ["as_seen"]


def as_seen(image: Image.Image, processor: Any) -> Image.Image:
    """A photograph as its processor hands it on: after the centre crop, or padded to a square. Not resized.

    Args:
        image: the photograph.
        processor: of the model, with an `image_processor`, or an image processor. One that only resizes or tiles
            (SigLIP, Gemma, Qwen-VL) changes nothing of what is shown.
    """
    rules = getattr(processor, "image_processor", processor)
    size, crop = getattr(rules, "size", None), getattr(rules, "crop_size", None)
    width, height = image.size
    if getattr(rules, "do_pad", False) and type(rules).__name__.startswith("LlavaImageProcessor"):
        side = max(width, height)
        return _framed(image, (side, side), getattr(rules, "image_mean", None))
    if not (getattr(rules, "do_center_crop", False) and size and crop):
        return image
    size, crop = dict(size), dict(crop)
    if "shortest_edge" in size:
        across = down = size["shortest_edge"] / min(width, height)
    else:
        across, down = size["width"] / width, size["height"] / height
    frame = round(crop["width"] / across), round(crop["height"] / down)
    return _framed(image, frame, None)


def _framed(image: Image.Image, frame: tuple[int, int], mean: Any) -> Image.Image:
    """The middle of an image, `frame` (width, height) pixels of it, with a border where the image is smaller."""
    colour = tuple(round(255 * part) for part in mean) if mean else (0, 0, 0)
    out = Image.new("RGB", frame, colour)
    out.paste(image.convert("RGB"), ((frame[0] - image.width) // 2, (frame[1] - image.height) // 2))
    return out
