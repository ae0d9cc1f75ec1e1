"""Pieces of a self-contained page: escaped text, sortable tables, pictures as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

__all__ = ["Cell", "Head", "figure_uri", "image", "jpeg_uri", "paragraph", "percent", "table"]


Head = str | tuple[str, str]
"""Of a column: its text, or its text and a small second line."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: shown, escaped.
        order: what the column is sorted by, `text` if None.
        small: a second line.
        style, css: inline style and classes.
        title: shown on hovering.
        html: shown instead of `text`, as it is; must have been escaped.
    """

    text: str
    order: float | str | None = None
    small: str = ""
    style: str = ""
    css: str = ""
    title: str = ""
    html: str | None = None

    def render(self) -> str:
        """As HTML, the first column of a row excepted."""
        return f"<td{self.attributes()}>{self.content()}</td>"

    def attributes(self) -> str:
        """The attributes of its element, each with a space before it."""
        known = {"class": self.css, "style": self.style, "title": self.title}
        if self.order is not None:
            known["data-order"] = str(self.order)
        return "".join(f' {name}="{escape(value)}"' for name, value in known.items() if value)

    def content(self) -> str:
        """What stands in it."""
        shown = escape(self.text) if self.html is None else self.html
        return shown + (f"<small>{escape(self.small)}</small>" if self.small else "")


def percent(value: float | None, digits: int = 1) -> Cell:
    """A share as per cent; a dash where it is not known."""
    return Cell("-", -1.0) if value is None else Cell(f"{value:.{digits}%}", value)


def paragraph(text: str, css: str = "") -> str:
    """A paragraph of plain text."""
    return f"<p{f' class={chr(34)}{escape(css)}{chr(34)}' if css else ''}>{escape(text)}</p>"


def table(heads: Sequence[Head], rows: Sequence[Sequence[Cell]], label: str, css: str = "") -> str:
    """A table that can be sorted by any column, and be scrolled sideways where there is no room.

    Args:
        heads: of the columns.
        rows: the first cell names the row.
        label: what the table holds, for those who cannot see it.
    """
    wordy = [cell.css in ("left", "words") for cell in rows[0]] if rows else [False] * len(heads)
    head = "".join(
        f'<th scope="col"{" class=left" if flush else ""}>{_head(each)}</th>'
        for each, flush in zip(heads, wordy, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row"{first.attributes()}>{first.content()}</th>{"".join(cell.render() for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table class="sortable {css}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _head(head: Head) -> str:
    text, small = (head, "") if isinstance(head, str) else head
    return escape(text) + (f"<small>{escape(small)}</small>" if small else "")


def image(uri: str, alt: str, dark: str | None = None, width: int | None = None) -> str:
    """A picture that is part of the page. `dark` is shown to those who read light on dark."""
    size = f' width="{width}"' if width else ""
    shown = f'<img src="{uri}" alt="{escape(alt)}" loading="lazy"{size}>'
    if dark is None:
        return shown
    return f'<picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">{shown}</picture>'


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
