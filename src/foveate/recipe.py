"""Recipes: a method with its options in a small YAML file, and what is known about where it came from.

    version: 1
    method: fastv
    options:
      keep: 0.35
      layer: 3
    provenance:            # free; `foveate tune` writes what it measured
      model: zoo:tiny-llava

Several methods in one model (`Chain`) are a list under `chain:` in place of `method:` and `options:`, each item with
its own `method:` and `options:`. `method: full` is the unreduced model. A method from outside has the name of its entry
point, or is written `module:Class`, which imports that module. Only plain values can be written; nothing in a file is
ever executed.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .files import write_whole
from .reducers.chain import Chain
from .reduction import OptionError, Reducer, UnsupportedError, build, name_of

__all__ = ["FULL", "FullModel", "RecipeError", "describe", "load", "provenance", "save"]

FULL = "full"
"""What `method:` says where nothing is to be removed."""
_VERSION = 1
_TOP = ("version", "method", "options", "chain", "provenance")
_MEMBER = ("method", "options")
_PLAIN = (bool, int, float, str, type(None))


class RecipeError(OptionError):
    """A recipe cannot be read or written. The message names the file and the key."""


class FullModel(Reducer):
    """Removes nothing: what a search answers with where no reduction is good enough."""

    def decide(self, view: Any) -> None:
        """Leave everything as it is."""


def load(path: str | os.PathLike[str]) -> Reducer:
    """The method a recipe describes, ready for `foveate.apply(model, foveate.load("recipe.yaml"))`.

    Raises:
        RecipeError: no such file, not YAML, an unknown or missing key, an option or budget the method does not take.
    """
    recipe = _read(path)
    if "chain" not in recipe:
        return _build(path, recipe, "")
    if "method" in recipe or "options" in recipe:
        raise RecipeError(f"recipe {path}: give either chain or method, not both")
    members = recipe["chain"]
    if not isinstance(members, list) or not members:
        raise RecipeError(f"recipe {path}: chain must be a list of methods")
    built = []
    for number, member in enumerate(members):
        where = f"chain[{number}]."
        if not isinstance(member, dict):
            raise RecipeError(f"recipe {path}: chain[{number}] must have a method and its options")
        _known(path, member, _MEMBER, where)
        built.append(_build(path, member, where))
    return Chain(*built)


def provenance(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a recipe says about where it came from, {} if nothing. Raises `RecipeError` as `load` does."""
    return dict(_read(path).get("provenance") or {})


def save(path: str | os.PathLike[str], reducer: Reducer, **provenance: Any) -> None:
    """Write a recipe, whole or not at all.

    Args:
        path: of the file; its folder is made.
        reducer: a method that is known by name, a `Chain` of such, or `FullModel`.
        **provenance: plain values, lists and dicts of them. The date and the version of Foveate are added.

    Raises:
        RecipeError: an option is no plain value (a loaded companion model, say), or the file cannot be written.
    """
    try:
        body = describe(reducer)
    except OptionError as error:
        raise RecipeError(f"recipe {path}: {error}") from error
    origin = {**provenance, "foveate": _installed(), "date": datetime.date.today().isoformat()}
    document = {"version": _VERSION, **body, "provenance": origin}
    try:
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path}: provenance holds more than plain values ({_line(error)})") from error
    try:
        write_whole(Path(path), f'# foveate.apply(model, foveate.load("{Path(path).name}"))\n{text}')
    except OSError as error:
        raise RecipeError(f"recipe {path}: cannot be written ({error.strerror})") from error


def describe(reducer: Reducer) -> dict[str, Any]:
    """A method as plain values: {"method", "options"} without the options left at their defaults, or {"chain": [...]}.

    Raises:
        OptionError: no method known by name, or an option that is no plain value.
    """
    if isinstance(reducer, Chain):
        return {"chain": [describe(member) for member in reducer.members]}
    if isinstance(reducer, FullModel):
        return {"method": FULL}
    name = name_of(type(reducer))
    options: dict[str, Any] = {}
    if not dataclasses.is_dataclass(reducer):
        raise OptionError(f"{name} is no dataclass, so its options cannot be read off it")
    for field in dataclasses.fields(reducer):
        value = getattr(reducer, field.name)
        if (
            not field.init
            or (value is field.default)
            or (type(value) is type(field.default) and value == field.default)
        ):
            continue
        options[field.name] = _plain(f"{name}: option {field.name}", value)
    return {"method": name, "options": options} if options else {"method": name}


# -------------------------------------------------------------------------------------------------------- reading
def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"recipe {path}: cannot be read ({reason})") from error
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path}: not YAML ({_line(error)})") from error
    if not isinstance(recipe, dict):
        raise RecipeError(f"recipe {path}: expected the keys {', '.join(_TOP)}")
    _known(path, recipe, _TOP, "")
    version = recipe.get("version")
    if isinstance(version, bool) or version != _VERSION:
        raise RecipeError(f"recipe {path}: version is {version!r}; this Foveate reads version {_VERSION}")
    if not isinstance(recipe.get("provenance") or {}, dict):
        raise RecipeError(f"recipe {path}: provenance must be a mapping")
    return recipe


def _known(path: Any, found: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in found:
        if key not in known:
            raise RecipeError(f"recipe {path}: unknown key {where}{key}; known: {', '.join(known)}")


def _build(path: Any, part: Mapping[str, Any], where: str) -> Reducer:
    method, options = part.get("method"), part.get("options")
    options = {} if options is None else options
    if not isinstance(method, str):
        raise RecipeError(f"recipe {path}: {where}method is missing or no name")
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise RecipeError(f"recipe {path}: {where}options must be a mapping of names to values")
    for name, value in options.items():
        try:
            _plain("", value)
        except OptionError as error:
            raise RecipeError(f"recipe {path}: {where}options.{name} must be a plain value") from error
    if method == FULL:
        if options:
            raise RecipeError(f"recipe {path}: {where}options: the full model has none")
        return FullModel()
    try:
        return build(method, **options)
    except (ValueError, TypeError, UnsupportedError) as error:  # BudgetError and OptionError are ValueErrors
        raise RecipeError(f"recipe {path}: {where}{method}: {error}") from error


# -------------------------------------------------------------------------------------------------------- writing
def _plain(what: str, value: Any) -> Any:
    if hasattr(value, "item") and not hasattr(value, "__len__"):
        value = value.item()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple):
        return [_plain(what, each) for each in value]
    raise OptionError(f"{what} is a {type(value).__name__}, which a recipe cannot hold")


def _installed() -> str:
    try:
        return importlib.metadata.version("foveate")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or "cannot be parsed"
    return reason if mark is None else f"{reason}, line {mark.line + 1}"
