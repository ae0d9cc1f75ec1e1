"""What the page offers to begin with: images, with questions about them."""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from ..evaluate.data import DataError, load
from ..zoo.scenes import scenes

__all__ = ["examples"]

_SCENES = ((11, "color"), (5, "digit"), (8, "where"))
"""(seed, kind of question) of the rendered scenes."""


@cache
def examples() -> tuple[tuple[str, str], ...]:
    """(image file, question) pairs: rendered scenes, and an easy-VQA image if its package is installed."""
    samples = [next(sample for sample in scenes(40, seed) if sample.kind == kind) for seed, kind in _SCENES]
    with contextlib.suppress(DataError):
        samples += load("easy-vqa", 1, seed=3)
    folder = Path(mkdtemp(prefix="foveate-app-"))
    found = []
    for number, sample in enumerate(samples, 1):
        path = folder / f"example-{number}.png"
        sample.image.save(path)
        found.append((str(path), sample.question))
    return tuple(found)
