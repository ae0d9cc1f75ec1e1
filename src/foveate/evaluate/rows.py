"""Rows of local data files, JSON or Parquet, one at a time and as they stand."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .images import DataError

__all__ = ["file_rows"]


def file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of every row of a `.jsonl`, `.json` or `.parquet` file.

    JSON is one object per line, or one array of objects; UTF-8, with or without a byte order mark.

    Raises:
        DataError: no such file, another kind of file, or a row that cannot be read, which is named.
    """
    if not os.path.isfile(path):
        raise DataError(
            f"data {path}: no such file, and no data set of that name (known: easy-vqa, scenes, moving-shapes)"
        )
    readers = {".jsonl": _json, ".json": _json, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise DataError(f"data {path}: expected a .jsonl or .parquet file")
    try:
        yield from readers[path.suffix.lower()](path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data {path}: cannot be read ({error})") from error


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        first = next((line for line in file if line.strip()), "")
        if first.lstrip().startswith("["):
            file.seek(0)
            rows = _decoded(f"{path}: expected one object per line or one array of objects", file.read())
            if not rows or isinstance(rows[0], dict):
                yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
                return
        file.seek(0)
        for number, line in enumerate(file, 1):  # not splitlines(): it also splits at U+2028
            if line.strip():
                yield f"line {number}", _decoded(f"{path}, line {number}", line)


def _decoded(where: str, text: str) -> Any:
    try:
        return json.loads(text.strip())
    except json.JSONDecodeError as error:
        raise DataError(f"data {where}: not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        raise DataError(f"data {where}: not usable JSON ({error})") from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"data {path}: Parquet needs pyarrow (pip install pyarrow)") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"data {path}: cannot be read ({error})") from error
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
