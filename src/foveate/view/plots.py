"""Accuracy against what it costs, as pictures: tokens, FLOPs and measured milliseconds rank the methods differently.

* `accuracy_figure`: all facets on one figure, for a README.
* `facet_figures`: one figure for each facet, for a page that arranges them itself.
* `write_plots`: these and the heat table of `view.kinds` as SVG and PNG.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from ..evaluate.results import BASELINES
from ..evaluate.store import SweepError
from .folder import AXES, Axis, Entry, Results, read
from .kinds import kinds_figure, middle_budget
from .overlay import new_figure, save
from .series import LIGHT, Facet, Series, Theme, facets_of, spread

__all__ = ["accuracy_figure", "available", "facet_figures", "write_plots"]

_FONT = 9.0
_LETTER = 0.56 * _FONT  # width in points, about

Limits = tuple[float, float, float, float]
"""Left, right, bottom, top of a facet, in units of the data."""


def available(results: Results) -> list[Axis]:
    """Axes on which at least one method and the full model have a cost."""
    return [
        axis
        for axis in AXES.values()
        if results.full_cost(axis) is not None and any(entry.cost(axis) is not None for entry in results.entries)
    ]


# ------------------------------------------------------------------------------------------------------ the figures
def accuracy_figure(results: Results, axis: Axis, theme: Theme = LIGHT) -> Figure:
    """Accuracy against one cost, every method of the sweep, facets side by side."""
    facets = facets_of(results)
    columns = 1 if len(facets) == 1 else 2
    rows = -(-len(facets) // columns)
    figure = new_figure(10.4 if columns == 2 else 6.8, 4.15 * rows + 0.5, theme.paper)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    height = figure.get_figheight()
    figure.subplots_adjust(
        left=0.06 if columns == 2 else 0.09, right=0.985, bottom=0.52 / height, top=1 - 0.78 / height,
        wspace=0.07, hspace=0.27,
    )  # fmt: skip
    for place in list(axes.flat)[len(facets) :]:
        place.set_visible(False)
    _draw(list(axes.flat), facets, results, axis, theme)
    for number, place in enumerate(axes.flat):
        place.tick_params(labelleft=number % columns == 0)
    figure.text(
        0.015,
        1 - 0.24 / height,
        f"Accuracy against {axis.title}",
        fontsize=13,
        weight="bold",
        color=theme.ink,
        va="center",
    )
    figure.text(0.985, 1 - 0.24 / height, _caption(results), fontsize=8.5, color=theme.soft, ha="right", va="center")
    return figure


def facet_figures(results: Results, axis: Axis, theme: Theme = LIGHT) -> list[tuple[str, Figure]]:
    """(title, figure) of each facet, all with the same axes."""
    found = []
    for facet in facets_of(results):
        figure = new_figure(4.5, 3.9, theme.paper)
        place = figure.subplots()
        figure.subplots_adjust(left=0.12, right=0.985, bottom=0.13, top=0.925)
        _draw([place], [facet], results, axis, theme)
        found.append((facet.title, figure))
    return found


def _caption(results: Results) -> str:
    return f"{results.plan.model}, {len(results.samples):,} questions, 95 % intervals"


# ------------------------------------------------------------------------------------------------------- one facet
def _draw(places: Sequence[Any], facets: Sequence[Facet], results: Results, axis: Axis, theme: Theme) -> None:
    share = _share(places[0], facets, axis)
    limits = _limits(results, axis, share)
    for place, facet in zip(places, facets, strict=False):
        _axes(place, facet.title, axis, limits, share, theme)
        _front(place, results, axis, theme)
        _full(place, results, axis, theme)
        if facet.overview:
            _overview(place, facet, axis, theme)
        else:
            for series in facet.series:
                _series(place, series, results, axis, theme)
            _names(place, facet, axis, theme)


def _share(place: Any, facets: Sequence[Facet], axis: Axis) -> float:
    """Of the width of a facet, what is kept free on the left for the longest name."""
    names = [s.name if not f.overview else e.label for f in facets for s in f.series for e in s.points(axis)
             if not f.overview or e.on_front(axis)]  # fmt: skip
    width = 72 * place.get_position().width * place.figure.get_figwidth()
    return min(0.45, (max(map(len, names), default=0) * _LETTER + 16) / width)


def _limits(results: Results, axis: Axis, share: float) -> Limits:
    """Left, right, bottom, top. Names stand on the left; baselines may fall below the bottom, no method does."""
    points = [entry for entry in results.entries if entry.cost(axis) is not None]
    costs = [cost for entry in points if (cost := entry.cost(axis)) is not None]
    full = results.full_cost(axis)
    assert full is not None
    assert results.full is not None  # `available` was asked
    low, high = min([*costs, full]), max([*costs, full])
    if axis.log and low > 0:
        low, high = math.log(low), math.log(high)
    width = (high - low) / (0.95 - share) or 1.0
    left, right = low - share * width, high + 0.05 * width
    if axis.log and left < right:
        left, right = math.exp(left), math.exp(right)
    methods = [entry for entry in points if entry.method not in BASELINES] or points
    bottom = min(entry.accuracy for entry in [*methods, results.full])
    top = max(entry.interval[1] for entry in [*points, results.full])
    pad = 0.1 * (top - bottom) or 0.02
    return left, right, bottom - pad, top + 0.4 * pad


def _axes(
    place: Any, title: str, axis: Axis, limits: tuple[float, float, float, float], share: float, theme: Theme
) -> None:
    left, right, bottom, top = limits
    if axis.log and left > 0:
        place.set_xscale("log")
        lowest = math.log(left) + share * math.log(right / left) * 0.98
        steps = [m * 10.0**e for e in range(-3, 7) for m in (1, 2, 3, 5)]
        place.xaxis.set_major_locator(FixedLocator([step for step in steps if math.exp(lowest) <= step <= right]))
        place.xaxis.set_minor_locator(NullLocator())
        place.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif axis.name == "flops":
        place.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    place.set_xlim(left, right)
    place.set_ylim(bottom, top)
    if not axis.log:
        start = left + share * (right - left) * 0.95
        place.set_xticks([tick for tick in place.get_xticks() if start <= tick <= right])
        place.set_xlim(left, right)
    place.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    place.set_title(title, fontsize=10, color=theme.ink, loc="left", pad=5)
    place.set_xlabel(axis.unit, fontsize=8.5, color=theme.soft)
    place.tick_params(labelsize=8.5, colors=theme.soft, length=0)
    place.grid(True, color=theme.grid, linewidth=0.7)
    place.set_axisbelow(True)
    place.set_facecolor(theme.paper)
    for side, spine in place.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.grid)


def _full(place: Any, results: Results, axis: Axis, theme: Theme) -> None:
    full, cost = results.full, results.full_cost(axis)
    assert full is not None
    low, high = full.interval
    place.axhspan(low, high, color=theme.soft, alpha=0.08, linewidth=0, gid="full-interval")
    place.axhline(full.accuracy, color=theme.ink, linewidth=1.0, linestyle=(0, (6, 3)), gid="full-line")
    place.plot([cost], [full.accuracy], "*", color=theme.ink, markersize=10, zorder=5, gid="full-point")
    place.annotate(
        f"full model {full.accuracy:.1%}", (0.99, full.accuracy), xycoords=("axes fraction", "data"), xytext=(0, 7),
        textcoords="offset points", fontsize=_FONT - 0.5, color=theme.ink, va="bottom", ha="right",
        zorder=6, bbox={"facecolor": theme.paper, "alpha": 0.75, "linewidth": 0, "pad": 0.6},
    )  # fmt: skip


def _front(place: Any, results: Results, axis: Axis, theme: Theme) -> None:
    """The best accuracy that can be had at each cost, as steps."""
    everyone = [*results.entries, *([results.full] if results.full else [])]
    front = sorted(
        (e for e in everyone if e.on_front(axis) and e.cost(axis) is not None), key=lambda e: e.cost(axis) or 0
    )
    if front:
        place.plot(
            [entry.cost(axis) for entry in front], [entry.accuracy for entry in front], drawstyle="steps-post",
            color=theme.soft, linewidth=5, alpha=0.22, solid_joinstyle="round", zorder=1.5, gid="front",
        )  # fmt: skip


def _series(place: Any, series: Series, results: Results, axis: Axis, theme: Theme) -> None:
    points = series.points(axis)
    if not points:
        return
    x, y = np.array([entry.cost(axis) for entry in points]), np.array([entry.accuracy for entry in points])
    colour = series.colour or theme.baseline
    place.plot(
        x, y, color=colour, marker=series.marker, linestyle=series.line, linewidth=1.3 if series.baseline else 1.6,
        markersize=5, zorder=2.5 if series.baseline else 3, gid=f"series:{series.name}",
    )  # fmt: skip
    low, high = np.array([entry.interval for entry in points]).T
    if series.baseline:
        if series.entries[0].method == "random":
            place.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
        return
    bars = {"ecolor": colour, "elinewidth": 1.0, "alpha": 0.5, "fmt": "none", "zorder": 2}
    place.errorbar(x, y, yerr=[np.maximum(y - low, 0), np.maximum(high - y, 0)], **bars)
    if axis.name == "ms":
        quartiles = np.array([_quartiles(entry, results) for entry in points])
        place.errorbar(x, y, xerr=[np.maximum(x - quartiles[:, 0], 0), np.maximum(quartiles[:, 1] - x, 0)], **bars)
    ringed = [entry for entry in points if entry.on_front(axis)]
    place.plot(
        [entry.cost(axis) for entry in ringed], [entry.accuracy for entry in ringed], "o", markersize=10.5,
        markerfacecolor="none", markeredgecolor=theme.ink, markeredgewidth=1.1, zorder=4, gid=f"pareto:{series.name}",
    )  # fmt: skip


def _quartiles(entry: Entry, results: Results) -> tuple[float, float]:
    timed = next((results.times[seed] for seed in entry.seeds if seed in results.times), None)
    middle = entry.row["prefill_ms"]
    return (timed["q1"], timed["q3"]) if timed else (middle, middle)


def _names(place: Any, facet: Facet, axis: Axis, theme: Theme) -> None:
    """Names in a column on the left, at the height of each line's cheapest point, never on top of each other."""
    bottom, named = place.get_ylim()[0], []
    for series in facet.series:
        if points := series.points(axis):
            named.append((series, next((entry for entry in points if entry.accuracy >= bottom), None)))
    wanted = [0.0 if entry is None else _height(place, entry) for _, entry in named]
    for (series, entry), height in zip(named, spread(wanted, _line(place), 0.03, 0.96), strict=True):
        if entry is None:
            colour = series.colour or theme.baseline
            place.text(0.012, height, f"{series.name}: below", transform=place.transAxes, fontsize=_FONT, color=colour,
                       va="center", style="italic")  # fmt: skip
        else:
            _name(place, series.name, series, entry, axis, height, theme)


def _name(place: Any, text: str, series: Series, entry: Entry, axis: Axis, height: float, theme: Theme) -> None:
    """A name in the free column on the left, with a thin line to its point. No outline: it would turn text to paths."""
    colour = series.colour or theme.baseline
    place.annotate(
        text, (entry.cost(axis), entry.accuracy), xytext=(0.012, height), textcoords="axes fraction", fontsize=_FONT,
        color=colour, va="center", style="italic" if series.baseline else "normal", zorder=6,
        bbox={"facecolor": theme.paper, "alpha": 0.75, "linewidth": 0, "pad": 0.6},
        arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 0, "shrinkB": 4,
                    "relpos": (1, 0.5)},
    )  # fmt: skip


def _overview(place: Any, facet: Facet, axis: Axis, theme: Theme) -> None:
    """Every point as a dot; those of the front in colour, with their names in the empty corner above the front."""
    entries = [(series, entry) for series in facet.series for entry in series.points(axis)]
    rest = [entry for _, entry in entries if not entry.on_front(axis)]
    place.plot(
        [e.cost(axis) for e in rest], [e.accuracy for e in rest], ".", color=theme.baseline, markersize=4.5, alpha=0.65,
        zorder=2, gid="others",
    )  # fmt: skip
    bottom = place.get_ylim()[0]
    front = [(series, entry) for series, entry in entries if entry.on_front(axis) and entry.accuracy >= bottom]
    wanted = [_height(place, entry) + 0.02 for _, entry in front]
    heights = spread(wanted, _line(place), 0.03, 0.96)
    for (series, entry), height in zip(front, heights, strict=True):
        colour = series.colour or theme.baseline
        place.plot(
            [entry.cost(axis)], [entry.accuracy], color=colour, marker="o" if series.baseline else series.marker,
            markersize=6, linestyle="none", zorder=4, gid=f"pareto:{entry.row['id']}",
        )  # fmt: skip
        _name(place, entry.label, series, entry, axis, height, theme)


def _line(place: Any) -> float:
    """Height of a line of names as a fraction of that of the axes."""
    return 1.3 * _FONT / 72 / (place.get_position().height * place.figure.get_figheight())


def _height(place: Any, entry: Entry) -> float:
    """Accuracy as a fraction of the height of the axes."""
    bottom, top = place.get_ylim()
    return (entry.accuracy - bottom) / (top - bottom)


# -------------------------------------------------------------------------------------------------------- the files
def write_plots(folder: str | Path, out: str | Path) -> list[Path]:
    """Write every picture of a finished sweep as SVG and PNG: `accuracy_tokens.svg`, ..., `loss_by_kind.png`.

    The heat table shows the middle budget.

    Raises:
        SweepError: the folder holds no sweep, or one that is not finished.
    """
    results = read(folder)
    if not results.finished:
        raise SweepError(f"{folder}: the sweep is not finished, there is nothing to draw yet")
    figures = {f"accuracy_{axis.name}": accuracy_figure(results, axis) for axis in available(results)}
    if results.groups("kind") and results.entries:
        figures["loss_by_kind"] = kinds_figure(results, middle_budget(results))
    written = []
    for name, figure in figures.items():
        for suffix in ("svg", "png"):
            path = Path(out) / f"{name}.{suffix}"
            # A fixed salt: the same sweep gives the same file.
            with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
                save(figure, path)
            written.append(path)
    return written
