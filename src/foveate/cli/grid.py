"""How the grid of a sweep is written on a command line, and in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import foveate

from ..files import YamlError, read_yaml
from ..reduction import info
from .shell import CommandError, option_value

__all__ = ["listed_recipes"]


def listed_recipes(
    methods: str | None, option: Sequence[str], grid: Path | None, model: str
) -> tuple[list[Any], set[str]]:
    """What takes part, without budgets and seeds, and which methods were asked for by name.

    Args:
        methods: names separated by commas, each possibly with [option=value;...]; "all" is every method. None: all,
            unless there is a file.
        option: METHOD.NAME=VALUE, for every recipe of that method on the command line.
        grid: YAML list of {method, options, keep}.
        model: on which they compete.

    Raises:
        CommandError, OptionError: whatever is wrong with them.
    """
    from ..evaluate.grid import recipes_for

    common = _common(option)
    listed = _split("all" if methods is None and grid is None else methods or "")
    named = [_named(text) for text in listed if text != "all"]
    known = {name for name, _ in named}
    rest: list[tuple[str, dict[str, Any]]] = (
        [(name, {}) for name in foveate.names() if name not in known] if "all" in listed else []
    )
    found = []
    for name, chosen in [*named, *rest]:
        found += recipes_for(name, {**common.get(name, {}), **chosen}, model)
    idle = common.keys() - {recipe.method for recipe in found}
    if idle:
        raise CommandError(f"option {min(idle)}.{next(iter(common[min(idle)]))}: {min(idle)} takes no part")
    if grid is not None:
        from_file = _from_file(grid, model)
        known |= {recipe.method for recipe in from_file}
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
    from ..evaluate.grid import recipes_for

    try:
        rows = read_yaml(path)
    except YamlError as error:
        raise CommandError(f"grid {path}: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise CommandError(f"grid {path}: a list of entries with method, options and keep is expected")
    recipes = []
    for number, row in enumerate(rows, 1):
        where = f"grid {path}, entry {number}"
        if not (
            isinstance(row, dict) and isinstance(row.get("method"), str) and row.keys() <= {"method", "options", "keep"}
        ):
            raise CommandError(f"{where}: needs method, and may have options and keep")
        chosen, budgets = row.get("options") or {}, row.get("keep")
        if not isinstance(chosen, dict):
            raise CommandError(f"{where}: options must be a mapping")
        for each in recipes_for(row["method"], chosen, model):
            if budgets is None:
                recipes.append(each)
                continue
            for keep in budgets if isinstance(budgets, list) else [budgets]:
                options = each.options if keep is not None else {**each.options, "keep": None}
                recipes.append(replace(each, options=options, keep=keep))
    return recipes
