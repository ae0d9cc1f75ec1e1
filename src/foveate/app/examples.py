"""What the page offers to begin with: models that ship in the package, and images with questions about them."""

from __future__ import annotations

import contextlib
import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from .. import zoo
from ..evaluate.data import DataError, load
from ..zoo.scenes import scenes

__all__ = ["examples", "shipped_models"]

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


def shipped_models() -> list[str]:
    """Names of the shipped models that answer questions about images, as `evaluate.answer.load` takes them."""
    found = []
    for name in zoo.names():
        path = zoo.path(name) / "config.json"
        config = json.loads(path.read_text()) if path.is_file() else {}
        if any(kind.endswith("ForConditionalGeneration") for kind in config.get("architectures", ())):
            found.append(f"zoo:{name}")
    return found
