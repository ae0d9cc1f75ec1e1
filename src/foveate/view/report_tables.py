"""The tables of the report, each from the results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..evaluate.grid import FULL
from .findings import Versus, best_per_budget, versus_baselines
from .folder import AXES, Entry, Results
from .kinds import loss_by_kind, signed_points
from .page import Cell, Chip, Head, Table, percent

__all__ = [
    "ABOUT_KINDS",
    "ABOUT_ROWS",
    "ABOUT_VERSUS",
    "best",
    "by_data",
    "by_kind",
    "facts",
    "progress",
    "reasons",
    "rows",
    "versus",
]

ABOUT_ROWS = (
    "Below each accuracy its 95 % interval (bootstrap; questions about one image are drawn together). p: paired "
    "permutation test, not corrected for the number of rows; vs random: against the Random row of the most similar "
    "token count. KL: of the first answer token, in nats. Tokens: visual ones that enter a decoder layer, and below "
    "that are left after it, layer mean. FLOPs of the prefill (with the vision tower, and below without) and bytes of "
    "the KV cache: of the full model's. Front: nothing in the sweep is as cheap (in tokens, FLOPs or ms) and more "
    "accurate."
)
ABOUT_VERSUS = (
    "Difference in percentage points to the baseline at the same total FLOPs (vision tower included); between two of "
    "its budgets the baseline is a mixture of both, and the full model is its largest. Up and down: shown better or "
    "worse (paired test, Holm over all settings, p < 0.05). Grey: no difference shown. n/a: cheaper than the baseline "
    "ever was."
)
ABOUT_KINDS = (
    "Percentage points against the full model, for each kind of question on its own. Bold: paired test p < 0.05, not "
    "corrected; with so many cells some are bold by chance."
)
_SURE = 0.05
_LISTED = 6
_SIGNS = {"better": "\N{BLACK UP-POINTING TRIANGLE}", "worse": "\N{BLACK DOWN-POINTING TRIANGLE}"}


def _method(entry: Entry) -> Cell:
    """Name with all its options."""
    options = " ".join(f"{name}={value}" for name, value in (entry.row.get("options") or {}).items())
    seeds = f"{len(entry.seeds)} seeds" if len(entry.seeds) > 1 else ""
    small = ", ".join(part for part in (options, seeds) if part)
    return Cell(entry.method, f"{entry.name} {_budget(entry.keep):08.3f}", small, small_css="options")


def _budget(keep: int | float | None) -> float:
    return -1.0 if keep is None else float(keep)


def _keep(entry: Entry) -> Cell:
    return Cell("-" if entry.keep is None else f"{entry.keep:g}", _budget(entry.keep))


def _share(value: float, interval: Any) -> Cell:
    small = f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else ""
    return Cell(f"{value:.1%}", value, small)


def _number(value: float | None, digits: int) -> Cell:
    return Cell("-", -1.0) if value is None else Cell(f"{value:.{digits}f}", value)


def _with(cell: Cell, below: Cell) -> Cell:
    return replace(cell, small=below.text)


def _p(value: float | None) -> Cell:
    if value is None:
        return Cell("-", 2.0)
    return Cell("<0.001" if value < 0.001 else f"{value:.3f}", value, css="sure" if value < _SURE else "unsure")


def _milliseconds(entry: Entry) -> Cell:
    ours, full = entry.row.get("prefill_ms"), entry.row.get("prefill_ms_full")
    if ours is None:
        return Cell("-", -1.0)
    return Cell(f"{ours:.1f}", ours, f"{ours / full:.0%}" if full else "")


def _everyone(results: Results) -> list[Entry]:
    return [*([results.full] if results.full else []), *results.entries]


# ----------------------------------------------------------------------------------------------------- what was run
def facts(results: Results) -> dict[str, str]:
    """Model, data, machine and time, by what they are called."""
    plan = results.plan
    groups = results.groups("data")
    seeds = sorted({c.seed for c in plan.recipes if c.seed is not None})
    lines = {
        "model": f"{plan.model}, {plan.dtype} on {plan.device}" + (f", weights {plan.weights}" if plan.weights else ""),
        "data": "; ".join(
            f"{name}: {len(numbers):,} questions, scored by {plan.metrics.get(name, plan.metric)}"
            for name, numbers in groups.items()
        ),
        "images": f"{results.clusters().count:,}",
        "videos": " ".join(results.notes),
        "draw": f"seed {plan.seed}" + (f"; methods that draw: seeds {', '.join(map(str, seeds))}" if seeds else ""),
        "answers": f"greedy, at most {plan.max_new_tokens} tokens; batches of {plan.batch_size}",
        "machine": ", ".join(f"{name} {value}" for name, value in plan.machine.items()),
        "started": f"{results.started:%Y-%m-%d %H:%M} UTC",
        "finished": f"{results.ended:%Y-%m-%d %H:%M} UTC" if results.ended else "not yet",
    }
    return {name: text for name, text in lines.items() if text}


def progress(results: Results) -> Table:
    """How far each recipe of an unfinished sweep is, and how it does on the same questions as the full model."""
    found = []
    for recipe in results.plan.recipes:
        answered = [i for i in range(len(results.samples)) if (recipe.id, i) in results.records]
        both = [i for i in answered if (FULL.id, i) in results.records]
        ours = sum(results.records[recipe.id, i].score for i in both) / len(both) if both else None
        full = sum(results.records[FULL.id, i].score for i in both) / len(both) if both else None
        done = Cell(f"{len(answered):,} of {len(results.samples):,}", len(answered))
        found.append([Cell(recipe.id), done, percent(ours), percent(full)])
    heads = ["setting", "answered", "score until now", "full model on the same"]
    return Table(heads, found, "Answers until now")


def reasons(known: Mapping[str, str], label: str) -> Table:
    """Settings without numbers, by id, and why."""
    found = [[Cell(setting), Cell(reason, css="words")] for setting, reason in known.items()]
    return Table(["setting", "why"], found, label)


# --------------------------------------------------------------------------------------------------------- results
def best(results: Results) -> Table:
    """The most accurate method at each budget, and who is not shown to be worse."""
    found = []
    for each in best_per_budget(results):
        entry = each.entry
        others = ", ".join(other.name for other in each.ties[:_LISTED]) or "none"
        if len(each.ties) > _LISTED:
            others += f" and {len(each.ties) - _LISTED} more"
        found.append([
            Cell("-" if each.keep is None else f"{each.keep:g}", _budget(each.keep)),
            Cell(entry.name, css="left"),
            _share(entry.accuracy, entry.row.get("accuracy_ci")),
            Cell(signed_points(entry.accuracy - entry.row["accuracy_full"]), entry.accuracy),
            percent(entry.cost(AXES["flops"]), 0),
            _milliseconds(entry),
            Cell(others, css="words"),
        ])  # fmt: skip
    heads: list[Head] = [
        "keep", "most accurate", "accuracy", ("against full", "points"), ("FLOPs", "with tower"),
        ("prefill ms", "of full"), ("not shown to be worse", "paired, Holm, 5 %"),
    ]  # fmt: skip
    return Table(heads, found, "The most accurate method at each budget")


def rows(results: Results) -> Table:
    """Every setting with everything measured."""
    found = []
    for entry in _everyone(results):
        row = entry.row
        fronts = [axis.name for axis in AXES.values() if entry.on_front(axis)]
        found.append([
            _method(entry),
            _keep(entry),
            _share(entry.accuracy, row.get("accuracy_ci")),
            percent(row.get("relative")),
            _p(row.get("p_full")),
            _p(row.get("p_random")),
            _share(row["agreement"], row.get("agreement_ci")),
            _number(row["kl"], 3),
            _with(_number(row["visual_tokens_entering"], 1), _number(row["visual_tokens_after"], 1)),
            _with(percent(row.get("flops_total_ratio"), 0), percent(row.get("flops_ratio"), 0)),
            percent(row.get("kv_ratio"), 0),
            _milliseconds(entry),
            Cell(", ".join(fronts) or "-", len(fronts), css="left"),
        ])  # fmt: skip
    heads: list[Head] = [
        "method", "keep", "accuracy", ("relative", "of full"), ("p", "vs full"), ("p", "vs random"), "same answer",
        "KL", ("tokens", "entering, after"), ("FLOPs", "all, decoder"), "KV",
        ("prefill ms", "of full"), ("front", "against"),
    ]  # fmt: skip
    return Table(heads, found, "All settings")


def by_data(results: Results) -> Table:
    """Accuracy on each data set."""
    names = list(results.groups("data"))
    found = [
        [_method(entry), _keep(entry), *(percent(entry.row["accuracy_by_data"].get(name)) for name in names)]
        for entry in _everyone(results)
    ]
    heads = [(name, f"{len(numbers):,} questions") for name, numbers in results.groups("data").items()]
    return Table(["method", "keep", *heads], found, "Accuracy by data set")


def by_kind(results: Results) -> Table:
    """Accuracy lost on each kind of question, as a heat table."""
    losses = loss_by_kind(results, results.entries)
    most = max((abs(loss) for line in losses for loss, _ in line.values()), default=0.0) or 1.0
    found = []
    for entry, line in zip(results.entries, losses, strict=True):
        cells = []
        for loss, p in line.values():
            tint = f"{'213,94,0' if loss > 0 else '0,114,178'},{0.75 * abs(loss) / most:.2f}"
            css = "sure" if p < _SURE else "unsure"
            cells.append(
                Cell(signed_points(-loss), -loss, style=f"background:rgba({tint})", css=css, title=f"p = {p:.3f}")
            )
        found.append([_method(entry), _keep(entry), *cells])
    heads = [(kind, f"{len(numbers):,} questions") for kind, numbers in results.groups("kind").items()]
    return Table(["method", "keep", *heads], found, "Accuracy lost by kind of question", "heat")


def versus(results: Results) -> Table | None:
    """Methods against the baselines that took part, budget by budget; None if there is nothing to compare."""
    known = versus_baselines(results)
    if not known:
        return None
    names: dict[str, list[Entry]] = {}
    for entry in results.entries:
        if entry.method not in known:
            names.setdefault(entry.name, []).append(entry)
    if not names:
        return None
    found = []
    for name, entries in sorted(names.items()):
        cells = [Cell(name)]
        for verdicts in known.values():
            here = [(entry, verdicts[entry.row["id"]]) for entry in entries if entry.row["id"] in verdicts]
            order = sum((each.verdict == "better") - (each.verdict == "worse") for _, each in here)
            cells.append(Cell("", order, css="left", chips=tuple(_chip(entry, each) for entry, each in here)))
        found.append(cells)
    heads: list[Head] = ["method", *((baseline, "keep, points") for baseline in known)]
    return Table(heads, found, "Methods against baselines at equal compute")


def _chip(entry: Entry, known: Versus) -> Chip:
    budget = "" if entry.keep is None else f"{entry.keep:g} "
    if known.difference is None or known.p is None:
        return Chip(f"{budget}n/a", "", "cheaper than the baseline ever was")
    sign = _SIGNS.get(known.verdict, "")
    return Chip(f"{budget}{sign}{signed_points(known.difference)}", known.verdict, f"p = {known.p:.4f}, not corrected")
