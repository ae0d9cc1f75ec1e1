"""The pixels of a picture of what was kept: pure functions of an image and a `Trace`, no figure, no model.

* `canvases`: the pictures of a row (image, tiles, frames) and the patches on each.
* `paint`, `paint_scores`: the pixels of one panel.
* `panels`: all panels of a row, titled; `overlay` arranges them on a figure, the report and the app on a page.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..engine.layout import Block, Layout
from ..engine.trace import Trace
from ..reduction import BEFORE_LAYERS
from .seen import WHOLE

__all__ = [
    "Canvas",
    "Cell",
    "Panel",
    "background",
    "canvases",
    "cells_of",
    "count_kept",
    "paint",
    "paint_scores",
    "panels",
    "pruning_stages",
    "stage_name",
]

DIM = 0.40
"""Brightness of a removed patch, which is also drawn in grey."""
_MAX_ROWS = 8  # frames of a long video beyond this are not drawn
_SIDE = 448  # pixels of the longer side of a painted panel


@dataclass(frozen=True)
class Cell:
    """One patch on a picture: its slot in the sequence and its box (left, top, right, bottom) in fractions of it.

    The slot is -1 where the model has left the patch out by itself.
    """

    slot: int
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Canvas:
    """One picture and the patches on it. `picture` is None where nobody knows which patch is where."""

    label: str
    picture: Image.Image | None
    cells: list[Cell]


# ------------------------------------------------------------------------------------------------------ the pixels
def paint(picture: np.ndarray, cells: Sequence[Cell], origins: Tensor, others: Sequence[Cell] = ()) -> np.ndarray:
    """Mark on a picture which patches stayed.

    Kept patches stay as they are but for a thin border; removed ones turn dark and grey; the members of a merged token
    are tinted in its colour.

    Args:
        picture: (H, W, 3) uint8.
        cells: the patches on it.
        origins: (S,) long as from `Trace.origins`: the slot that stands for each slot, -1 if it was dropped.
        others: patches of further pictures, with which some of these may be merged.

    Returns:
        (H, W, 3) uint8.
    """
    colour = picture.astype(np.float32)
    grey = colour @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    out = colour.copy()
    owner = [*origins.tolist(), -1]  # the last is that of slot -1
    members: dict[int, int] = {}
    for slot in (owner[cell.slot] for cell in (*cells, *others)):
        members[slot] = members.get(slot, 0) + 1
    groups = sorted(slot for slot, count in members.items() if slot >= 0 and count > 1)
    # Dropped patches first: a border belongs to the kept patch beside them.
    for cell in sorted(cells, key=lambda cell: owner[cell.slot] >= 0):
        top, bottom, left, right = _pixels(cell.box, picture.shape)
        area = (slice(top, bottom), slice(left, right))
        representative = owner[cell.slot]
        if representative < 0:
            out[area] = DIM * grey[area][..., None]
            continue
        border = np.array([255.0, 255.0, 255.0])
        if members[representative] > 1:
            border = _group_colour(groups.index(representative))
            share = 0.25 if representative == cell.slot else 0.45
            out[area] = (1 - share) * (0.5 * colour[area] + 0.5 * grey[area][..., None]) + share * border
        _frame(out[area], border)
    return out.clip(0, 255).astype(np.uint8)


def _pixels(box: tuple[float, float, float, float], shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    left, top, right, bottom = box
    height, width = shape[:2]
    return round(top * height), round(bottom * height), round(left * width), round(right * width)


def _frame(area: np.ndarray, colour: np.ndarray) -> None:
    """A one-pixel border inside `area`, in place; none where the patch is too small to keep anything else."""
    if min(area.shape[:2]) < 6:
        return
    for edge in (area[0], area[-1], area[:, 0], area[:, -1]):
        edge[:] = 0.45 * edge + 0.55 * colour


def _group_colour(number: int) -> np.ndarray:
    """Steps of the golden ratio round the colour wheel: groups in sequence get unlike colours."""
    return 255 * np.array(colorsys.hsv_to_rgb((number * 0.61803) % 1.0, 0.85, 1.0), dtype=np.float32)


def paint_scores(picture: np.ndarray, cells: Sequence[Cell], scores: Tensor, there: Tensor) -> np.ndarray:
    """Scores in colour over the grey picture, in the order of their ranks (bright is high).

    Args:
        picture: (H, W, 3) uint8.
        cells: the patches on it.
        scores: (S,) float.
        there: (S,) bool, patches that were still there; the others stay dark.

    Returns:
        (H, W, 3) uint8.
    """
    from matplotlib import colormaps

    grey = picture.astype(np.float32).mean(-1, keepdims=True).repeat(3, -1)
    out = DIM * grey
    known = [cell for cell in cells if cell.slot >= 0 and there[cell.slot] and math.isfinite(float(scores[cell.slot]))]
    # Ranks, not values: attention is so skewed that one patch would outshine all others.
    order = sorted(known, key=lambda cell: float(scores[cell.slot]))
    for rank, cell in enumerate(order):
        top, bottom, left, right = _pixels(cell.box, picture.shape)
        area = (slice(top, bottom), slice(left, right))
        out[area] = 0.35 * grey[area] + 0.65 * 255 * np.array(colormaps["magma"](rank / max(1, len(order) - 1))[:3])
    return out.clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------- from slots to patches
def canvases(images: Sequence[Image.Image], trace: Trace, row: int, layout: Layout | None) -> list[Canvas]:
    """The pictures of a row, each with its patches; a plain grid if the layout does not say where the patches are."""
    found: list[Canvas] = []
    known = layout.images[row] if layout is not None and row < len(layout.images) else []
    if not all(image.known and all(block.box is not None for block in image.blocks) for image in known):
        known = []
    if len(known) > len(images) and not any(block.kind == "frame" for image in known for block in image.blocks):
        known = []  # crops that the processor made of the images (Gemma 3): nobody says of what part
    pictures = iter(images)
    for number, laid_out in enumerate(known):
        frames = any(block.kind == "frame" for block in laid_out.blocks)
        groups: dict[str, list[Block]] = {}
        for index, block in enumerate(laid_out.blocks):
            # Tiles together make up one picture; every frame of a video is a picture of its own.
            groups.setdefault(f"frame {index + 1}" if block.kind == "frame" else block.kind, []).append(block)
        picture = None if frames else next(pictures, None)
        for kind, blocks in groups.items():
            parts = ([f"image {number + 1}"] if len(known) > 1 else []) + ([kind] if len(groups) > 1 else [])
            shown = next(pictures, None) if frames else picture
            if kind == "tile" and shown is not None:
                shown = shown.info.get(WHOLE, shown)
            found.append(Canvas(", ".join(parts), shown, [cell for block in blocks for cell in cells_of(block)]))
    return found[:_MAX_ROWS] or [_plain_grid(trace, row)]


def cells_of(block: Block) -> Iterator[Cell]:
    """The patches of a block whose area is known."""
    for patch, slot in enumerate(block.slots.tolist()):
        box = block.patch_box(patch)
        if box is not None:
            yield Cell(slot, box)


def _plain_grid(trace: Trace, row: int) -> Canvas:
    slots = trace.visual[row].nonzero().flatten().tolist()
    width = max(1, math.ceil(math.sqrt(len(slots))))
    height = max(1, math.ceil(len(slots) / width))
    cells = [
        Cell(slot, (i % width / width, i // width / height, (i % width + 1) / width, (i // width + 1) / height))
        for i, slot in enumerate(slots)
    ]
    return Canvas("layout not known:\ntokens in sequence order", None, cells)


def background(canvas: Canvas) -> np.ndarray:
    if canvas.picture is None:
        return np.full((_SIDE, _SIDE, 3), 235, dtype=np.uint8)
    image = canvas.picture.convert("RGB")
    scale = _SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST))


# ------------------------------------------------------------------------------------------------------- the panels
def pruning_stages(trace: Trace, row: int) -> list[int]:
    """Stages after which something had changed in this row; the last one if nothing ever did."""
    visual = (trace.visual & trace.tokens)[row].cpu()
    changed, before = [], torch.where(visual, torch.arange(len(visual)), -1)
    for stage in trace.stages:
        now = torch.where(visual, trace.origins(stage)[row].cpu(), -1)
        if not torch.equal(now, before):
            changed.append(stage)
        before = now
    return changed or trace.stages[-1:]


def stage_name(stage: int) -> str:
    return "before the LLM" if stage == BEFORE_LAYERS else f"after layer {stage}"


def count_kept(trace: Trace, row: int, stage: int, cells: Sequence[Cell] | None = None) -> tuple[int, int]:
    """Tokens kept, and tokens there were: of a row, or of the patches on one picture."""
    kept, there = trace.kept(stage)[row].cpu(), (trace.visual & trace.tokens)[row].cpu()
    if cells is None:
        return int(kept.sum()), int(there.sum())
    slots = [cell.slot for cell in cells if cell.slot >= 0]
    return int(kept[slots].sum()), int(there[slots].sum())


@dataclass(frozen=True)
class Panel:
    """One picture of a row: the image itself, what was kept after a stage, or the scores by which the method chose."""

    kind: Literal["image", "kept", "scores"]
    title: str
    pixels: np.ndarray
    """(H, W, 3) uint8."""
    stage: int | None = None


def panels(
    images: Sequence[Image.Image], trace: Trace, row: int = 0, layout: Layout | None = None, scores: bool = False
) -> list[list[Panel]]:
    """What was kept of the images of a row: for each canvas the image, then one panel per stage that removed tokens.

    Args:
        images: of this row, in prompt order.
        trace: of the prefill (`session.trace`).
        row: of the batch.
        layout: which slot is which patch; None for `trace.layout`. Where neither knows, a plain grid is drawn.
        scores: also the scores of each stage that has some, after the panels of what was kept.

    Raises:
        ValueError: the trace holds no stage, or no such row.
    """
    if not trace.stages:
        raise ValueError("the trace has no stage: this method decided nothing")
    if not 0 <= row < trace.visual.shape[0]:
        raise ValueError(f"row={row}: the trace has {trace.visual.shape[0]} rows")
    stages = pruning_stages(trace, row)
    found = []
    for canvas in canvases(images, trace, row, trace.layout if layout is None else layout):
        pixels = background(canvas)
        line = [Panel("image", canvas.label or "image", pixels)]
        for stage in stages:
            kept, total = count_kept(trace, row, stage, canvas.cells)
            painted = paint(pixels, canvas.cells, trace.origins(stage)[row].cpu())
            line.append(Panel("kept", f"{stage_name(stage)}: {kept} of {total} tokens", painted, stage))
        for stage in stages if scores else ():
            values = trace.scores(stage)
            if values is not None:
                there = trace.active(stage - 1)[row].cpu()
                painted = paint_scores(pixels, canvas.cells, values[row].cpu(), there)
                line.append(Panel("scores", f"scores {stage_name(stage)}, by rank", painted, stage))
        found.append(line)
    return found
