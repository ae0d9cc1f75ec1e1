"""A film strip: frame by frame, which visual tokens of a video were kept, and how many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ..engine.layout import Block
from ..engine.trace import Trace
from .overlay import INK, SOFT, head, head_height, new_figure, show
from .patches import Canvas, Cell, Panel, background, cells_of, count_kept, paint, pruning_stages, stage_name

__all__ = ["Shot", "film_strip", "shots", "video_panels"]

_ACROSS = 8
"""Frames side by side."""
_MOST = 48
"""Frames drawn; of more, so many are drawn evenly."""
_FRAME, _BAR, _GAP = 1.5, 0.34, 0.12
"""Inches: width of a frame, height of the bars, between lines."""
_KEPT, _EMPTY = "#0969da", "#d8dee4"


@dataclass(frozen=True)
class Shot:
    """A time step of a video and what was kept of it.

    Attributes:
        frame: number of the (first) frame of the step among those that the model was shown.
        picture: that frame.
        cells: its patches.
        kept, total: visual tokens that stayed, and that there were.
    """

    frame: int
    picture: Image.Image
    cells: list[Cell]
    kept: int
    total: int


def shots(frames: Sequence[Image.Image], trace: Trace, row: int = 0) -> list[Shot]:
    """The time steps of the first video of a row, after the last stage at which tokens were removed.

    Args:
        frames: that the model was shown, in order. A tower may look at several at once (two in Qwen-VL).
        trace: of the prefill (`session.trace`).
        row: of the batch.

    Raises:
        ValueError: the trace holds no stage; or where the frames of a video lie in the prompt is not known.
    """
    if not trace.stages:
        raise ValueError("the trace has no stage: this method decided nothing")
    images = trace.layout.images[row] if trace.layout is not None else []
    steps: list[Block] = next((f for i in images if (f := [b for b in i.blocks if b.kind == "frame"])), [])
    if not steps:
        raise ValueError("which slots of the prompt are which frame of the video is not known")
    if any(block.box is None for block in steps):
        raise ValueError("where in a frame each visual token lies is not known for this model")
    stage, found = pruning_stages(trace, row)[-1], []
    for time, block in enumerate(steps):
        frame = min(time * len(frames) // len(steps), len(frames) - 1)
        cells = list(cells_of(block))
        found.append(Shot(frame, frames[frame], cells, *count_kept(trace, row, stage, cells)))
    return found


def video_panels(frames: Sequence[Image.Image], trace: Trace, row: int = 0, most: int = _ACROSS) -> list[Panel]:
    """What was kept of each time step, `most` of them evenly. Arguments and errors as of `shots`."""
    every = shots(frames, trace, row)
    return [
        Panel("kept", f"frame {shot.frame + 1}: {shot.kept} of {shot.total} tokens", _painted(shot, every, trace, row))
        for shot in _spread(every, most)
    ]


def _spread(every: list[Shot], most: int) -> list[Shot]:
    if len(every) <= most:
        return every
    return [every[round(i * (len(every) - 1) / (most - 1))] for i in range(most)]


def _painted(shot: Shot, every: list[Shot], trace: Trace, row: int) -> np.ndarray:
    others = [cell for other in every if other is not shot for cell in other.cells]
    origins = trace.origins(pruning_stages(trace, row)[-1])[row].cpu()
    return paint(background(Canvas("", shot.picture, [])), shot.cells, origins, others)


def film_strip(
    frames: Sequence[Image.Image],
    trace: Trace,
    row: int = 0,
    *,
    seconds: Sequence[float] | None = None,
    title: str | None = None,
    question: str | None = None,
    answers: tuple[str, str] | None = None,
) -> Figure:
    """Each time step of a video as it was, as it was kept, and a bar for how many of its tokens stayed.

    Removed patches are dark and grey, kept ones framed; what was merged into one token has one colour, over all frames.
    From two lines on only what was kept is drawn.

    Args:
        frames, trace, row: as of `shots`.
        seconds: when each frame is shown in the video; None: frames are numbered.
        title: e.g. method and budget.
        question: printed above the frames.
        answers: (full model, reduced model), printed below the question.

    Raises:
        ValueError: as of `shots`.
    """
    every = shots(frames, trace, row)
    stage = pruning_stages(trace, row)[-1]
    drawn = _spread(every, _MOST)
    across = min(len(drawn), _ACROSS)
    lines = -(-len(drawn) // across)
    both = lines == 1
    kept, total = sum(shot.kept for shot in every), sum(shot.total for shot in every)
    said = f"{kept} of {total} visual tokens kept {stage_name(stage)} ({kept / max(1, total):.0%})"
    if len(drawn) < len(every):
        said += f"; {len(drawn)} of {len(every)} time steps shown"
    texts = (title, question, answers)
    top = head_height(*texts) + 0.3
    tall = _FRAME * min(2.0, max(shot.picture.height / shot.picture.width for shot in drawn))
    each = (tall + 0.04) * (1 + both) + 0.2 + _BAR + _GAP
    left, right = (0.62 if both else 0.12), 0.12
    width = max(left + right + across * (_FRAME + 0.05), 5.2)
    left = max(left, (width - right - across * (_FRAME + 0.05)) / 2)
    height = top + lines * each + 0.08
    figure = new_figure(width, height)
    head(figure, height, *texts)
    figure.text(0.5, 1 - (top - 0.2) / height, said, ha="center", va="center", fontsize=9, color=SOFT)

    most = max(shot.total for shot in drawn)
    places = 1 if seconds is None or (seconds[-1] - seconds[0]) / len(seconds) >= 1 else 2
    for number, shot in enumerate(drawn):
        line, column = divmod(number, across)
        x, y = left + column * (_FRAME + 0.05), height - top - line * each
        painted = _painted(shot, every, trace, row)
        for picture in (background(Canvas("", shot.picture, [])), painted) if both else (painted,):
            y -= tall + 0.04
            show(figure.add_axes((x / width, y / height, _FRAME / width, tall / height)), picture, "")
        when = f"frame {shot.frame + 1}" if seconds is None else f"{seconds[shot.frame]:.{places}f} s"
        middle = (x + _FRAME / 2) / width
        figure.text(middle, (y - 0.1) / height, when, ha="center", va="center", fontsize=8, color=INK)
        y -= 0.2 + _BAR
        _bar(figure, (x / width, y / height, _FRAME / width, _BAR / height), shot, most)
    if both:
        for text, middle in (("video", 0.5), ("kept", 1.5)):
            y = height - top - middle * (tall + 0.04)
            figure.text((left - 0.1) / width, y / height, text, ha="right", va="center", fontsize=9, color=INK)
        y = height - top - 2 * (tall + 0.04) - 0.2 - _BAR / 2
        figure.text((left - 0.1) / width, y / height, "tokens", ha="right", va="center", fontsize=9, color=INK)
    return figure


def _bar(figure: Figure, place: tuple[float, float, float, float], shot: Shot, most: int) -> None:
    axes = figure.add_axes(place)
    axes.barh([0], [shot.total / most], height=0.42, color=_EMPTY)
    axes.barh([0], [shot.kept / most], height=0.42, color=_KEPT)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.9, 0.6)
    axes.set_axis_off()
    axes.text(0.5, -0.42, f"{shot.kept} of {shot.total}", ha="center", va="top", fontsize=7.5, color=SOFT)
