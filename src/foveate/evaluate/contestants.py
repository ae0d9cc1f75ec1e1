"""Who takes part in a comparison: methods with their options, budgets and seeds; how they are named, built, refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import zoo
from ..engine.apply import apply
from ..reducers.chain import Chain
from ..reduction import Budget, BudgetError, OptionError, Reducer, UnsupportedError, build, options
from .answer import VLM, ZOO, prefill_seconds
from .data import Sample

__all__ = ["FULL", "Contestant", "Entry", "build_reducer", "entries_for", "expand", "refusal"]

COMPANIONS = ("clip", "siglip")
_TINY = ("zoo:tiny-llava", "zoo:tiny-clip")
CHAIN = "chain"
"""Several methods in one model: option `members` lists them as {method, options}; the first one gets the budget."""


@dataclass(frozen=True)
class Contestant:
    """One method at one budget, with one seed.

    Attributes:
        method: a name of the registry; "full" is the unreduced model, "chain" several methods (`CHAIN`).
        options: those that differ from the defaults, as JSON can hold them.
        keep: None where the method has another option that says how much stays.
        seed: None for a method without one.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    keep: int | float | None = None
    seed: int | None = None

    @property
    def row(self) -> str:
        """What the seeds of one row have in common: `fastv[layer=1]@0.33`."""
        if self.method == CHAIN:
            inside = "+".join(Contestant(each["method"], each["options"]).row for each in self.options["members"])
        else:
            inside = ";".join(f"{name}={_written(value)}" for name, value in sorted(self.options.items()))
        budget = "" if self.keep is None or self.is_full else f"@{self.keep:g}"
        return f"{self.method}{f'[{inside}]' if inside else ''}{budget}"

    @property
    def id(self) -> str:
        """Unique in a comparison: `random@0.33#2`."""
        return self.row if self.seed is None else f"{self.row}#{self.seed}"

    @property
    def is_full(self) -> bool:
        """Whether this is the unreduced model."""
        return self.method == "full"

    def to_json(self) -> dict[str, Any]:
        """As it is written in `sweep.json`."""
        return {
            "id": self.id,
            "method": self.method,
            "options": dict(self.options),
            "keep": self.keep,
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Contestant:
        """What `to_json` wrote."""
        return cls(row["method"], row["options"], row["keep"], row["seed"])


FULL = Contestant("full", keep=1.0)


@dataclass(frozen=True)
class Entry:
    """A method with options, before budgets and seeds are known. `keep`: its own budgets, None for the common ones."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    keep: Sequence[int | float | None] | None = None


def _written(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def entries_for(method: str, chosen: Mapping[str, Any], model: str) -> list[Entry]:
    """The entries that a method's name stands for in a sweep.

    One as a rule. Methods that compare patches with the question through a companion have two on the model that ships
    with one: without it, and with it.

    Raises:
        OptionError: unknown method or option.
    """
    if method == CHAIN:
        return [Entry(CHAIN, {"members": _members(chosen)})]
    known = options(method)
    for name in chosen:
        if name not in known:
            raise OptionError(f"{method} has no option {name!r}; it has: {', '.join(known)}")
    if "clip" in known and model == _TINY[0] and not {"similarity", "clip", "siglip"} & chosen.keys():
        # High cosines mark the relevant patches in tiny-clip, see its card.
        sign = {"negate": False} if "negate" in known and "negate" not in chosen else {}
        return [
            Entry(method, {**chosen, "similarity": "llm"}),
            Entry(method, {**chosen, "clip": _TINY[1], **sign}),
        ]
    return [Entry(method, dict(chosen))]


def _members(chosen: Mapping[str, Any]) -> list[dict[str, Any]]:
    members = chosen.get("members")
    if not isinstance(members, list) or not members or len(chosen) > 1:
        raise OptionError("chain needs members, a list of {method, options}, and nothing else")
    found = []
    for member in members:
        if not (
            isinstance(member, dict)
            and isinstance(member.get("method"), str)
            and member.keys() <= {"method", "options"}
        ):
            raise OptionError(f"chain: {member!r} is not {{method, options}}")
        (entry,) = entries_for(member["method"], member.get("options") or {}, "")
        found.append({"method": entry.method, "options": dict(entry.options)})
    return found


def expand(entries: Iterable[Entry], keeps: Sequence[int | float], seeds: Sequence[int]) -> list[Contestant]:
    """Contestants of the entries: every budget, and every seed for methods that have one.

    An entry whose options hold `keep` has that budget only; `keep=None` is for methods told by another option how much
    stays.

    Raises:
        OptionError: unknown method or option, or the same contestant twice.
        BudgetError: bad budget.
    """
    found: dict[str, Contestant] = {}
    for entry in entries:
        known = {"keep": None} if entry.method == CHAIN else options(entry.method)
        chosen = dict(entry.options)
        budgets: Sequence[int | float | None] = keeps if entry.keep is None else entry.keep
        if "keep" in chosen:
            budgets = [chosen.pop("keep")]
        elif "keep" not in known:
            budgets = [None]
        drawn: Sequence[int | None] = seeds if "seed" in known and "seed" not in chosen else [None]
        for keep in budgets:
            keep = None if keep is None else Budget(keep).keep
            for seed in drawn:
                contestant = Contestant(entry.method, chosen, keep, seed)
                if contestant.id in found:
                    raise OptionError(f"{contestant.id} is listed twice")
                found[contestant.id] = contestant
    return list(found.values())


def build_reducer(contestant: Contestant, vlm: VLM) -> Reducer | None:
    """The method itself, None for the full model. A companion `zoo:NAME` is found, and told the model's tokenizer.

    Raises:
        OptionError, BudgetError: whatever is wrong with the options.
    """
    if contestant.is_full:
        return None
    if contestant.method == CHAIN:
        budgets = [contestant.keep, *[None] * len(contestant.options["members"])]
        members = zip(contestant.options["members"], budgets)
        return Chain(*(_build(each["method"], each["options"], keep, None, vlm) for each, keep in members))
    return _build(contestant.method, contestant.options, contestant.keep, contestant.seed, vlm)


def _build(method: str, given: Mapping[str, Any], keep: int | float | None, seed: int | None, vlm: VLM) -> Reducer:
    chosen = dict(given)
    for name in COMPANIONS:
        if isinstance(chosen.get(name), str):
            if chosen[name].startswith(ZOO):
                try:
                    chosen[name] = str(zoo.path(chosen[name].removeprefix(ZOO)))
                except ValueError as error:
                    raise OptionError(f"{method}: {name}={given[name]}: {error}") from error
            if "question" not in chosen:
                chosen.setdefault("tokenizer", vlm.tokenizer)
    if keep is not None:
        chosen["keep"] = keep
    if seed is not None:
        chosen["seed"] = seed
    return build(method, **chosen)


def refusal(contestant: Contestant, vlm: VLM, sample: Sample) -> Exception | None:
    """Why a contestant cannot take part in this model, None if it can: it is tried on one sample."""
    try:
        reducer = build_reducer(contestant, vlm)
        if reducer is not None:
            with torch.inference_mode(), apply(vlm.model, reducer):
                prefill_seconds(vlm, vlm.inputs([sample]))
    except (OptionError, BudgetError, UnsupportedError) as error:
        return error
    return None
