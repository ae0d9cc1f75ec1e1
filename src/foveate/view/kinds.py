"""Which kinds of question lose accuracy: the numbers, and a heat table of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from .folder import Entry, Results
from .overlay import new_figure
from .series import LIGHT, Theme

__all__ = ["GAIN", "LOSS", "MINUS", "kinds_figure", "loss_by_kind", "middle_budget", "signed_points"]

LOSS, GAIN = "#d55e00", "#0072b2"
MINUS = "\N{MINUS SIGN}"
_FONT = 9.0


def loss_by_kind(results: Results, entries: Sequence[Entry]) -> list[dict[str, tuple[float, float]]]:
    """For each entry: kind of question -> (accuracy lost against the full model, p of the paired test).

    A gain is negative.
    """
    assert results.full is not None
    found: list[dict[str, tuple[float, float]]] = [{} for _ in entries]
    for kind, numbers in results.groups("kind").items():
        clusters, theirs = results.clusters(numbers), results.full.scores[numbers]
        for entry, losses in zip(entries, found, strict=True):
            ours = entry.scores[numbers]
            losses[kind] = (float((theirs - ours).mean()), clusters.paired(ours, theirs))
    return found


def signed_points(difference: float) -> str:
    """A difference of two accuracies in percentage points, signed: "+1.2", "0.0"."""
    text = f"{100 * difference:+.1f}".replace("-", MINUS)
    return "0.0" if text[1:] == "0.0" else text


def kinds_figure(results: Results, keep: int | float | None, theme: Theme = LIGHT) -> Figure:
    """Accuracy lost by kind of question, for every method at one budget, the least loss first."""
    assert results.full is not None
    full = results.full
    chosen = sorted((e for e in results.entries if e.keep == keep), key=lambda e: -e.accuracy)
    groups = results.groups("kind")
    table = [
        [(full.accuracy - entry.accuracy, entry.row["p_full"]), *losses.values()]
        for entry, losses in zip(chosen, loss_by_kind(results, chosen), strict=True)
    ]
    losses = np.array([[loss for loss, _ in row] for row in table])
    height = 0.31 * len(chosen) + 1.35
    figure = new_figure(max(5.5, 2.1 + 0.78 * (1 + len(groups))), height, theme.paper)
    place = figure.subplots()
    figure.subplots_adjust(left=1.75 / figure.get_figwidth(), right=0.99, bottom=0.34 / height, top=1 - 1.0 / height)
    most = float(np.abs(losses).max()) or 1.0
    colours = LinearSegmentedColormap.from_list("loss", [GAIN, theme.paper, LOSS])
    place.imshow(losses, cmap=colours, vmin=-most, vmax=most, aspect="auto")
    for row, line in enumerate(table):
        for column, (loss, p) in enumerate(line):
            sure = p < 0.05
            place.text(
                column, row, signed_points(-loss), ha="center", va="center", fontsize=_FONT - 0.5,
                color=theme.ink if sure else theme.soft, weight="bold" if sure else "normal",
            )  # fmt: skip
    place.set_yticks(range(len(chosen)), [entry.name for entry in chosen], fontsize=_FONT, color=theme.ink)
    heads = [f"all\n{len(results.samples):,}", *(f"{kind}\n{len(numbers):,}" for kind, numbers in groups.items())]
    place.set_xticks(range(len(heads)), heads, fontsize=_FONT - 0.5, color=theme.ink)
    place.xaxis.tick_top()
    place.tick_params(length=0)
    place.axvline(0.5, color=theme.paper, linewidth=4)
    for spine in place.spines.values():
        spine.set_visible(False)
    budget = "" if keep is None else f" at keep {keep:g}"
    figure.text(0.012, 1 - 0.22 / height, f"Accuracy by kind of question{budget}", fontsize=12, weight="bold",
                color=theme.ink, va="center")  # fmt: skip
    figure.text(
        0.012, 0.15 / height, "points against the full model; bold: p < 0.05, paired, each cell on its own; "
        "under a kind: its questions",
        fontsize=8, color=theme.soft, va="center",
    )  # fmt: skip
    return figure


def middle_budget(results: Results) -> int | float | None:
    """Of the budgets that most methods were run at, the one in the middle."""
    counts: dict[Any, int] = {}
    for entry in results.entries:
        counts[entry.keep] = counts.get(entry.keep, 0) + 1
    common = sorted(keep for keep, n in counts.items() if keep is not None and n == max(counts.values()))
    return common[len(common) // 2] if common else next(iter(counts))
