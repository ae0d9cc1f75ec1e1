"""The part of a photograph that a model is shown: what its processor crops away is not drawn, what it adds is."""

from __future__ import annotations

from typing import Any

from PIL import Image

from ..engine.families.pixels import shown

__all__ = ["as_seen"]


def as_seen(image: Image.Image, processor: Any) -> Image.Image:
    """A photograph as its processor hands it on: after the centre crop, or padded to a square. Not resized.

    Args:
        image: the photograph.
        processor: of the model, with an `image_processor`, or an image processor. One that only resizes or tiles
            (SigLIP, Gemma, Qwen-VL) changes nothing of what is shown.
    """
    part = shown(processor, *image.size)
    if part is None:
        return image
    (width, height), colour = part
    out = Image.new("RGB", (width, height), tuple(round(255 * channel) for channel in colour))
    out.paste(image.convert("RGB"), ((width - image.width) // 2, (height - image.height) // 2))
    return out
