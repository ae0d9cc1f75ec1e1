"""Pieces of a self-contained page, as data for its templates: tables, cells, pictures as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

__all__ = ["Cell", "Chip", "Head", "Picture", "Section", "Table", "figure_uri", "jpeg_uri", "percent"]


class Section(NamedTuple):
    """A section of the page: its parts are (name of a macro in `templates/parts.html`, what it shows)."""

    anchor: str
    title: str
    parts: Sequence[tuple[str, Any]]


class Picture(NamedTuple):
    """A picture as a data URI, `dark` for those who read light on dark."""

    uri: str
    alt: str
    dark: str = ""


class Chip(NamedTuple):
    """A small label within a cell; `title` is shown on hovering."""

    text: str
    css: str
    title: str


Head = str | tuple[str, str]
"""Of a column: its text, or its text and a small second line."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it says.
        order: what the column is sorted by, `text` if None.
        small: a second line, of class `small_css`.
        style, css: inline style and classes.
        title: shown on hovering.
        chips: shown instead of `text`.
    """

    text: str
    order: float | str | None = None
    small: str = ""
    style: str = ""
    css: str = ""
    title: str = ""
    chips: tuple[Chip, ...] = ()
    small_css: str = ""


class Column(NamedTuple):
    """The head of a column; `left` where its words are flush left."""

    text: str
    small: str
    left: bool


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row names the row.

    Attributes:
        label: what it holds, for those who cannot see it.
    """

    heads: Sequence[Head]
    rows: Sequence[Sequence[Cell]]
    label: str
    css: str = ""

    @property
    def columns(self) -> list[Column]:
        """The heads, with what the first row says about them."""
        first = self.rows[0] if self.rows else [Cell("")] * len(self.heads)
        heads = [(head, "") if isinstance(head, str) else head for head in self.heads]
        return [Column(*head, cell.css in ("left", "words")) for head, cell in zip(heads, first, strict=True)]


def percent(value: float | None, digits: int = 1) -> Cell:
    """A share as per cent; a dash where it is not known."""
    return Cell("-", -1.0) if value is None else Cell(f"{value:.{digits}%}", value)


def figure_uri(figure: Figure, name: str) -> str:
    """A figure as SVG with its text as text. The same figure gives the same bytes."""
    buffer = io.BytesIO()
    # The salt makes ids that repeat from run to run.
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _uri("image/svg+xml", buffer.getvalue())


def jpeg_uri(pixels: np.ndarray[Any, Any], side: int = 320) -> str:
    """(H, W, 3) uint8 as JPEG, at most `side` pixels long."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82, optimize=True)
    return _uri("image/jpeg", buffer.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
