"""What the page shows of a trace at one layer: the picture of the tokens that enter it, and the scores behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from ..engine.trace import Trace
from ..view.patches import Canvas, background, canvases, paint, paint_scores

__all__ = ["entering_picture", "score_picture", "scoring_stage"]

_GAP = 12  # pixels between tiles, frames, images


def entering_picture(image: Image.Image, trace: Trace, layer: int) -> np.ndarray:
    """The image with the patches whose tokens enter decoder layer `layer`: (H, W, 3) uint8."""
    origins = trace.origins(layer - 1)[0].cpu()
    return _beside(image, trace, lambda canvas: paint(background(canvas), canvas.cells, origins))


def scoring_stage(trace: Trace, layer: int) -> int | None:
    """The last stage before `layer` at which the method had scores; None if there was none."""
    scored = [stage for stage in trace.stages if stage < layer and trace.scores(stage) is not None]
    return scored[-1] if scored else None


def score_picture(image: Image.Image, trace: Trace, layer: int) -> np.ndarray | None:
    """The scores of `scoring_stage` over the image, (H, W, 3) uint8; None without scores."""
    stage = scoring_stage(trace, layer)
    if stage is None:
        return None
    scores: Tensor = trace.scores(stage)[0].cpu()  # type: ignore[index]
    there = trace.active(stage - 1)[0].cpu()
    return _beside(image, trace, lambda canvas: paint_scores(background(canvas), canvas.cells, scores, there))


def _beside(image: Image.Image, trace: Trace, draw: Callable[[Canvas], np.ndarray]) -> np.ndarray:
    pictures = [draw(canvas) for canvas in canvases([image], trace, 0, trace.layout)]
    return pictures[0] if len(pictures) == 1 else _row(pictures)


def _row(pictures: Sequence[np.ndarray]) -> np.ndarray:
    height = max(len(picture) for picture in pictures)
    width = sum(picture.shape[1] for picture in pictures) + _GAP * (len(pictures) - 1)
    row = np.full((height, width, 3), 255, dtype=np.uint8)
    left = 0
    for picture in pictures:
        row[: len(picture), left : left + picture.shape[1]] = picture
        left += picture.shape[1] + _GAP
    return row
