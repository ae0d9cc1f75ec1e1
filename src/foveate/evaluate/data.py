"""Questions about images: the shipped data sets and local JSONL or Parquet files.

Nothing is downloaded. Images of a local file are opened only for the samples that are drawn, but every line is checked.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..zoo.scenes import Sample, scenes

__all__ = ["DATASETS", "DataError", "Sample", "load", "open_image"]

DATASETS = ("easy-vqa", "scenes")
"""Names `load` knows; anything else is a file."""

_COLUMNS = ("image", "question", "answer")


class DataError(ValueError):
    """A data set or an image cannot be read. The message names the file and, where there is one, the line."""


def load(name_or_path: str | Path, count: int | None = None, seed: int = 0) -> list[Sample]:
    """Samples of a data set.

    Args:
        name_or_path: "easy-vqa" (test split), "scenes" (held-out split), or a `.jsonl` or `.parquet` file whose rows
            have `image` (a path relative to the file; in Parquet also the bytes), `question` and `answer`.
        count: how many samples, drawn at random; None for all of them (1000 scene questions).
        seed: of the draw.

    Raises:
        DataError: unknown name, missing file, or a row that is not what it should be.
    """
    name = str(name_or_path)
    if count is not None and count < 1:
        raise DataError(f"samples={count}: at least 1 is needed")
    if name == "easy-vqa":
        return _easyvqa(count, seed)
    if name == "scenes":
        return _scenes(count or 1000, seed)
    path = Path(name_or_path)
    if not path.is_file():
        raise DataError(f"data {name}: no such file, and no data set of that name (known: {', '.join(DATASETS)})")
    readers = {".jsonl": _jsonl, ".json": _jsonl, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise DataError(f"data {name}: expected a .jsonl or .parquet file")
    rows = list(readers[path.suffix.lower()](path))
    if not rows:
        raise DataError(f"data {name}: no rows")
    if count is not None and count < len(rows):
        rows = [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), count))]
    return [_sample(path, *row) for row in rows]


def open_image(source: str | Path | bytes) -> Image.Image:
    """An RGB image from a path or from encoded bytes. Raises `DataError`, naming the file."""
    name = "its bytes" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise DataError(f"image {name}: no such file")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert("RGB")
    # Pillow's decoders raise SyntaxError for some broken PNG files and a class of its own for huge ones.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image" if "cannot identify" in str(error) else str(error)
        raise DataError(f"image {name}: cannot be read ({reason})") from error


def _easyvqa(count: int | None, seed: int) -> list[Sample]:
    from ..zoo.easyvqa import easyvqa

    try:
        return easyvqa(split="test", count=count, seed=seed)
    except ImportError as error:
        raise DataError("data easy-vqa: needs the package easy-vqa (pip install 'foveate[data]')") from error


def _scenes(count: int, seed: int) -> list[Sample]:
    each, drawn = 5, 0
    found: list[Sample] = []
    while len(found) < count:  # a bare scene may not have `each` questions to ask
        drawn += -(-(count - len(found)) // each)
        found = scenes(count=drawn, seed=seed, questions_per_scene=each, split="test")
    return found[:count]


def _jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data {path}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"data {path}, {where}: not JSON ({error.msg} at column {error.colno})") from error
        yield where, _checked(path, where, row)


def _parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"data {path}: Parquet needs pyarrow (pip install pyarrow)") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise DataError(f"data {path}: cannot be read ({error})") from error
    for number, row in enumerate(rows, 1):
        where = f"row {number}"
        yield where, _checked(path, where, row)


def _checked(path: Path, where: str, row: Any) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"data {path}, {where}: expected an object with {', '.join(_COLUMNS)}")
    for column in _COLUMNS:
        if row.get(column) is None:
            raise DataError(f"data {path}, {where}: no {column!r}")
    if not isinstance(row["question"], str) or not isinstance(row["answer"], str | int | float):
        raise DataError(f"data {path}, {where}: 'question' and 'answer' must be text")
    return row


def _sample(path: Path, where: str, row: Mapping[str, Any]) -> Sample:
    source = row["image"]
    if isinstance(source, dict):  # how Hugging Face stores images in Parquet
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str):
        source = path.parent / source
    if not isinstance(source, Path | bytes):
        raise DataError(f"data {path}, {where}: 'image' must be a path")
    try:
        image = open_image(source)
    except DataError as error:
        raise DataError(f"data {path}, {where}: {error}") from error
    return Sample(
        image=image,
        question=row["question"],
        answer=str(row["answer"]),
        kind=str(row.get("kind", "")),
        image_id=str(row["image"]) if isinstance(row["image"], str) else where,
    )
