"""What a sweep has shown, in plain words. Strings and numbers only; the page sets them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..evaluate.results import verdicts
from ..evaluate.stats import holm
from .folder import AXES, Entry, Results

__all__ = ["Best", "Versus", "best_per_budget", "cheapest_within", "headline", "versus_baselines"]

_SURE = 0.05
MARGIN = 0.02
"""Loss of accuracy that the summary calls small."""


@dataclass(frozen=True)
class Best:
    """The most accurate method at one budget, and those not shown to be worse (paired, Holm, 5 %)."""

    keep: int | float | None
    entry: Entry
    ties: tuple[Entry, ...]


@dataclass(frozen=True)
class Versus:
    """One entry against one baseline at equal compute. `verdict`: better, worse, open, uncompared."""

    verdict: str
    difference: float | None
    p: float | None


def best_per_budget(results: Results) -> list[Best]:
    """Largest budget first; budgets as asked for, which are not the same compute for every method."""
    found = []
    for keep in results.budgets:
        here = sorted((entry for entry in results.entries if entry.keep == keep), key=lambda entry: -entry.accuracy)
        clusters = results.clusters()
        p_values = holm([clusters.paired(here[0].scores, other.scores) for other in here[1:]]) if here[1:] else []
        ties = tuple(other for other, p in zip(here[1:], p_values, strict=True) if p >= _SURE)
        found.append(Best(keep, here[0], ties))
    return found


def cheapest_within(results: Results, margin: float = MARGIN) -> Entry | None:
    """The entry of least total FLOPs whose loss against the full model is, with 95 % confidence, below `margin`.

    None if there is none.
    """
    assert results.full is not None
    clusters, theirs = results.clusters(), results.full.scores
    by_cost = [(cost, entry) for entry in results.entries if (cost := entry.cost(AXES["flops"])) is not None]
    for _, entry in sorted(by_cost, key=lambda pair: pair[0]):
        if clusters.interval(theirs - entry.scores)[1] < margin:
            return entry
    return None


def versus_baselines(results: Results) -> dict[str, dict[str, Versus]]:
    """Baseline that took part -> row id -> what is known of it."""
    assert results.full is not None
    rows = [dict(results.full.row), *(dict(entry.row) for entry in results.entries)]
    by_id = {row["id"]: row for row in rows}
    found: dict[str, dict[str, Versus]] = {}
    for baseline, lists in verdicts(rows).items():
        found[baseline] = {}
        for verdict, ids in lists.items():
            for name in ids:
                known = by_id[name]["versus"][baseline] or {}
                found[baseline][name] = Versus(verdict, known.get("difference"), known.get("p"))
    return found


def headline(results: Results) -> list[str]:
    """The sentences of the summary."""
    full = results.full
    assert full is not None
    low, high = full.interval
    found = [
        f"The full model scores {full.accuracy:.1%} on {len(results.samples):,} questions "
        f"(95 % interval {low:.1%} to {high:.1%})."
    ]
    cheapest = cheapest_within(results)
    if cheapest is None:
        found.append(f"No setting could be shown to lose less than {100 * MARGIN:g} points with so many questions.")
    else:
        found.append(
            f"The cheapest setting that loses less than {100 * MARGIN:g} points (95 % confidence, taken by itself) is "
            f"{cheapest.label}: {cheapest.accuracy:.1%} at {cheapest.cost(AXES['flops']):.0%} of the FLOPs, "
            f"vision tower included{_times_faster(cheapest)}."
        )
    for baseline, known in versus_baselines(results).items():
        if known:
            found.append(_against(baseline, known, results.entries))
    return found


def _times_faster(entry: Entry) -> str:
    ours, full = entry.row.get("prefill_ms"), entry.row.get("prefill_ms_full")
    return f", {ours / full:.0%} of the prefill time" if ours and full else ""


def _against(baseline: str, known: dict[str, Versus], entries: Sequence[Entry]) -> str:
    """One sentence on who is better than a baseline at equal compute, and who is not."""
    by_method: dict[str, list[str]] = {}
    for entry in entries:
        if entry.row["id"] in known:
            by_method.setdefault(entry.name, []).append(known[entry.row["id"]].verdict)
    compared = {name: [v for v in verdicts if v != "uncompared"] for name, verdicts in by_method.items()}
    compared = {name: verdicts for name, verdicts in compared.items() if verdicts}
    if not compared:
        return f"Nothing could be compared with {baseline} at equal compute: it was never run as cheap."
    always = [name for name, verdicts in compared.items() if set(verdicts) == {"better"}]
    sometimes = [name for name, verdicts in compared.items() if "better" in verdicts and name not in always]
    worse = [name for name, verdicts in compared.items() if "worse" in verdicts]
    never = [name for name, verdicts in compared.items() if "better" not in verdicts and name not in worse]
    parts = [
        f"better wherever compared: {_listed(always, compared)}" if always else "",
        f"better at some: {_listed(sometimes, compared)}" if sometimes else "",
        f"worse at one or more: {_listed(worse, compared)}" if worse else "",
        f"no difference shown: {_listed(never, compared)}" if never else "",
    ]
    return f"Against {baseline} at equal total FLOPs: " + "; ".join(part for part in parts if part) + "."


def _listed(names: Sequence[str], everyone: Collection[str]) -> str:
    return f"all {len(names)}" if len(names) == len(everyone) > 2 else ", ".join(sorted(names))
