"""The part of a photograph that a model is shown: what its processor crops away is not drawn, what it adds is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..engine.families.pixels import shown, tiles_whole_photographs
from ..evaluate.answer import VLM

__all__ = ["WHOLE", "as_seen", "frames_as_seen"]

WHOLE = "foveate_whole"
"""Key in the `info` of a picture of the whole photograph, which tiles show though the picture does not."""


def as_seen(image: Image.Image, processor: Any) -> Image.Image:
    """A photograph as its processor hands it on: after the centre crop, or padded to a square. Not resized.

    The processor is asked, with a picture of the same size.

    Args:
        image: the photograph.
        processor: of the model, with an `image_processor`, or an image processor. One that only resizes or tiles
            (SigLIP, Gemma, Qwen-VL) changes nothing of what is shown.
    """
    part = None if processor is None else shown(processor, *image.size)
    if part is None:
        return image
    (left, top, right, bottom), colour = part
    out = Image.new("RGB", (right - left, bottom - top), tuple(round(255 * channel) for channel in colour))
    out.paste(image.convert("RGB"), (-left, -top))
    if tiles_whole_photographs(processor):
        out.info[WHOLE] = image
    return out


def frames_as_seen(frames: Sequence[Image.Image], vlm: VLM) -> list[Image.Image]:
    """Frames of a video as the processor of a model hands them on."""
    rules = vlm.processor.video_processor if vlm.sees_videos else vlm.processor
    return [as_seen(frame, rules) for frame in frames]
