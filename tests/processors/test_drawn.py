"""What is drawn under a patch is what the model was shown there, whatever the processor cuts, pads and tiles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

import foveate
from foveate.engine.families.pixels import pictures
from foveate.view.seen import WHOLE, as_seen
from tests.processors.build import family, vlm
from tests.processors.media import encoded
from tests.reference.plans import Watch

UNKNOWN = {
    "gemma4", "granite4_vision", "idefics2", "lfm2_vl", "lfm3_vl", "minicpmv4_6", "molmo2", "phi4_multimodal",
}  # fmt: skip
"""Families whose inputs do not say what their patches show."""
OF_PATCHES = {"ernie4_5_vl_moe", "paddleocr_vl", "video_llama_3"}
"""Families whose streams of patches `pictures` does not make pictures of; their grids are those of Qwen-VL."""
SIZES = {"wide": (320, 180), "tall": (150, 330), "square": (200, 200)}


def _ramps(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards: what lies elsewhere has another colour."""
    x, y = np.meshgrid(np.linspace(20, 235, width), np.linspace(20, 235, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 120)], -1).astype(np.uint8))


def _coloured(pixels: torch.Tensor, processor: Any) -> torch.Tensor:
    """Pixels (3, H, W) as the processor made them -> red and green from 0 to 1."""
    rules = processor.image_processor
    if rules.do_normalize:
        mean, deviation = (torch.tensor(part)[:, None, None] for part in (rules.image_mean, rules.image_std))
        pixels = pixels * deviation + mean
    return pixels[:2]


def _drawn(image: Image.Image, box: tuple[float, ...], size: tuple[int, int]) -> torch.Tensor:
    """The part of a picture in a box, as large as `size` (height, width)."""
    pixels = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None].float() / 255
    (height, width), (x0, y0, x1, y1) = pixels.shape[2:], box
    part = pixels[:, :, round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)]
    return interpolate(part, size, mode="bilinear", antialias=True)[0, :2]


def _mosaic(tiles: list[torch.Tensor], grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """LLaVA-NeXT's tiles (3, H, W) as one picture, without what was padded."""
    side, (width, height) = tiles[0].shape[-1], size
    rows, columns = (-(-patches * 8 // side) for patches in grid)
    if rows * columns != len(tiles):
        rows = columns = math.isqrt(len(tiles))
    lines = [torch.cat(tiles[row * columns : (row + 1) * columns], 2) for row in range(rows)]
    scale = min(columns * side / width, rows * side / height)
    across, down = round(width * scale), round(height * scale)
    left, top = (columns * side - across) // 2, (rows * side - down) // 2
    return torch.cat(lines, 1)[:, top : top + down, left : left + across]


@pytest.mark.parametrize("size", SIZES)
@family(quick="llava_next")
@torch.no_grad()
def test_a_patch_is_drawn_where_it_was_seen(name: str, size: str):
    model, processor = vlm(name)
    photo = _ramps(*SIZES[size])
    message = [{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": "what?"}]}]
    prompt = encoded(processor, [message])
    watch = Watch({-1: torch.zeros_like(prompt["input_ids"], dtype=torch.bool)})
    with foveate.apply(model, watch):
        model(**prompt)
    (view,) = watch.views
    image, *others = view.layout.images[0]
    assert not others or name == "molmo2", "one photograph"
    known = [block for block in image.blocks if image.known and block.box is not None]
    assert bool(known) == (name not in UNKNOWN)
    given = prompt.get("pixel_values", prompt.get("pixel_values_images"))
    if not known or name in OF_PATCHES:
        return
    prompt = {**prompt, "pixel_values": given}
    given = pictures(prompt, torch.zeros(given.shape[1] if given.dim() == 5 else 1).long(), model.config.vision_config)
    if hasattr(model.config, "image_grid_pinpoints"):
        given = [given[0], _mosaic(given[1:], image.blocks[1].grid, SIZES[size])]
    assert len(given) == len(image.blocks)
    seen = as_seen(photo, processor)
    for block, pixels in zip(image.blocks, given):
        if block.box is not None:
            drawn = seen.info.get(WHOLE, seen) if block.kind == "tile" else seen
            difference = (_coloured(pixels, processor) - _drawn(drawn, block.box, pixels.shape[1:])).abs()
            assert difference.flatten(1).median(1).values.max() < 0.02, block.kind
