"""What is drawn is what the processor showed the model: compared with the pixels it hands on, patch by patch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, LlavaImageProcessor, SiglipImageProcessor

from foveate.engine.layout import Block, ImageLayout
from foveate.engine.trace import StageRecord, Trace
from foveate.view.patches import canvases, panels
from foveate.view.seen import as_seen

SIDE, PATCHES = 64, 8
PLAIN = {"do_rescale": True, "do_normalize": False}
PROCESSORS: dict[str, Any] = {
    "centre crop": lambda: CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, **PLAIN
    ),
    "letterbox": lambda: LlavaImageProcessor(
        do_pad=True, size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, **PLAIN
    ),
    "resize": lambda: SiglipImageProcessor(size={"height": SIDE, "width": SIDE}, **PLAIN),
}
SIZES = {"wide": (192, 96), "tall": (100, 230), "square": (128, 128)}


def _photo(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards: a shifted patch has another colour."""
    x, y = np.meshgrid(np.linspace(40, 250, width), np.linspace(40, 250, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 90)], -1).astype(np.uint8))


def _patches(pixels: np.ndarray) -> np.ndarray:
    step = SIDE // PATCHES
    return pixels.reshape(PATCHES, step, PATCHES, step, 3).mean((1, 3))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", PROCESSORS)
def test_the_picture_shows_what_the_processor_shows(kind: str, size: str):
    processor, photo = PROCESSORS[kind](), _photo(*SIZES[size])
    given = processor(images=photo, return_tensors="pt")["pixel_values"][0].permute(1, 2, 0).numpy() * 255
    drawn = np.asarray(as_seen(photo, processor).resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(float)
    difference = np.abs(_patches(drawn) - _patches(given))
    inner = difference[1:-1, 1:-1]  # where border and picture meet, resampling differs
    assert inner.max() < 8
    assert np.median(difference) < 3


def test_a_processor_that_cuts_nothing_changes_nothing():
    photo = _photo(192, 96)
    assert as_seen(photo, PROCESSORS["resize"]()) is photo
    assert as_seen(photo, None) is photo


class _Layout:
    """Two images of 2 x 2 patches, as Gemma 3 gives for a photograph and a crop of it."""

    known = True

    def __init__(self):
        none = torch.zeros(0, dtype=torch.long)
        blocks = [Block("base", torch.arange(first, first + 4), (2, 2), (0.0, 0.0, 1.0, 1.0)) for first in (0, 4)]
        self.images = [[ImageLayout(0, block.slots, [block], none, True) for block in blocks]]


def _trace() -> Trace:
    visual = torch.ones(1, 8, dtype=torch.bool)
    trace = Trace(2, visual, visual.clone())
    trace.records.append(StageRecord(-1, torch.tensor([[1, 0, 0, 0, 1, 1, 1, 0]]) > 0, None, None))
    return trace


def test_titles_count_the_tokens_of_their_own_panel():
    photo = _photo(64, 64)
    lines = panels([photo, photo], _trace(), layout=_Layout())
    assert [line[1].title for line in lines] == ["before the LLM: 1 of 4 tokens", "before the LLM: 3 of 4 tokens"]


def test_crops_that_the_caller_did_not_give_are_not_drawn_on_the_photograph():
    (canvas,) = canvases([_photo(64, 64)], _trace(), 0, _Layout())
    assert canvas.picture is None
    assert "not known" in canvas.label
