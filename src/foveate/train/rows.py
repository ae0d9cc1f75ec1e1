"""Local files of training data: JSONL or Parquet, checked row by row when opened; images are read when needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..evaluate.images import DataError, open_image
from ..evaluate.rows import file_rows

__all__ = ["Row", "StoredRow", "read_rows"]

COLUMNS = {
    "vqa": ("image", "question", "answer"),
    "nlvr2": ("images", "text", "label"),
    "ve": ("image", "text", "label"),
    "retrieval": ("image", "text"),
}


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        images: one, or two for NLVR2.
        text: question, statement or caption.
        answer: answer or label; several answers of VQAv2's annotators; None in retrieval.
        image_id: rows with the same one show the same image.
    """

    images: tuple[Image.Image, ...]
    text: str
    answer: str | tuple[str, ...] | None
    image_id: int | str


@dataclass(frozen=True)
class StoredRow:
    """A row whose images are still in their files.

    Attributes:
        pictures: a path or encoded bytes for each image.
        text, answer, image_id: as in `Row`.
        where: file and line, for complaints.
    """

    pictures: tuple[Path | bytes, ...]
    text: str
    answer: str | tuple[str, ...] | None
    image_id: str
    where: str

    def open(self) -> Row:
        """With its images. Raises `DataError`, naming the line."""
        try:
            images = tuple(open_image(picture) for picture in self.pictures)
        except DataError as error:
            raise DataError(f"data {self.where}: {error}") from error
        return Row(images, self.text, self.answer, self.image_id)


def read_rows(path: Path, task: str) -> list[StoredRow]:
    """All rows of a file, which must have the columns of the task.

    vqa: image, question, answer (a text, or the list of several annotators' answers); nlvr2: images (two), text, label;
    ve: image, text, label; retrieval: image, text. Images are paths relative to the file; in Parquet also bytes.

    Raises:
        DataError: no such file, not readable, no rows, or a bad row, which is named.
    """
    rows = [_stored(path, where, row, task) for where, row in file_rows(path)]
    if not rows:
        raise DataError(f"data {path}: no rows")
    return rows


def _stored(path: Path, where: str, row: Any, task: str) -> StoredRow:
    columns, place = COLUMNS[task], f"{path}, {where}"
    if not isinstance(row, Mapping):
        raise DataError(f"data {place}: expected an object with {', '.join(columns)}")
    for column in columns:
        if row.get(column) is None:
            raise DataError(f"data {place}: no {column!r} (task {task} needs {', '.join(columns)})")
    given = row[columns[0]]
    pictures = list(given) if columns[0] == "images" and isinstance(given, list) else [given]
    if columns[0] == "images" and len(pictures) != 2:
        raise DataError(f"data {place}: 'images' must be two")
    text = row[columns[1]]
    if not (isinstance(text, str) and text.strip()):
        raise DataError(f"data {place}: {columns[1]!r} must be text")
    found = tuple(_picture(path, place, picture) for picture in pictures)
    names = [str(picture) if isinstance(picture, str) else where for picture in pictures]
    return StoredRow(found, text, _answer(place, row, columns), " ".join(names), place)


def _picture(path: Path, place: str, source: Any) -> Path | bytes:
    if isinstance(source, Mapping):  # how Hugging Face stores images in Parquet
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str):
        source = path.parent / source
        if not os.path.isfile(source):
            raise DataError(f"data {place}: image {source}: no such file")
    if not isinstance(source, Path | bytes):
        raise DataError(f"data {place}: an image must be a path")
    return source


def _answer(place: str, row: Mapping[str, Any], columns: tuple[str, ...]) -> str | tuple[str, ...] | None:
    if len(columns) < 3:
        return None
    answer = row[columns[2]]
    if columns[2] == "answer" and isinstance(answer, list) and answer:
        return tuple(map(str, answer))
    if not isinstance(answer, str | int | float | bool):
        raise DataError(f"data {place}: {columns[2]!r} must be text")
    return str(answer)
