"""SparseVLM's options checked, and what they mean for one sample: after which layers how many of its tokens go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..ops import schedule
from ..reduction import OptionError
from ._layers import check_layer, resolve_layer

if TYPE_CHECKING:
    from .sparsevlm import SparseVLM

__all__ = ["CHOICES", "OWN", "Plan", "Rules", "check_options"]

# What code and paper disagree on. The code's choice comes first.
CHOICES: dict[str, tuple[Any, ...]] = {
    "recycle": (True, False),
    "merge": ("mean", "sum"),
    "assignment": ("euclidean", "cosine"),
    "isolation": ("sample", "token"),
    "normalise": (True, False),
    "rater_threshold": ("greater", "greater_equal"),
    "rank_rows": ("raters", "text"),
    "score_rows": ("raters", "text"),
}
_CODE = {name: allowed[0] for name, allowed in CHOICES.items()}
_PAPER = {name: allowed[1] for name, allowed in CHOICES.items()} | {"recycle": True, "score_rows": "raters"}
OWN = {"1.5": _CODE, "1.0": _CODE, "2.0": {**_CODE, "recycle": False}, "paper": _PAPER}
"""What each variant means by an option that is None."""


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

    def __init__(self, options: SparseVLM, depth: int):
        self._options, self._depth = options, depth
        merges, guarded = options.choice("recycle"), not options.faithful
        self._recycling = schedule.Recycling(options.tau, options.theta, guarded) if merges else None
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
def check_options(options: SparseVLM) -> None:
    """Refuse what no model can be reduced with. Raises `OptionError`."""
    _check_choice("variant", options.variant, tuple(OWN))
    _check_choice("faithful", options.faithful, (True, False))
    _check_choice("positions", options.positions, ("keep", "renumber", None))
    for name, allowed in CHOICES.items():
        _check_choice(name, getattr(options, name), (*allowed, None))
    for name in ("tau", "theta", "lam", "head_share", "gravity_floor"):
        _check_number(name, getattr(options, name), "a number in (0, 1]", 0, 1)
    _check_number("scale", options.scale, "a positive number", 0, math.inf)
    _check_number("bias", options.bias, "a number", -math.inf, math.inf)
    if not (options.neighbours is None or _is_count(options.neighbours)):
        raise OptionError(f"neighbours={options.neighbours!r}: give a number of tokens, at least 1")
    for name, variant in (("scale", "1.0"), ("bias", "1.0"), ("lam", "paper")):
        if getattr(options, name) is not None and options.variant != variant:
            raise OptionError(f"{name} belongs to variant={variant!r}, this is {options.variant!r}")
    for layer in numbers("layers", options.layers) or ():
        check_layer(layer, first=0, option="layers")
    counts = numbers("counts", options.counts)
    if counts and (options.variant not in schedule.COUNTS or not all(map(_is_count, counts))):
        raise OptionError(f"counts={counts}: give counts of at least 1, with variant='1.5' or '2.0'")
    if options.faithful:
        _check_faithful(options)


def _check_faithful(options: SparseVLM) -> None:
    if options.variant == "paper":
        raise OptionError("faithful=True is the official code, and there is none for variant='paper'")
    own = "keep" if options.variant == "2.0" else "renumber"
    fixed = {**dict.fromkeys((*CHOICES, "layers", "neighbours")), "tau": 0.3, "theta": 0.1}
    for name, value in fixed.items():
        if getattr(options, name) != value:
            raise OptionError(f"{name}={getattr(options, name)!r} cannot go with faithful=True, which fixes it")
    if options.positions not in (own, None):
        raise OptionError(f"positions={options.positions!r} cannot go with faithful=True, which means {own!r}")
    table: Any = schedule.RANK_RULE if options.variant == "1.0" else schedule.COUNTS[options.variant]
    if options.official_budget not in table and options.counts is None and options.scale is None:
        raise OptionError(
            f"keep={options.keep}: the official code ({options.variant}) has schedules for "
            f"{', '.join(map(str, table))} of 576 tokens only; choose one of these, or faithful=False"
        )


def numbers(name: str, value: Any) -> tuple[Any, ...] | None:
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


def _check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value is one or (isinstance(one, str) and value == one) for one in allowed):
        raise OptionError(f"{name}={value!r}: use {', '.join(repr(one) for one in allowed if one is not None)}")


def _check_number(name: str, value: Any, wanted: str, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and low < value <= high and math.isfinite(value)):
        raise OptionError(f"{name}={value!r}: give {wanted}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
