"""The picture of what was kept: the image, then one panel for each stage at which tokens were removed.

* `overlay`: one image, one method, stage by stage. Tiles, frames and base images get a row of panels each.
* `sheet`: several questions or images against several methods, as they stand after the last stage.
* `paint`: the pixels of one panel, a pure function.

Nothing here runs a model: everything is read off a `Trace`.
"""

from __future__ import annotations

import colorsys
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ..engine.layout import Block, Layout
from ..engine.trace import Trace
from ..reduction import BEFORE_LAYERS

__all__ = ["Cell", "SheetCell", "SheetRow", "overlay", "paint", "save", "sheet"]

DIM = 0.40
"""Brightness of a removed patch, which is also drawn in grey."""
_MAX_ROWS = 8  # frames of a long video beyond this are not drawn
_SIDE = 448  # pixels of the longer side of a painted panel
_INK, _PAPER, _SOFT, _GOOD, _BAD = "#1b1f24", "#ffffff", "#6a737d", "#1a7f37", "#cf222e"


@dataclass(frozen=True)
class Cell:
    """One patch on a picture: its slot in the sequence and its box (left, top, right, bottom) in fractions of it."""

    slot: int
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class _Canvas:
    """One picture and the patches on it. `picture` is None where nobody knows which patch is where."""

    label: str
    picture: Image.Image | None
    cells: list[Cell]


# ------------------------------------------------------------------------------------------------------ the pixels
def paint(picture: np.ndarray, cells: Sequence[Cell], origins: Tensor) -> np.ndarray:
    """Mark on a picture which patches stayed.

    Kept patches stay as they are but for a thin border; removed ones turn dark and grey; the members of a merged token
    are tinted in its colour.

    Args:
        picture: (H, W, 3) uint8.
        cells: the patches on it.
        origins: (S,) long as from `Trace.origins`: the slot that stands for each slot, -1 if it was dropped.

    Returns:
        (H, W, 3) uint8.
    """
    colour = picture.astype(np.float32)
    grey = colour @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    out = colour.copy()
    owner = origins.tolist()
    members: dict[int, int] = {}
    for slot in (owner[cell.slot] for cell in cells):
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


def _heat(picture: np.ndarray, cells: Sequence[Cell], scores: Tensor, there: Tensor) -> np.ndarray:
    """Scores in colour over the grey picture; patches that were gone already stay dark."""
    from matplotlib import colormaps

    grey = picture.astype(np.float32).mean(-1, keepdims=True).repeat(3, -1)
    out = DIM * grey
    known = [cell for cell in cells if there[cell.slot] and math.isfinite(float(scores[cell.slot]))]
    # Ranks, not values: attention is so skewed that one patch would outshine all others.
    order = sorted(known, key=lambda cell: float(scores[cell.slot]))
    for rank, cell in enumerate(order):
        top, bottom, left, right = _pixels(cell.box, picture.shape)
        area = (slice(top, bottom), slice(left, right))
        out[area] = 0.35 * grey[area] + 0.65 * 255 * np.array(colormaps["magma"](rank / max(1, len(order) - 1))[:3])
    return out.clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------- from slots to patches
def _canvases(images: Sequence[Image.Image], trace: Trace, row: int, layout: Layout | None) -> list[_Canvas]:
    """The pictures of a row, each with its patches; a plain grid if the layout does not say where the patches are."""
    found: list[_Canvas] = []
    known = layout.images[row] if layout is not None and row < len(layout.images) else []
    if not all(image.known and all(block.box is not None for block in image.blocks) for image in known):
        known = []
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
            found.append(_Canvas(", ".join(parts), shown, [cell for block in blocks for cell in _cells(block)]))
    return found[:_MAX_ROWS] or [_plain_grid(trace, row)]


def _cells(block: Block) -> Iterator[Cell]:
    for patch, slot in enumerate(block.slots.tolist()):
        box = block.patch_box(patch)
        if box is not None:
            yield Cell(slot, box)


def _plain_grid(trace: Trace, row: int) -> _Canvas:
    slots = trace.visual[row].nonzero().flatten().tolist()
    width = max(1, math.ceil(math.sqrt(len(slots))))
    height = max(1, math.ceil(len(slots) / width))
    cells = [
        Cell(slot, (i % width / width, i // width / height, (i % width + 1) / width, (i // width + 1) / height))
        for i, slot in enumerate(slots)
    ]
    return _Canvas("layout not known: tokens in sequence order", None, cells)


def _background(canvas: _Canvas) -> np.ndarray:
    if canvas.picture is None:
        return np.full((_SIDE, _SIDE, 3), 235, dtype=np.uint8)
    image = canvas.picture.convert("RGB")
    scale = _SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST))


# ------------------------------------------------------------------------------------------------------- the panels
def _pruning_stages(trace: Trace, row: int) -> list[int]:
    """Stages after which something had changed in this row; the last one if nothing ever did."""
    visual = (trace.visual & trace.tokens)[row].cpu()
    changed, before = [], torch.where(visual, torch.arange(len(visual)), -1)
    for stage in trace.stages:
        now = torch.where(visual, trace.origins(stage)[row].cpu(), -1)
        if not torch.equal(now, before):
            changed.append(stage)
        before = now
    return changed or trace.stages[-1:]


def _stage_name(stage: int) -> str:
    return "before the LLM" if stage == BEFORE_LAYERS else f"after layer {stage}"


def _count(trace: Trace, row: int, stage: int) -> tuple[int, int]:
    return int(trace.kept(stage)[row].sum()), int((trace.visual & trace.tokens)[row].sum())


def _show(axes: Any, pixels: np.ndarray, title: str, colour: str = _INK) -> None:
    axes.imshow(pixels, interpolation="nearest")
    axes.set_title(title, fontsize=9.5, color=colour, pad=5)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, facecolor=_PAPER)
    FigureCanvasAgg(figure)  # no pyplot: no display, no global state
    return figure


def overlay(
    image: Image.Image | Sequence[Image.Image],
    trace: Trace,
    row: int = 0,
    layout: Layout | None = None,
    *,
    title: str | None = None,
    question: str | None = None,
    answers: tuple[str, str] | None = None,
    heat: bool = False,
) -> Figure:
    """What was kept of an image, stage by stage.

    Args:
        image: the image of this row, or its images in prompt order.
        trace: of the prefill (`session.trace`).
        row: of the batch.
        layout: which slot is which patch; None for `trace.layout`. Where neither knows, a plain grid is drawn.
        title: e.g. method and budget.
        question: printed above the panels.
        answers: (full model, reduced model), printed below the question.
        heat: also draw the scores by which the method chose, in the order of their ranks (bright is high).

    Raises:
        ValueError: the trace holds no stage, or no such row.
    """
    if not trace.stages:
        raise ValueError("the trace has no stage: this method decided nothing")
    if not 0 <= row < trace.visual.shape[0]:
        raise ValueError(f"row={row}: the trace has {trace.visual.shape[0]} rows")
    images = [image] if isinstance(image, Image.Image) else list(image)
    canvases = _canvases(images, trace, row, trace.layout if layout is None else layout)
    stages = _pruning_stages(trace, row)
    heats = [stage for stage in stages if heat and trace.scores(stage) is not None]
    columns = 1 + len(stages)
    width = max(5.6, 2.5 * columns + 0.2)
    lines = [line for line in (title, question, answers) if line]
    head = 0.28 * len(lines) + 0.12
    each = 2 if heats else 1
    rows = each * len(canvases)
    aspect = max(canvas.picture.height / canvas.picture.width if canvas.picture else 1.0 for canvas in canvases)
    height = head + rows * (2.4 * min(aspect, 2.0) + 0.38)
    figure = _new_figure(width, height)
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.02, top=1 - (head + 0.26) / height, wspace=0.06, hspace=0.18)
    for number, canvas in enumerate(canvases):
        line = axes[each * number]
        background = _background(canvas)
        _show(line[0], background, canvas.label or "image", _SOFT)
        for panel, stage in zip(line[1:], stages):
            kept, total = _count(trace, row, stage)
            name = f"{_stage_name(stage)}: {kept} of {total} tokens"
            _show(panel, paint(background, canvas.cells, trace.origins(stage)[row].cpu()), name)
        below = axes[each * number + 1] if heats else []
        for panel in below:
            panel.set_axis_off()
        for panel, stage in zip(below[1:], stages):
            scores = trace.scores(stage)
            if scores is None:
                continue
            panel.set_axis_on()
            there = trace.active(stage - 1)[row].cpu()
            _show(panel, _heat(background, canvas.cells, scores[row].cpu(), there), "scores, by rank", _SOFT)
    _head(figure, height, title, question, answers)
    return figure


def _head(
    figure: Figure, height: float, title: str | None, question: str | None, answers: tuple[str, str] | None
) -> None:
    top = height - 0.24
    for text, weight, size in ((title, "bold", 11.5), (question, "normal", 11)):
        if text:
            figure.text(0.5, top / height, text, ha="center", va="center", fontsize=size, weight=weight, color=_INK)
            top -= 0.28
    if answers:
        full, reduced = (answer or "(nothing)" for answer in answers)
        at = top / height
        figure.text(0.5, at, f"full model: {full}   ", ha="right", va="center", fontsize=11, color=_INK)
        colour = _GOOD if full == reduced else _BAD
        figure.text(0.5, at, f"   reduced: {reduced}", ha="left", va="center", fontsize=11, color=colour, weight="bold")


# -------------------------------------------------------------------------------------------------------- the sheet
@dataclass(frozen=True)
class SheetCell:
    """One method's view of a row of a sheet."""

    method: str
    trace: Trace
    answer: str
    row: int = 0


@dataclass(frozen=True)
class SheetRow:
    """One question about one image, and what each method kept for it."""

    image: Image.Image
    question: str
    answer: str
    cells: Sequence[SheetCell]


def sheet(rows: Sequence[SheetRow], title: str | None = None) -> Figure:
    """Questions down, methods across, each panel as it stands after the method's last pruning stage.

    Args:
        rows: with equally many cells each; `answer` is the full model's.
        title: of the whole picture.

    Raises:
        ValueError: no rows, or rows of different length.
    """
    if not rows or len({len(row.cells) for row in rows}) != 1:
        raise ValueError("a sheet needs rows with equally many methods")
    columns = 1 + len(rows[0].cells)
    head = 0.42 if title else 0.1
    width, each = 2.3 * columns + 0.2, 2.95
    height = head + each * len(rows)
    figure = _new_figure(width, height)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=1 - (head + 0.5) / height, wspace=0.05, hspace=0.3)
    for line, row in zip(axes, rows):
        _show(line[0], _background(_Canvas("", row.image, [])), f"{row.question}\nfull model: {row.answer}")
        for panel, cell in zip(line[1:], row.cells):
            canvas = _canvases([row.image], cell.trace, cell.row, cell.trace.layout)[0]
            stage = _pruning_stages(cell.trace, cell.row)[-1]
            kept, total = _count(cell.trace, cell.row, stage)
            pixels = paint(_background(canvas), canvas.cells, cell.trace.origins(stage)[cell.row].cpu())
            name = f"{cell.method}: {cell.answer or '(nothing)'}\n{_stage_name(stage)}: {kept} of {total}"
            _show(panel, pixels, name, _GOOD if cell.answer == row.answer else _BAD)
    if title:
        figure.text(0.5, 1 - 0.22 / height, title, ha="center", va="center", fontsize=12, weight="bold", color=_INK)
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, PDF or SVG (by the suffix), whole or not at all. Makes missing folders.

    Raises:
        ValueError: an unknown suffix.
        OSError: the place cannot be written.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".").lower() or "png"
    if kind not in ("png", "pdf", "svg"):
        raise ValueError(f"picture {path}: use a name that ends in .png, .pdf or .svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=f".{kind}")
    os.close(handle)
    try:
        figure.savefig(partial, format=kind)
        os.chmod(partial, 0o644)  # mkstemp's files are private
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
