"""The picture of what was kept: the image, then one panel for each stage at which tokens were removed.

* `overlay`: one image, one method, stage by stage. Tiles, frames and base images get a row of panels each.
* `sheet`: several questions or images against several methods, as they stand after the last stage.

Nothing here runs a model: everything is read off a `Trace`; the pixels come from `view.patches`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ..engine.layout import Layout
from ..engine.trace import Trace
from ..files import write_whole
from .patches import Canvas, background, canvases, count_kept, paint, panels, pruning_stages, stage_name

__all__ = [
    "INK",
    "SOFT",
    "SheetCell",
    "SheetRow",
    "head",
    "head_height",
    "new_figure",
    "overlay",
    "picture_kind",
    "save",
    "sheet",
    "show",
]

INK, _PAPER, SOFT, _GOOD, _BAD = "#1b1f24", "#ffffff", "#6a737d", "#1a7f37", "#cf222e"
_LETTER = 0.11
"""Inches that a letter of the head takes, on the safe side."""


# ------------------------------------------------------------------------------------------------------ the figure
def show(axes: Any, pixels: np.ndarray, title: str, colour: str = INK) -> None:
    """Pixels (H, W, 3) in a place of a figure, without ticks and frame."""
    axes.imshow(pixels, interpolation="nearest")
    axes.set_title(title, fontsize=9.5, color=colour, pad=5)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def new_figure(width: float, height: float, paper: str = _PAPER) -> Figure:
    """An empty figure of so many inches, without a display and without global state."""
    figure = Figure(figsize=(width, height), dpi=150, facecolor=paper)
    FigureCanvasAgg(figure)
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
    images = [image] if isinstance(image, Image.Image) else list(image)
    lines = panels(images, trace, row, layout, scores=heat)
    stages = [panel.stage for panel in lines[0] if panel.kind == "kept"]
    columns = 1 + len(stages)
    width = max(5.6, 2.5 * columns + 0.2)
    top = head_height(title, question, answers)
    each = 2 if any(panel.kind == "scores" for panel in lines[0]) else 1
    rows = each * len(lines)
    aspect = max(line[0].pixels.shape[0] / line[0].pixels.shape[1] for line in lines)
    height = top + rows * (2.4 * min(aspect, 2.0) + 0.38)
    figure = new_figure(width, height)
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.02, top=1 - (top + 0.26) / height, wspace=0.06, hspace=0.18)
    for number, line in enumerate(lines):
        for place in axes[each * number : each * (number + 1)].flat:
            place.set_axis_off()
        for panel in line:
            column = 0 if panel.stage is None else 1 + stages.index(panel.stage)
            place = axes[each * number + (panel.kind == "scores"), column]
            place.set_axis_on()
            show(place, panel.pixels, panel.title, INK if panel.kind == "kept" else SOFT)
    head(figure, height, title, question, answers)
    return figure


def head_height(title: str | None, question: str | None, answers: tuple[str, str] | None) -> float:
    """Inches that `head` takes."""
    return 0.28 * len([line for line in (title, question, answers) if line]) + 0.12


def head(
    figure: Figure, height: float, title: str | None, question: str | None, answers: tuple[str, str] | None
) -> None:
    """The lines at the top of a picture of `height` inches; the answers in green if they are equal, else in red."""
    top, width = height - 0.24, figure.get_figwidth() / _LETTER
    for text, weight, size in ((title, "bold", 11.5), (question, "normal", 11)):
        if text:
            figure.text(
                0.5,
                top / height,
                _fitting(text, width),
                ha="center",
                va="center",
                fontsize=size,
                weight=weight,
                color=INK,
            )
            top -= 0.28
    if answers:
        same = answers[0] == answers[1]
        full, reduced = (_fitting(answer or "(nothing)", width / 2 - len("   full model: ")) for answer in answers)
        at = top / height
        figure.text(0.5, at, f"full model: {full}   ", ha="right", va="center", fontsize=11, color=INK)
        colour = _GOOD if same else _BAD
        figure.text(0.5, at, f"   reduced: {reduced}", ha="left", va="center", fontsize=11, color=colour, weight="bold")


def _fitting(text: str, letters: float) -> str:
    """A line of at most so many letters."""
    line = " ".join(text.split())
    return line if len(line) <= letters else line[: max(1, int(letters) - 3)].rstrip() + "..."


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
    figure = new_figure(width, height)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=1 - (head + 0.5) / height, wspace=0.05, hspace=0.3)
    for line, row in zip(axes, rows):
        show(line[0], background(Canvas("", row.image, [])), f"{row.question}\nfull model: {row.answer}")
        for panel, cell in zip(line[1:], row.cells):
            canvas = canvases([row.image], cell.trace, cell.row, cell.trace.layout)[0]
            stage = pruning_stages(cell.trace, cell.row)[-1]
            kept, total = count_kept(cell.trace, cell.row, stage)
            pixels = paint(background(canvas), canvas.cells, cell.trace.origins(stage)[cell.row].cpu())
            name = f"{cell.method}: {cell.answer or '(nothing)'}\n{stage_name(stage)}: {kept} of {total}"
            show(panel, pixels, name, _GOOD if cell.answer == row.answer else _BAD)
    if title:
        figure.text(0.5, 1 - 0.22 / height, title, ha="center", va="center", fontsize=12, weight="bold", color=INK)
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, PDF or SVG (by the suffix), whole or not at all. Makes missing folders.

    Raises:
        ValueError: an unknown suffix.
        OSError: the place cannot be written.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format=picture_kind(path))
    write_whole(Path(path), picture.getvalue())


def picture_kind(path: str | Path) -> str:
    """ "png", "pdf" or "svg", by the suffix; "png" without one. Raises `ValueError` for any other."""
    kind = Path(path).suffix.removeprefix(".").lower() or "png"
    if kind not in ("png", "pdf", "svg"):
        raise ValueError(f"picture {path}: use a name that ends in .png, .pdf or .svg")
    return kind
