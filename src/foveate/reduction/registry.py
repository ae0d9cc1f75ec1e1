"""How methods are found by name: shipped ones, those of installed packages, and `module:Class`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import OptionError
from .reducer import Reducer

__all__ = [
    "MethodInfo",
    "build",
    "check_names",
    "info",
    "name_of",
    "names",
    "options",
    "register",
    "type_of",
]


@dataclass(frozen=True)
class MethodInfo:
    """One row of `foveate methods`."""

    paper: str
    acts: str
    needs: str = "nothing"
    text_guided: bool = False


_R = TypeVar("_R", bound=type[Reducer])
_METHODS: dict[str, tuple[type[Reducer], MethodInfo]] = {}
_GROUP = "foveate.methods"
_complained: set[str] = set()


def register(name: str, info: MethodInfo) -> Callable[[_R], _R]:
    """Class decorator: make a method known by `name` to `build`, the command line and the servers."""

    def add(cls: _R) -> _R:
        if name in _METHODS:
            raise OptionError(f"method {name!r} is registered already, by {_METHODS[name][0].__qualname__}")
        cls.name = name
        _METHODS[name] = (cls, info)
        return cls

    return add


def names() -> tuple[str, ...]:
    """Names of the known methods, sorted: registered ones, and those of installed packages that can be imported."""
    for name, points in _installed(tuple(sys.path)).items():
        try:
            cls, _ = _METHODS.get(name) or _load(name, points)
            taken = all(cls.__module__.partition(".")[0] != point.module.partition(".")[0] for point in points)
            problem = f"method {name!r} of {_packages(points)} is left out: the name is taken" if taken else None
        except OptionError as error:
            problem = str(error)
        if problem and name not in _complained:
            _complained.add(name)
            logging.getLogger(__name__).warning(problem)
    return tuple(sorted(_METHODS))


@functools.lru_cache(maxsize=1)
def _installed(path: tuple[str, ...]) -> dict[str, list[importlib.metadata.EntryPoint]]:
    """The entry points of all packages on `path`; a package whose list cannot be read has none."""
    try:
        found = list(importlib.metadata.entry_points(group=_GROUP))
    except Exception:  # one unreadable list; read them one by one
        found = []
        for package in importlib.metadata.distributions():
            with contextlib.suppress(Exception):
                found += package.entry_points.select(group=_GROUP)
    by_name: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for point in dict.fromkeys(found):
        by_name.setdefault(point.name, []).append(point)
    return by_name


def _packages(points: Sequence[importlib.metadata.EntryPoint]) -> str:
    return " and ".join(point.dist.name if point.dist else point.module for point in points)


def _load(name: str, points: Sequence[importlib.metadata.EntryPoint]) -> tuple[type[Reducer], MethodInfo]:
    """A method of an installed package, registered from now on, whether or not its module registers it itself."""
    if len(points) > 1:
        places = " or ".join(point.value for point in points)
        raise OptionError(f"method {name!r} is offered by {_packages(points)}: ask for {places}")
    cls = _imported(points[0].value, f"method {name!r} of {_packages(points)}")
    if name not in _METHODS:  # its module has not registered it, or under another name
        _METHODS[name] = _known(name, cls)
    return _METHODS[name]


def _imported(place: str, what: str) -> type[Reducer]:
    """The class at `module:Class`; `what` begins the error."""
    module, _, attributes = place.partition(":")
    if not (module and attributes):
        raise OptionError(f"{what}: {place} is not of the form module:Class")
    try:
        found: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise OptionError(f"{what}: {place} cannot be imported ({reason})") from error
    if not (isinstance(found, type) and issubclass(found, Reducer)):
        raise OptionError(f"{what}: {place} is no subclass of foveate.Reducer")
    return found


def _known(name: str, cls: type[Reducer]) -> tuple[type[Reducer], MethodInfo]:
    """The entry of a class, made under `name` unless it is registered already."""
    entry = _METHODS.get(vars(cls).get("name", ""))
    if entry is None or entry[0] is not cls:
        summary = (cls.__doc__ or "").strip().partition("\n")[0]
        register(name, MethodInfo(summary, f"as {cls.__module__} says", "not stated"))(cls)
        return _METHODS[name]
    return entry


def _find(name: str) -> tuple[type[Reducer], MethodInfo]:
    if name in _METHODS:
        return _METHODS[name]
    if ":" in str(name):
        return _known(name, _imported(name, f"method {name!r}"))
    if points := _installed(tuple(sys.path)).get(name):
        return _load(name, points)
    known = names()
    if name in _METHODS:  # registered by a module that `names` has just imported
        return _METHODS[name]
    raise OptionError(f"unknown method {name!r}{_near(name, known)}; known: {', '.join(known)}")


def _near(name: str, known: Iterable[str]) -> str:
    """ ", did you mean ...?" where a known name is close to `name`."""
    plain = {re.sub("[-_ ]", "", each.lower()): each for each in known}
    close = difflib.get_close_matches(re.sub("[-_ ]", "", str(name).lower()), plain, 1)
    return f", did you mean {plain[close[0]]}?" if close else ""


def name_of(cls: type[Reducer]) -> str:
    """The name under which `build` finds a method in any process: registered, or `module:Class`.

    Raises:
        OptionError: it has none, because it is made inside a function or a script.
    """
    name = vars(cls).get("name", "")
    if name in _METHODS and _METHODS[name][0] is cls:
        return name
    place = f"{cls.__module__}:{cls.__qualname__}"
    if cls.__module__ == "__main__" or "<locals>" in place:
        raise OptionError(f"{cls.__name__} is not known by name; register it, or define it in a module")
    return place


def type_of(name: str) -> type[Reducer]:
    """The class of a method. Raises `OptionError` for an unknown name."""
    return _find(name)[0]


def info(name: str) -> MethodInfo:
    """Paper, place and needs of a method. Raises `OptionError` for an unknown name."""
    return _find(name)[1]


def options(name: str) -> dict[str, Any]:
    """Options of a method with their defaults (`dataclasses.MISSING` where one must be given)."""
    cls = type_of(name)
    fields: dict[str, dataclasses.Field[Any]] = getattr(cls, "__dataclass_fields__", {})
    found: dict[str, Any] = {}
    for option in inspect.signature(cls).parameters.values():
        if option.kind in (option.POSITIONAL_OR_KEYWORD, option.KEYWORD_ONLY):
            default = dataclasses.MISSING if option.default is option.empty else option.default
            factory = fields[option.name].default_factory if option.name in fields else dataclasses.MISSING
            found[option.name] = default if factory is dataclasses.MISSING else factory()
    return found


def check_names(name: str, chosen: Iterable[str]) -> None:
    """Refuse options that a method does not have. Raises `OptionError`."""
    known = options(name)
    if any(option.kind is option.VAR_KEYWORD for option in inspect.signature(type_of(name)).parameters.values()):
        return
    for option in chosen:
        if option in known:
            continue
        place = next((each for each, default in known.items() if _has_field(default, option)), None)
        hint = f", it belongs to {place}: {place}={{{option}: ...}}" if place else _near(option, known)
        raise OptionError(f"{name} has no option {option!r}{hint}; it has: {', '.join(known) or 'none'}")


def _has_field(default: Any, name: str) -> bool:
    return dataclasses.is_dataclass(default) and any(each.name == name for each in dataclasses.fields(default))


def build(name: str, **chosen: Any) -> Reducer:
    """A method by name, e.g. `build("sparsevlm", keep=192)`.

    Args:
        name: of a shipped method; of one that an installed package offers (entry point group `foveate.methods`,
            `NAME = module:Class`); or `module:Class` for any subclass of `Reducer` on the Python path.
        **chosen: its options.

    Raises:
        OptionError: an unknown name or option, a missing option, or a class that cannot be imported.
        BudgetError: a bad `keep`.
    """
    check_names(name, chosen)
    known = options(name)
    missing = [k for k, default in known.items() if default is dataclasses.MISSING and k not in chosen]
    if missing:
        raise OptionError(f"{name} needs {missing[0]}=")
    return type_of(name)(**chosen)
