"""How the contestants of a sweep are written on a command line, and in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import foveate

from ..reduction import info
from .shell import CommandError, option_value

__all__ = ["entries"]


def entries(
    methods: str | None, option: Sequence[str], contestants: Path | None, model: str
) -> tuple[list[Any], set[str]]:
    """What takes part, without budgets and seeds, and which methods were asked for by name.

    Args:
        methods: names separated by commas, each possibly with [option=value;...]; "all" is every method. None: all,
            unless there is a file.
        option: METHOD.NAME=VALUE, for every entry of that method on the command line.
        contestants: YAML list of {method, options, keep}.
        model: on which they compete.

    Raises:
        CommandError, OptionError: whatever is wrong with them.
    """
    from ..evaluate.contestants import entries_for

    common = _common(option)
    listed = _split("all" if methods is None and contestants is None else methods or "")
    named = [_named(text) for text in listed if text != "all"]
    known = {name for name, _ in named}
    rest: list[tuple[str, dict[str, Any]]] = (
        [(name, {}) for name in foveate.names() if name not in known] if "all" in listed else []
    )
    found = []
    for name, chosen in [*named, *rest]:
        found += entries_for(name, {**common.get(name, {}), **chosen}, model)
    idle = common.keys() - {entry.method for entry in found}
    if idle:
        raise CommandError(f"option {min(idle)}.{next(iter(common[min(idle)]))}: {min(idle)} takes no part")
    if contestants is not None:
        from_file = _from_file(contestants, model)
        known |= {entry.method for entry in from_file}
        found += from_file
    if not found:
        raise CommandError(f"methods {methods!r}: name at least one of {', '.join(foveate.names())}")
    return found, known


def _common(option: Sequence[str]) -> dict[str, dict[str, Any]]:
    """METHOD.NAME=VALUE -> options by method."""
    common: dict[str, dict[str, Any]] = {}
    for text in option:
        place, equals, value = text.partition("=")
        method, dot, name = place.strip().rpartition(".")
        if not (equals and dot and name):
            raise CommandError(f"option {text!r}: write it as method.name=value")
        info(method)  # raises the error that lists the known ones
        common.setdefault(method, {})[name.replace("-", "_")] = option_value(value.strip())
    return common


def _split(text: str) -> list[str]:
    """At commas that stand outside brackets."""
    parts, depth, start = [], 0, 0
    for place, sign in enumerate(text + ","):
        depth += {"[": 1, "]": -1}.get(sign, 0)
        if sign == "," and depth <= 0:
            parts.append(text[start:place].strip())
            start = place + 1
    if depth:
        raise CommandError(f"methods {text!r}: a bracket is left open")
    return [part for part in parts if part]


def _named(text: str) -> tuple[str, dict[str, Any]]:
    """NAME[option=value;...] -> name, options."""
    name, bracket, inside = text.partition("[")
    if bracket and not inside.endswith("]"):
        raise CommandError(f"methods {text!r}: write options as NAME[option=value;...]")
    chosen = {}
    for part in inside[:-1].split(";") if bracket else []:
        key, equals, value = part.partition("=")
        if not (key.strip() and equals):
            raise CommandError(f"methods {text!r}: {part!r} is not option=value")
        chosen[key.strip().replace("-", "_")] = option_value(value.strip())
    return name.strip(), chosen


def _from_file(path: Path, model: str) -> list[Any]:
    import yaml

    from ..evaluate.contestants import Entry, entries_for

    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CommandError(f"contestants {path}: cannot be read ({error})") from error
    if not isinstance(rows, list) or not rows:
        raise CommandError(f"contestants {path}: a list of entries with method, options and keep is expected")
    entries = []
    for number, row in enumerate(rows, 1):
        where = f"contestants {path}, entry {number}"
        if not (
            isinstance(row, dict) and isinstance(row.get("method"), str) and row.keys() <= Entry.__annotations__.keys()
        ):
            raise CommandError(f"{where}: needs method, and may have options and keep")
        chosen, budgets = row.get("options") or {}, row.get("keep")
        if not isinstance(chosen, dict):
            raise CommandError(f"{where}: options must be a mapping")
        if budgets is not None and not isinstance(budgets, list):
            budgets = [budgets]
        entries += [Entry(each.method, each.options, budgets) for each in entries_for(row["method"], chosen, model)]
    return entries
