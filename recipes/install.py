"""Putting a trained model where the package keeps it."""

from __future__ import annotations

import shutil
from pathlib import Path

__all__ = ["install"]


def install(source: Path, target: Path) -> None:
    """Replace the files of `target` one by one; a reader sees the old file or the new one, never half of one."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        fresh = target / f".{file.name}.new"
        shutil.copyfile(file, fresh)
        fresh.replace(target / file.name)
