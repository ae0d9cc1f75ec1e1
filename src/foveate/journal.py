"""Journals: one JSON value a line, appended as work is done, readable whenever the writer was killed.

A last line without its end was cut off by a kill, or is being written: it does not count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["append", "lines", "read", "repair"]


def lines(values: Iterable[Any]) -> str:
    """The values as they are written."""
    return "".join(json.dumps(value) + "\n" for value in values)


def read(path: Path) -> list[Any]:
    """The values of all whole lines, [] if there is no file.

    Raises:
        ValueError: a line is no JSON; the message begins with its number.
        OSError: the file cannot be read.
    """
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else (), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number}: cannot be read ({error})") from error
    return found


def append(path: Path, values: Iterable[Any]) -> None:
    """Add values; they are in the file, and survive the end of this process, when this returns."""
    with open(path, "ab") as file:
        file.write(lines(values).encode())


def repair(path: Path) -> None:
    """Cut off a line that a kill left without its end, so that what is appended starts on a line of its own."""
    with open(path, "rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
            os.fsync(file.fileno())
