"""`Recipe`, the one written form of "a method with its options", and the small YAML file that holds one:

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .files import YamlError, read_yaml, write_whole
from .reducers.chain import Chain
from .reduction import OptionError, Reducer, UnsupportedError, build, name_of

__all__ = ["CHAIN", "FULL", "FullModel", "Recipe", "RecipeError", "describe", "load", "provenance", "save"]

FULL, CHAIN = "full", "chain"
"""What `method` says where nothing is to be removed, and for several methods in one model."""
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


@dataclass(frozen=True)
class Recipe:
    """A method with its options.

    Attributes:
        method: as for `foveate.build`; "full" is the unreduced model, "chain" several methods in one.
        options: those that differ from the defaults, as plain values. Those of a chain are `members`, a list of
            {"method", "options"}. A `keep` among them, or among those of the first member, becomes the attribute.
        keep: the budget, of the first member in a chain; None where another option says how much stays.
        seed: of a method that draws at random.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    keep: int | float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        given: Any = self.options
        if self.method == CHAIN:
            given = given["members"][0].get("options") or {}
        if given.get("keep") is None:
            return
        others = {name: value for name, value in given.items() if name != "keep"}
        if self.method == CHAIN:
            first, *rest = self.options["members"]
            others = {**self.options, "members": [{**first, "options": others}, *rest]}
        object.__setattr__(self, "options", others)
        if self.keep is None:
            object.__setattr__(self, "keep", given["keep"])

    @classmethod
    def of(cls, reducer: Reducer) -> Recipe:
        """The recipe of a built method. Raises `OptionError` where it has no name or an option is no plain value."""
        if isinstance(reducer, Chain):
            return cls(CHAIN, {"members": [_member(cls.of(member)) for member in reducer.members]})
        if isinstance(reducer, FullModel):
            return cls(FULL)
        name = name_of(type(reducer))
        if not dataclasses.is_dataclass(reducer):
            raise OptionError(f"{name} is no dataclass, so its options cannot be read off it")
        return cls(name, _chosen(name, reducer))

    @property
    def is_full(self) -> bool:
        """Whether this is the unreduced model."""
        return self.method == FULL

    @property
    def members(self) -> list[Recipe]:
        """The methods of a chain, the first with its budget; else this one alone."""
        if self.method != CHAIN:
            return [self]
        found = [Recipe(each["method"], each.get("options") or {}) for each in self.options["members"]]
        return [found[0] if self.keep is None else dataclasses.replace(found[0], keep=self.keep), *found[1:]]

    @property
    def row(self) -> str:
        """Short and readable, the seed left out: `fastv[layer=1]@0.33`."""
        if self.method == CHAIN:
            first, *others = self.members
            inside = "+".join([dataclasses.replace(first, keep=None).row, *(other.row for other in others)])
        else:
            inside = ";".join(f"{name}={_word(value)}" for name, value in sorted(self.options.items()))
        budget = "" if self.keep is None or self.is_full else f"@{self.keep:g}"
        return f"{self.method}{f'[{inside}]' if inside else ''}{budget}"

    @property
    def id(self) -> str:
        """`row` with the seed: `random@0.2#2`."""
        return self.row if self.seed is None else f"{self.row}#{self.seed}"

    @property
    def arguments(self) -> dict[str, Any]:
        """All options, `keep` and `seed` among them."""
        given = {"keep": self.keep, "seed": self.seed}
        return {**{name: value for name, value in given.items() if value is not None}, **self.options}

    def build(self, **more: Any) -> Reducer:
        """The method, anew, with `more` options. Raises `OptionError`, `BudgetError`."""
        if self.is_full:
            return FullModel()
        if self.method == CHAIN:
            return Chain(*(member.build(**more) for member in self.members))
        return build(self.method, **{**self.arguments, **more})

    def to_json(self) -> dict[str, Any]:
        """As it is written in the files of a sweep."""
        return {
            "id": self.id, "method": self.method, "options": dict(self.options), "keep": self.keep, "seed": self.seed
        }  # fmt: skip

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Recipe:
        """What `to_json` wrote."""
        return cls(row["method"], row["options"], row["keep"], row["seed"])


def _chosen(what: str, made: Any) -> dict[str, Any]:
    """The options of a dataclass that differ from their defaults, as plain values."""
    chosen = {}
    for each in dataclasses.fields(made):
        value, where = getattr(made, each.name), f"{what}: option {each.name}"
        same_kind = type(value) is type(each.default)
        if each.init and not (value is each.default or (same_kind and value == each.default)):
            nested = same_kind and dataclasses.is_dataclass(value)
            chosen[each.name] = _chosen(where, value) if nested else _plain(where, value)
    return chosen


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_word(each)}' for name, each in sorted(value.items()))}}}"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


class _Dumper(yaml.SafeDumper):
    """Writes a list that occurs twice twice: `load` takes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


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
        text = yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"recipe {path}: provenance holds more than plain values") from error
    try:
        write_whole(Path(path), f'# foveate.apply(model, foveate.load("{Path(path).name}"))\n{text}')
    except OSError as error:
        raise RecipeError(f"recipe {path}: cannot be written ({error.strerror})") from error


def describe(reducer: Reducer) -> dict[str, Any]:
    """A method as in a file: {"method", "options"} without the options left at their defaults, or {"chain": [...]}.

    Raises:
        OptionError: no method known by name, or an option that is no plain value.
    """
    recipe = Recipe.of(reducer)
    if recipe.method == CHAIN:
        return {CHAIN: [_member(member) for member in recipe.members]}
    return _member(recipe)


def _member(recipe: Recipe) -> dict[str, Any]:
    options = recipe.arguments
    return {"method": recipe.method, "options": options} if options else {"method": recipe.method}


# -------------------------------------------------------------------------------------------------------- reading
def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        recipe = read_yaml(path)
    except YamlError as error:
        raise RecipeError(f"recipe {path}: {error}") from error
    if not isinstance(recipe, dict):
        raise RecipeError(f"recipe {path}: expected the keys {', '.join(_TOP)}")
    _known(path, recipe, _TOP, "")
    version = recipe.get("version")
    if isinstance(version, bool) or version != _VERSION:
        raise RecipeError(f"recipe {path}: version is {repr(version)[:40]}; this Foveate reads version {_VERSION}")
    if not isinstance(recipe.get("provenance") or {}, dict):
        raise RecipeError(f"recipe {path}: provenance must be a mapping")
    return recipe


def _known(path: Any, found: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in found:
        if key not in known:
            raise RecipeError(f"recipe {path}: unknown key {where}{str(key)[:40]}; known: {', '.join(known)}")


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
    if method == CHAIN:
        raise RecipeError(f"recipe {path}: {where}method: several methods are a list under chain:")
    if method == FULL and options:
        raise RecipeError(f"recipe {path}: {where}options: the full model has none")
    try:
        return Recipe(method, options).build()
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
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: _plain(what, each) for name, each in value.items()}
    raise OptionError(f"{what} is a {type(value).__name__}, which a recipe cannot hold")


def _installed() -> str:
    try:
        return importlib.metadata.version("foveate")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"
