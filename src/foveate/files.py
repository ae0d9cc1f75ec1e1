"""Files that are written whole or not at all."""

from __future__ import annotations

import tempfile
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text; a reader sees the old file or the new one. Folders are made. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            partial = Path(file.name)
            file.write(text)
        partial.chmod(0o644)  # temporary files are private
        partial.replace(path)
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
