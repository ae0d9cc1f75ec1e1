"""The vocabulary of Foveate: what a method sees, what it answers, and how methods are found by name.

Lives here: `Reducer`, `View`, `Tap`, `Decision`, `Budget`, the registry and the errors. Nothing here knows a model or
a hook; the engine (`foveate.engine`) builds the views and carries out the decisions.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import inspect
import logging
import math
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .engine.families.parts import Anatomy
    from .engine.layout import Layout

__all__ = [
    "BEFORE_LAYERS",
    "Budget",
    "BudgetError",
    "Decision",
    "MethodInfo",
    "OptionError",
    "Patches",
    "Positions",
    "Reducer",
    "Tap",
    "TapSpec",
    "UnsupportedError",
    "View",
    "VisionSpec",
    "bind",
    "build",
    "info",
    "name_of",
    "names",
    "register",
    "type_of",
]

BEFORE_LAYERS = -1
"""The stage before decoder layer 0. Stage `i >= 0` is "after decoder layer `i`"."""

Positions = Literal["keep", "renumber"]
"""How what is left is numbered: as it was, or anew, without gaps, in each layer and while decoding."""


# ------------------------------------------------------------------------------------------------------- errors
class UnsupportedError(RuntimeError):
    """This model, cache or combination cannot be served. The message says what can."""


class BudgetError(ValueError):
    """`keep` is not a positive number of tokens nor a fraction in (0, 1]."""


class OptionError(ValueError):
    """A method was asked for by an unknown name or with an unknown or impossible option."""


def known_positions(positions: Any) -> Any:
    """`positions` by its present name: "compact" is an old one of "renumber", and a DeprecationWarning says so."""
    if not (isinstance(positions, str) and positions == "compact"):
        return positions
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame, level = frame.f_back, level + 1
    message = "positions='compact' is an old name of 'renumber'"
    warnings.warn(message, DeprecationWarning, stacklevel=level)
    return "renumber"


# ------------------------------------------------------------------------------------------------------- budget
@dataclass(frozen=True)
class Budget:
    """How many visual tokens may stay: an int (tokens per image) or a float in (0, 1] (fraction of all of them)."""

    keep: int | float

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", self._check(self.keep))

    @staticmethod
    def _check(keep: Any) -> int | float:
        problem = f"keep={keep!r}: give a number of tokens (an int >= 1) or a fraction (a float in (0, 1])"
        if isinstance(keep, bool | str | bytes) or keep is None:
            raise BudgetError(problem)
        try:
            value = keep.item() if hasattr(keep, "item") else keep
            if isinstance(value, bool):
                raise BudgetError(problem)
            if isinstance(value, int):
                if value < 1:
                    raise BudgetError(problem)
                return value
            value = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise BudgetError(problem) from error
        if not (math.isfinite(value) and 0.0 < value <= 1.0):
            raise BudgetError(problem)
        return value

    @classmethod
    def parse(cls, text: str | int | float) -> Budget:
        """From a command line: "192" is a count, "0.22" a fraction. Raises `BudgetError`."""
        if not isinstance(text, str):
            return cls(text)
        try:
            return cls(int(text))
        except BudgetError:
            raise BudgetError(f"keep={text}: a count must be at least 1") from None
        except ValueError:
            pass
        try:
            return cls(float(text))
        except ValueError:
            raise BudgetError(
                f"keep={text}: give a number of tokens (an int >= 1) or a fraction (a float in (0, 1])"
            ) from None

    def of(self, tokens: int, images: int = 1) -> int:
        """Tokens that stay of `tokens` visual ones in `images` images: at least 1, at most all (0 of none)."""
        wanted = self.keep * images if isinstance(self.keep, int) else round(self.keep * tokens)
        return min(tokens, max(1, wanted))

    def per_row(self, tokens: Tensor, images: Tensor | None = None, most: int | None = None) -> Tensor:
        """`of` of every entry, on the device.

        Args:
            tokens: (N,) long, visual tokens of rows, or of images.
            images: (N,) long, images in each; None: one.
            most: a bound of `tokens` that is known without asking the device; a fraction needs one.

        Returns:
            (N,) long.
        """
        if isinstance(self.keep, int):
            wanted = torch.full_like(tokens, self.keep) if images is None else images * self.keep
            return torch.minimum(wanted.clamp_min(1), tokens)
        return look_up(tokens, int(tokens.max()) if most is None and len(tokens) else most or 0, self.of)


def look_up(tokens: Tensor, most: int, function: Callable[..., int], *args: Any) -> Tensor:
    """`function(n, *args)` of every `n` in `tokens`, in Python's own arithmetic: not every device has float64.

    Args:
        tokens: (...) long, from 0 to `most`.
        most: a bound, known without asking the device.
        function: of a whole number; equal ones must do the same.
        args: hashable.

    Returns:
        (...) long.
    """
    table = _table(function, args, 1 << most.bit_length())
    return torch.tensor(table, device=tokens.device)[tokens]


@functools.lru_cache(maxsize=256)
def _table(function: Callable[..., int], args: tuple[Any, ...], size: int) -> list[int]:
    return [function(n, *args) for n in range(size)]


# ------------------------------------------------------------------------------------------------- what is read
@dataclass(frozen=True)
class TapSpec:
    """What to read in the attention of a decoder layer, for the decision of the stage after that layer.

    Attributes:
        queries: which rows. `"last"`: the last prompt token; `"text"`: every token that is not visual; `"text_after"`:
            text after the last visual token of its row; a BoolTensor (B, S); or a function of `View.state` that returns
            one (for rows chosen at an earlier stage). None: nothing is read in this layer.
        heads: `"mean"` averages the heads, `"none"` hands them over one by one.
        keep_qk: also hand over the queries of the rows and all keys, after RoPE.
        ahead: `View.ahead` tells the row of the last token in the layer after the stage, before that layer runs. Only
            for decoders of the plain kind (`Anatomy.plain_attention`).
    """

    queries: str | Tensor | Callable[[dict[str, Any]], Tensor] | None = "last"
    heads: Literal["mean", "none"] = "mean"
    keep_qk: bool = False
    ahead: bool = False


@dataclass
class Tap:
    """Attention rows as read: softmax over *all* keys of the layer, with the layer's own mask, in float32.

    Attributes:
        weights: (B, R, N), or (B, H, R, N) with `heads="none"`.
        row_valid: (B, R) bool; False marks padding of a row list shorter than the longest in the batch.
        query_slots: (B, R) sequence slot of each row, 0 for padding.
        key_slots: (B, N) sequence slot of each key; -1 marks a filler, negative slots an earlier turn.
        query: (B, H, R, d) or None.  key: (B, Hkv, N, d) or None. With one-axis RoPE, turned as if the first token of
            the row, padding left out, were at position 0.
    """

    weights: Tensor
    row_valid: Tensor
    query_slots: Tensor
    key_slots: Tensor
    query: Tensor | None = None
    key: Tensor | None = None

    def to_slots(self, weights: Tensor, length: int) -> Tensor:
        """Spread the last axis of `weights` (B, ..., N) over sequence slots: (B, ..., length), 0 where no key is."""
        index = torch.where((self.key_slots < 0) | (self.key_slots >= length), length, self.key_slots)
        index = index.reshape(index.shape[0], *([1] * (weights.dim() - 2)), index.shape[-1]).expand_as(weights)
        out = weights.new_zeros(*weights.shape[:-1], length + 1)
        return out.scatter(-1, index, weights)[..., :length]

    def mean_over_rows(self) -> Tensor:
        """Mean over the valid rows: (B, N), or (B, H, N) with `heads="none"`."""
        valid = self.row_valid.to(self.weights.dtype)
        valid = valid[:, None, :, None] if self.weights.dim() == 4 else valid[:, :, None]
        return (self.weights * valid).sum(-2) / valid.sum(-2).clamp_min(1)

    def per_slot(self, length: int) -> Tensor:
        """`mean_over_rows` by sequence slot: (B, length) or (B, H, length)."""
        return self.to_slots(self.mean_over_rows(), length)


@dataclass(frozen=True)
class VisionSpec:
    """What to read in an attention layer of the vision tower.

    Attributes:
        attention: `"cls"`: the row of the CLS token; `"received"`: attention each token gets, averaged over the
            queries; `"auto"`: the first where the tower has a CLS token, else the second; None: nothing.
        key: also hand over the keys (before RoPE where the tower has any is not promised).
        query: also hand over the queries.
        features: also hand over the hidden states that leave this layer (LLaVA's features at layer -2).
    """

    attention: Literal["cls", "received", "auto"] | None = "auto"
    key: bool = False
    query: bool = False
    features: bool = False


@dataclass
class Patches:
    """Visual tokens as the vision tower saw them, aligned with the slots of the prompt.

    `I` blocks (an image, or each tile of one), `N` tokens in the longest. Where a model merges several patches into one
    visual token (2 x 2 in Qwen-VL, pixel shuffle, pooling), every quantity is the mean over the token's patches.

    Attributes:
        rows: (I,) long, row of the batch.
        slots: (I, N) long, slot of each token in its row; -1 where a block is shorter.
        grid: (I, 2) long, height and width of each block in tokens (0 where it is not known).
        attention: (I, H, N) float32 over the patches, softmax taken over all tokens of the tower (CLS included).
        key, query: (I, N, H, d).  cls_key: (I, H, d), only with a CLS token.  cls_query: (I, H, d).
        features: (I, N, C).  cls_features: (I, C).
    """

    rows: Tensor
    slots: Tensor
    grid: Tensor
    attention: Tensor | None = None
    key: Tensor | None = None
    query: Tensor | None = None
    features: Tensor | None = None
    cls_key: Tensor | None = None
    cls_query: Tensor | None = None
    cls_features: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """(I, N) bool."""
        return self.slots >= 0

    def to_slots(self, values: Tensor, batch: int, length: int) -> Tensor:
        """Spread per-token values (I, N) over the slots of the prompt: (batch, length), 0 where no token is."""
        index = torch.where(self.valid, self.rows[:, None] * length + self.slots, batch * length)
        out = values.new_zeros(batch * length + 1)
        return out.scatter(0, index.reshape(-1), values.reshape(-1))[:-1].view(batch, length)


# ----------------------------------------------------------------------------------------- what is seen and answered
@dataclass
class View:
    """What a method sees at a stage. `B` rows, `S` prompt slots, `D` hidden size.

    Only the prompt is shown: speculated candidates and tokens already generated are never part of a view.

    Attributes:
        stage: -1 before layer 0, i after layer i.
        hidden: (B, S, D) hidden states by slot; removed slots hold their last value.
        active: (B, S) bool, tokens still there.
        visual: (B, S) bool, slots of visual tokens (constant over the pass).
        tokens: (B, S) bool, not padding.
        tap: rows read in the layer of this stage, if asked for.
        vision: what was read in the vision tower: {layer as asked for: patches}.
        layout: which slot is which patch of which image.
        info: what the model was called with (`input_ids`, grids, image sizes, ...).
        state: a method's own scratch space, fresh for each prefill.
        project: the model's projector on single features, (..., C) -> (..., D); None where a visual token is not the
            projection of one patch alone, so that merged features cannot be projected.
        ahead: of `hidden` and `active`, the attention row of the last token in the next layer (`TapSpec.ahead`).
        tower_groups: (B, S) long, for a method whose tower works on fewer tokens (`Reducer.tower`): slots of a row with
            the same number show one token of the tower; -1 for all other slots. None: the tower did not run.
    """

    stage: int
    hidden: Tensor
    active: Tensor
    visual: Tensor
    tokens: Tensor
    tap: Tap | None = None
    vision: dict[int, Patches] = field(default_factory=dict)
    layout: Layout | None = None
    info: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    project: Callable[[Tensor], Tensor] | None = None
    ahead: Callable[[Tensor, Tensor], Tap] | None = None
    tower_groups: Tensor | None = None

    @property
    def active_visual(self) -> Tensor:
        """(B, S) bool: visual tokens, merged ones included, that are still there."""
        return self.active & self.visual

    @property
    def images(self) -> Tensor:
        """(B,) number of images in each row (1 where the layout is not known and there is a visual token)."""
        if self.layout is not None:
            return self.layout.image_counts.to(self.visual.device)
        return self.visual.any(1).long()


@dataclass
class Decision:
    """A method's answer.

    Attributes:
        keep: (B, S) bool, slots that stay; ANDed with what is still active. None: nothing is removed.
        slots: (B, m) long, slots whose state is overwritten (merged tokens). -1 marks padding of a shorter row.
        values: (B, m, D), the new states.
        origin: (B, S) long, for every slot the slot that carries its content from now on, -1 if it is dropped. Only for
            the record (pictures); without it every kept slot carries itself.
        scores: (B, S) float, for the record.
        positions: how this removal numbers what is left; None: as the reducer's `positions` says.
    """

    keep: Tensor | None = None
    slots: Tensor | None = None
    values: Tensor | None = None
    origin: Tensor | None = None
    scores: Tensor | None = None
    positions: Positions | None = None

    def __post_init__(self) -> None:
        self.positions = known_positions(self.positions)


class Reducer:
    """A method: it says where it acts and what it reads, and decides what stays.

    Subclass it with the attributes below and `decide`; no `super().__init__()` is needed. `foveate.apply` works with a
    copy (`bind`), so one instance may be applied to any number of models at once, and is never changed by it.
    """

    stages: Sequence[int] = ()
    taps: Mapping[int, TapSpec] = {}
    vision_taps: Mapping[int, VisionSpec] = {}
    """What to read in the vision tower, by attention layer; negative layers count from the end."""
    tower: Any = None
    """How the tower works on fewer tokens (`MergeSpec` or `ShrinkSpec` of `engine.vision`), None: it does not."""
    positions: Positions = "keep"

    name: ClassVar[str] = ""

    def prepare(self, anatomy: Anatomy) -> None:
        """Turn fractions into layer numbers, refuse what cannot work. Called once, on the copy made for a model.

        Assign new values to attributes; a list or dict that the method was made with is shared by all copies.
        """

    def decide(self, view: View) -> Decision | None:
        """Answer for one stage; None leaves everything as it is."""
        raise NotImplementedError(f"{type(self).__name__} must define decide(view)")


_B = TypeVar("_B")


def bind(method: _B, anatomy: Anatomy) -> _B:
    """A method at work in one model: a shallow copy, prepared for it. The method itself stays as it is.

    Args:
        method: a `Reducer`, or anything that works like one; a part of a method that has its own `prepare`.
        anatomy: the parts of the model.

    Raises:
        UnsupportedError, OptionError: whatever the method's `prepare` refuses.
    """
    bound = copy.copy(method)
    for name, value in tuple(getattr(bound, "__dict__", {}).items()):
        if isinstance(value, types.MethodType) and value.__self__ is method:  # `self.decide = self._one_of_two`
            setattr(bound, name, types.MethodType(value.__func__, bound))
    prepare = getattr(bound, "prepare", None)
    if prepare is not None:
        prepare(anatomy)
    if getattr(bound, "positions", None) == "compact":
        if any(stage != BEFORE_LAYERS for stage in getattr(bound, "stages", ())):
            raise UnsupportedError("positions='compact' is for removal before layer 0 only; use positions='renumber'")
        bound.positions = known_positions(bound.positions)  # type: ignore[attr-defined]
    return bound


# ----------------------------------------------------------------------------------------------------- registry
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
