"""SparseVLM's options, checked, and what they mean for one sample: after which layers how many of its tokens go."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from ..ops import schedule
from ..reduction import Budget, OptionError, Positions, Reducer
from ._layers import check_layer, resolve_layer

__all__ = ["Options", "Plan", "Rules", "SparseVLMDetails"]

# What code and paper disagree on, the code's choice first.
_CHOICES: dict[str, tuple[Any, Any]] = {
    "merge": ("mean", "sum"),
    "assignment": ("euclidean", "cosine"),
    "isolation": ("sample", "token"),
    "normalise": (True, False),
    "rater_threshold": ("greater", "greater_equal"),
    "rank_rows": ("raters", "text"),
    "score_rows": ("raters", "text"),
}
_CODE = {name: code for name, (code, _) in _CHOICES.items()}
_PAPER = {name: paper for name, (_, paper) in _CHOICES.items()} | {"score_rows": "raters"}
_VARIANTS = ("1.5", "1.0", "2.0", "paper")


def _check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value is one or (isinstance(one, str) and value == one) for one in allowed):
        raise OptionError(f"{name}={value!r}: use {', '.join(repr(one) for one in allowed if one is not None)}")


def _check_number(name: str, value: Any, wanted: str, low: float, high: float, required: bool = False) -> None:
    if value is None and not required:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and low < value <= high and math.isfinite(value)):
        raise OptionError(f"{name}={value!r}: give {wanted}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True)
class SparseVLMDetails:
    """The points on which SparseVLM's paper and code differ, or on which the paper gives no number.

    What is None is what the variant says: the code's choice in "1.0", "1.5" and "2.0", the paper's in "paper".

    Args:
        tau: share of the removed tokens that are clustered.
        theta: clusters, as a share of the clustered tokens.
        neighbours: k of the density; None: the number of clusters.
        merge: "mean" (code) or "sum" (paper) of a cluster.
        assignment: to the centre at the smallest "euclidean" distance (code) or of the highest "cosine" (paper).
        isolation: delta of the densest token: the largest distance of the "sample" (code) or of that "token" (paper).
        normalise: divide distances by sqrt(hidden size) (code; not in the paper).
        rater_threshold: relevance "greater" than the mean (code) or "greater_equal" (paper, eq. 5).
        rank_rows: P has a row for each of the "raters" (code) or for all "text" after the image (paper).
        score_rows: a score is the mean over the "raters" or over all "text" after the image.
        head_share: share of the heads that count in 2.0.
        gravity_floor: guard of 2.0: the smallest correction weight, as a share of the one at distance 0. The official
            weight changes sign beyond 1,707 tokens. Distances are counted in slots of the prompt.

    Raises:
        OptionError: a value that is not possible.
    """

    tau: float = 0.3
    theta: float = 0.1
    neighbours: int | None = None
    merge: Literal["mean", "sum"] | None = None
    assignment: Literal["euclidean", "cosine"] | None = None
    isolation: Literal["sample", "token"] | None = None
    normalise: bool | None = None
    rater_threshold: Literal["greater", "greater_equal"] | None = None
    rank_rows: Literal["raters", "text"] | None = None
    score_rows: Literal["raters", "text"] | None = None
    head_share: float = 0.5
    gravity_floor: float = 0.05

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            _check_choice(name, getattr(self, name), (*allowed, None))
        for name in ("tau", "theta", "head_share", "gravity_floor"):
            _check_number(name, getattr(self, name), "a number in (0, 1]", 0, 1, required=True)
        if not (self.neighbours is None or _is_count(self.neighbours)):
            raise OptionError(f"neighbours={self.neighbours!r}: give a number of tokens, at least 1")

    @classmethod
    def of(cls, given: SparseVLMDetails | Mapping[str, Any]) -> SparseVLMDetails:
        """From itself, or from a mapping of some of its fields. Raises `OptionError`."""
        if isinstance(given, cls):
            return given
        known = [each.name for each in dataclasses.fields(cls)]
        if not isinstance(given, Mapping):
            raise OptionError(f"details={given!r}: give a mapping with some of {', '.join(known)}")
        for name in given:
            if name not in known:
                raise OptionError(f"details has no {name!r}; it has: {', '.join(known)}")
        return cls(**given)

    def resolved(self, variant: str) -> SparseVLMDetails:
        """With the variant's choice wherever this one has none."""
        own = _PAPER if variant == "paper" else _CODE
        return replace(self, **{name: value for name, value in own.items() if getattr(self, name) is None})


@dataclass
class Options(Reducer):
    """What `SparseVLM` can be told; its docstring says what each option does."""

    keep: int | float = 1 / 3
    variant: Literal["1.5", "1.0", "2.0", "paper"] = "1.5"
    faithful: bool = False
    layers: Sequence[int | float] | None = None
    counts: Sequence[int] | None = None
    recycle: bool | None = None
    scale: float | None = None
    bias: float | None = None
    lam: float | None = None
    positions: Positions | None = None  # type: ignore[assignment]
    details: SparseVLMDetails = SparseVLMDetails()

    def __post_init__(self) -> None:
        self.budget = Budget(self.keep)
        self.variant = str(self.variant)  # type: ignore[assignment]  # a command line makes 1.5 a number
        self.details = SparseVLMDetails.of(self.details)
        _check_options(self)
        self.layers, self.counts = _numbers("layers", self.layers), _numbers("counts", self.counts)
        if self.positions is None:
            self.positions = "renumber" if self.faithful and self.variant != "2.0" else "keep"

    @property
    def official_budget(self) -> int:
        """`keep` as a number of LLaVA-1.5's 576 tokens, 0 if that is not whole."""
        keep = self.budget.keep
        tokens = keep * schedule.TOKENS if isinstance(keep, float) else keep
        return round(tokens) if abs(tokens - round(tokens)) < 1e-6 else 0

    @property
    def recycles(self) -> bool:
        """Whether the best of the removed tokens are merged."""
        return self.variant != "2.0" if self.recycle is None else self.recycle

    @property
    def choices(self) -> Any:
        """The `SparseVLMDetails`, the variant's choice wherever they are None."""
        return self.details.resolved(self.variant)


# ------------------------------------------------------------------------------------------------------ how many
class Plan(NamedTuple):
    """What one sample is going to lose: after which layers, and how many stay where that is fixed beforehand."""

    target: float
    layers: tuple[int, ...]
    kept: tuple[int, ...] = ()


class Rules:
    """The options in a decoder of some depth. Raises `OptionError` where they do not fit it.

    Attributes:
        layers: after which any sample may lose tokens.
    """

    def __init__(self, options: Options, depth: int):
        self._options, self._depth = options, depth
        tau, theta, guarded = options.details.tau, options.details.theta, not options.faithful
        self._recycling = schedule.Recycling(tau, theta, guarded) if options.recycles else None
        self._late = self._pruning_layers()
        fixed = options.faithful or options.layers or options.counts or options.scale or options.lam
        self._early = self._late if fixed else tuple(sorted({0, *self._late[1:]}))
        keep = options.budget.keep
        # Which of the two a count means depends on how many visual tokens a sample has.
        found = self._layers_for(keep) if isinstance(keep, float) else (*self._late, *self._early)
        self.layers = tuple(sorted(set(found)))

    def _pruning_layers(self) -> tuple[int, ...]:
        options, depth, keep = self._options, self._depth, self._options.budget.keep
        official = schedule.RANK_LAYERS if options.variant == "1.0" else schedule.LAYERS
        if options.faithful:
            return tuple(layer for layer in official if layer < depth)
        if options.layers is not None:
            found = tuple(sorted({resolve_layer(layer, depth, 0, "layers") for layer in options.layers}))
        else:
            found = tuple(range(depth)) if options.variant == "paper" else schedule.scaled_layers(official, depth)
        if options.counts is not None and len(options.counts) != len(found):
            raise OptionError(f"counts={options.counts}: here it takes {len(found)}, for the layers {found}")
        bound = options.layers is not None and not (options.counts or options.scale or options.lam)
        if bound and isinstance(keep, float) and keep * depth <= found[0]:
            raise OptionError(
                f"keep={keep} as a mean over {depth} layers cannot be met: the first {found[0]} keep all tokens; "
                "choose earlier layers"
            )
        return found

    def _layers_for(self, share: float) -> tuple[int, ...]:
        early = bool(self._late) and schedule.needs_early_start(share, self._late, self._depth)
        return self._early if early else self._late

    def plan(self, tokens: int, counted: int) -> Plan:
        """For a sample with that many visual tokens, of which a count as budget leaves `counted`."""
        options, keep = self._options, self._options.budget.keep
        target = keep * tokens if isinstance(keep, float) else float(counted)
        if not tokens:
            return Plan(0.0, ())
        if options.counts is not None:
            return Plan(target, self._late, tuple(options.counts))
        if options.faithful and options.variant != "1.0":
            return Plan(target, self._late, schedule.COUNTS[options.variant][options.official_budget])
        if options.faithful or options.scale is not None or options.lam is not None:
            return Plan(target, self._late)
        if target >= tokens:
            return Plan(target, ())
        target, layers = max(target, 1.0), self._layers_for(target / tokens)
        if options.variant not in schedule.COUNTS:
            return Plan(target, layers)
        kept = schedule.kept_counts(options.variant, tokens, target, layers, self._depth, self._recycling)
        return Plan(target, layers, kept)

    def rule(self, plan: Plan, tokens: int, rank: int) -> tuple[float, float]:
        """Scale and bias of 1.0, or lambda of the paper, given the first rank measured in a sample."""
        options, rest = self._options, (plan.target, plan.layers, self._depth, self._recycling)
        if options.variant == "paper":
            return options.lam or schedule.paper_share(tokens, rank, *rest), 0.0
        bias = options.bias or 0.0
        if options.scale is not None:
            return options.scale, bias
        if options.faithful:
            return schedule.RANK_RULE[options.official_budget]
        return schedule.rank_scale(tokens, rank, bias, *rest), bias

    def counts(self, wanted: int, tokens: int) -> tuple[int, int, int]:
        """Of `tokens`, `wanted` of which should stay: how many stay, are clustered, and come back merged."""
        if self._options.faithful:  # one goes at least
            kept = max(0, min(wanted, tokens - 1))
        else:
            kept = max(1, min(wanted, tokens))
        pool, merged = self._recycling.sizes(tokens - kept, kept) if self._recycling else (0, 0)
        if not self._options.faithful and kept + merged >= tokens:
            return tokens, 0, 0
        return kept, pool, merged


# --------------------------------------------------------------------------------------------------------- checks
def _check_options(options: Options) -> None:
    """Refuse what no model can be reduced with. Raises `OptionError`."""
    _check_choice("variant", options.variant, _VARIANTS)
    _check_choice("faithful", options.faithful, (True, False))
    _check_choice("recycle", options.recycle, (True, False, None))
    _check_choice("positions", options.positions, ("keep", "renumber", None))
    _check_number("lam", options.lam, "a number in (0, 1]", 0, 1)
    _check_number("scale", options.scale, "a positive number", 0, math.inf)
    _check_number("bias", options.bias, "a number", -math.inf, math.inf)
    for name, variant in (("scale", "1.0"), ("bias", "1.0"), ("lam", "paper")):
        if getattr(options, name) is not None and options.variant != variant:
            raise OptionError(f"{name} belongs to variant={variant!r}, this is {options.variant!r}")
    for layer in _numbers("layers", options.layers) or ():
        check_layer(layer, first=0, option="layers")
    counts = _numbers("counts", options.counts)
    if counts and (options.variant not in schedule.COUNTS or not all(map(_is_count, counts))):
        raise OptionError(f"counts={counts}: give counts of at least 1, with variant='1.5' or '2.0'")
    if options.faithful:
        _check_faithful(options)


def _check_faithful(options: Options) -> None:
    if options.variant == "paper":
        raise OptionError("faithful=True is the official code, and there is none for variant='paper'")
    own = "keep" if options.variant == "2.0" else "renumber"
    given = {"layers": options.layers, "recycle": options.recycle, **vars(options.details)}
    fixed = {"layers": None, "recycle": None, **vars(SparseVLMDetails())}
    for name, value in fixed.items():
        if given[name] != value:
            raise OptionError(f"{name}={given[name]!r} cannot go with faithful=True, which fixes it")
    if options.positions not in (own, None):
        raise OptionError(f"positions={options.positions!r} cannot go with faithful=True, which means {own!r}")
    table: Any = schedule.RANK_RULE if options.variant == "1.0" else schedule.COUNTS[options.variant]
    if options.official_budget not in table and options.counts is None and options.scale is None:
        raise OptionError(
            f"keep={options.keep}: the official code ({options.variant}) has schedules for "
            f"{', '.join(map(str, table))} of 576 tokens only; choose one of these, or faithful=False"
        )


def _numbers(name: str, value: Any) -> tuple[Any, ...] | None:
    """One number, several, or text such as "2,6,15" from a command line, as a tuple. Raises `OptionError`."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = tuple(float(word) if "." in word else int(word) for word in value.split(","))
        except ValueError:
            raise OptionError(f"{name}={value!r}: give numbers with commas between them") from None
    found = tuple(value) if isinstance(value, Sequence) else (value,)
    if not found:
        raise OptionError(f"{name}={value!r}: give at least one")
    return found
