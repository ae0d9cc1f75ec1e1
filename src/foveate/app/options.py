"""What the page lets one choose of a method: which methods work with a model, and their main options.

Everything is read off the registry and the methods' own dataclasses, so a new method appears by itself.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..engine.apply import apply
from ..files import YamlError, parse_yaml
from ..reduction import OptionError, UnsupportedError, build, info, names, options

__all__ = ["Choice", "Controls", "controls", "describe", "offered", "parse_options", "usable_methods"]

LONGEST_TEXT = 1000
"""Characters of a question, and of its options."""

_OUTSIDE_BRACKETS = re.compile(r"[,;\n](?![^\[]*\])(?![^{]*\})")


@dataclass(frozen=True)
class Choice:
    """An option that takes one of a few words."""

    name: str
    values: tuple[str, ...]
    default: str


@dataclass(frozen=True)
class Controls:
    """The controls of one method.

    Attributes:
        layer: (first, last, default) decoder layer to choose from; None where the method has no such option.
        choice: its first option that takes one of a few words.
        others: its remaining options, to be written as `name=value`.
    """

    layer: tuple[int, int, int] | None
    choice: Choice | None
    others: tuple[str, ...]


def usable_methods(model: nn.Module) -> list[str]:
    """Names of the methods that can be applied to `model`, sorted. The model is left as it was."""
    usable = []
    for name in names():
        if "keep" not in options(name):
            continue
        try:
            apply(model, build(name, keep=0.5)).remove()
        except (UnsupportedError, OptionError):
            continue
        usable.append(name)
    return usable


def controls(method: str, depth: int) -> Controls:
    """The controls of `method` for a decoder of `depth` layers. Raises `OptionError` for a method not offered."""
    known = options(offered(method))
    layer = choice = None
    default = known.get("layer")
    if isinstance(default, int):
        first = next(layer for layer in range(-1, default + 1) if _takes(method, layer))
        layer = (min(first, depth - 1), depth - 1, min(default, depth - 1))
    for name, hint in _hints(method).items():
        values = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        if known.get(name) in values:
            choice = Choice(name, values, known[name])
            break
    shown = {"keep", "faithful", "layer" if layer else "", choice.name if choice else ""}
    return Controls(layer, choice, tuple(name for name in known if name not in shown))


def _takes(method: str, layer: int) -> bool:
    try:
        build(method, keep=0.5, layer=layer)
    except OptionError:
        return False
    return True


def _hints(method: str) -> Mapping[str, Any]:
    """Option -> type, in the order of the dataclass."""
    cls: Any = type(build(method, keep=0.5))
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def offered(method: str) -> str:
    """`method`, if it is one of those listed: a visitor's `module:Class` imports nothing. Raises `OptionError`."""
    if method not in names():
        raise OptionError(f"unknown method {method!r}; known: {', '.join(names())}")
    return method


def describe(method: str) -> str:
    """One sentence: where the method acts, what it reads, and its paper."""
    about = info(offered(method))
    guided = "guided by the question" if about.text_guided else "not guided by the question"
    reads = "reads nothing" if about.needs == "nothing" else f"needs: {about.needs}"
    return f"Works {about.acts}; {reads}; {guided}. {about.paper}"


def parse_options(text: str) -> dict[str, Any]:
    """`"tau=0.5, layers=[1, 3]"` -> `{"tau": 0.5, "layers": [1, 3]}`. Raises `OptionError`."""
    if len(text) > LONGEST_TEXT:
        raise OptionError(f"options: too long, at most {LONGEST_TEXT} characters")
    chosen: dict[str, Any] = {}
    for part in filter(str.strip, _OUTSIDE_BRACKETS.split(text)):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise OptionError(f"option {part.strip()!r}: write it as name=value")
        try:
            chosen[name] = parse_yaml(value)
        except YamlError as error:
            raise OptionError(f"option {part.strip()!r}: the value cannot be read ({error})") from error
    return chosen
