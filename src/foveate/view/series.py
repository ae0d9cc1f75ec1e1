"""Which methods share a panel, and how each is drawn: colour, marker, line. The same in every picture of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..reduction import OptionError, info
from .folder import Axis, Entry, Results

__all__ = ["DARK", "LIGHT", "Facet", "Series", "Theme", "facets_of", "series_of", "spread"]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#a0522d", "#8f8f00")
"""Okabe and Ito's colours, told apart with any colour vision, without their black and yellow, and two more."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_BASELINE_LINES = ((0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_TOGETHER = 6  # so many methods share one panel
_CROWDED = 8


@dataclass(frozen=True)
class Theme:
    """Colours of a picture besides those of the methods."""

    ink: str
    paper: str
    soft: str
    grid: str
    baseline: str


LIGHT = Theme("#1b1f24", "#ffffff", "#59636e", "#e7eaee", "#7d8590")
DARK = Theme("#e6edf3", "#0d1117", "#9198a1", "#252b33", "#8b949e")


@dataclass(frozen=True)
class Series:
    """One method with its options over all budgets. `colour` is None for baselines, which take the theme's grey."""

    name: str
    entries: tuple[Entry, ...]
    baseline: bool
    colour: str | None
    marker: str
    line: str | tuple[int, tuple[float, ...]]

    def points(self, axis: Axis) -> list[Entry]:
        """Its entries that have a cost on this axis, cheapest first."""
        return sorted((e for e in self.entries if e.cost(axis) is not None), key=lambda e: (e.cost(axis), e.accuracy))


@dataclass(frozen=True)
class Facet:
    """Methods drawn together. `overview`: the front alone, every other point as a dot."""

    title: str
    series: tuple[Series, ...]
    overview: bool = False


def family(method: str) -> str:
    """Where a method removes tokens, as the title of a panel; "baseline" for those to be beaten."""
    try:
        about = info(method)
    except OptionError:
        return "other methods"
    if about.paper == "baseline":
        return "baseline"
    if "tower" in about.acts:
        return "inside the vision tower"
    if about.acts.startswith("before the LLM"):
        by_attention = "attention of the vision tower" in about.needs
        return "before the LLM, by the tower's attention" if by_attention else "before the LLM, by likeness"
    return "inside the LLM"


def series_of(results: Results) -> list[Series]:
    """All methods of a sweep, baselines first."""
    by_name: dict[str, list[Entry]] = {}
    for entry in results.entries:
        by_name.setdefault(entry.name, []).append(entry)
    families: dict[str, list[str]] = {}
    for name, entries in sorted(by_name.items()):
        families.setdefault(family(entries[0].method), []).append(name)
    found = []
    for kind, names in sorted(families.items(), key=lambda item: item[0] != "baseline"):
        for number, name in enumerate(names):
            if kind == "baseline":
                line = _BASELINE_LINES[number % len(_BASELINE_LINES)]
                found.append(Series(name, tuple(by_name[name]), True, None, ".", line))
    for _, names in _merged(families):
        for number, name in enumerate(names):
            colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
            found.append(Series(name, tuple(by_name[name]), False, colour, marker, "-"))
    return found


def facets_of(results: Results) -> list[Facet]:
    """One panel for few methods; else one for the front, then one for each family."""
    everyone = series_of(results)
    baselines = tuple(series for series in everyone if series.baseline)
    by_name = {series.name: series for series in everyone}
    families: dict[str, list[str]] = {}
    for series in everyone:
        if not series.baseline:
            families.setdefault(family(series.entries[0].method), []).append(series.name)
    merged = _merged(families)
    if len(merged) < 2:
        title = merged[0][0] if merged else "baselines"
        return [Facet(title, (*baselines, *(by_name[name] for _, names in merged for name in names)))]
    panels = [Facet("all methods: the Pareto front", tuple(everyone), overview=True)]
    return [*panels, *(Facet(title, (*baselines, *(by_name[n] for n in names))) for title, names in merged)]


def _merged(families: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    """Families as panels: all in one if they are few, small ones together, large ones in two."""
    rest = {kind: sorted(names) for kind, names in sorted(families.items()) if kind != "baseline"}
    if sum(map(len, rest.values())) <= _TOGETHER:
        names = sorted(name for names in rest.values() for name in names)
        return [("all methods", names)] if names else []
    found: list[tuple[str, list[str]]] = []
    for kind, names in sorted(rest.items(), key=lambda item: -len(item[1])):
        if found and len(found[-1][1]) + len(names) <= _TOGETHER - 1:
            found[-1] = (f"{found[-1][0]}; {kind}", found[-1][1] + names)
            continue
        for start in range(0, len(names), _CROWDED):
            found.append((kind if not start else f"{kind} (continued)", names[start : start + _CROWDED]))
    return found


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart: as near to where they are `wanted` as can be, at least `gap` between any two.

    Args:
        wanted: positions, in any order.
        gap: the least distance.
        low, high: all stay between these, as long as there is room.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # Least squares under an order: pool neighbours that are in each other's way, each pool goes to its mean.
    pools: list[tuple[float, int]] = []
    for rank, index in enumerate(order):
        pools.append((wanted[index] - rank * gap, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [((a * n + b * m) / (n + m), n + m)]
    flat = [mean for mean, count in pools for _ in range(count)]
    top = max(low, high - (len(wanted) - 1) * gap)
    placed = [0.0] * len(wanted)
    for rank, (index, value) in enumerate(zip(order, flat, strict=True)):
        placed[index] = min(max(value, low), top) + rank * gap
    return placed
