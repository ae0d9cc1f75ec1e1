"""From the records of all answers to one row per method and budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..recipe import Recipe
from .data import Sample
from .grid import FULL
from .metrics import yes_no_report
from .runner import Record
from .stats import Clusters, holm

__all__ = ["BASELINES", "rows", "verdicts"]

BASELINES = ("random", "averagepool", "downsample")
"""What a method has to beat at equal compute."""
_COLUMNS = ("score", "same", "kl", "visual_tokens", "entering", "after", "flops", "flops_total", "kv_bytes")
_COSTS = {"tokens": "visual_tokens_entering", "flops": "flops_total_ratio", "ms": "prefill_ms"}
_SURE = 0.05

Array = np.ndarray


class _Table:
    """Records as arrays (samples,), the seeds of a row averaged."""

    def __init__(self, recipes: Sequence[Recipe], samples: int, records: Iterable[Record]):
        self.seeds: dict[str, list[Recipe]] = {}
        for recipe in recipes:
            self.seeds.setdefault(recipe.row, []).append(recipe)
        empty = np.full((len(_COLUMNS), samples), np.nan)
        by_id = {recipe.id: empty.copy() for recipe in recipes}
        self.predicted: dict[str, list[str]] = {recipe.id: [""] * samples for recipe in recipes}
        self.errors: dict[str, list[str]] = {recipe.id: [] for recipe in recipes}
        for record in records:
            by_id[record.recipe][:, record.sample] = [_number(getattr(record, name)) for name in _COLUMNS]
            self.predicted[record.recipe][record.sample] = record.predicted
            if record.error:
                self.errors[record.recipe].append(record.error)
        self._values = {row: np.mean([by_id[each.id] for each in seeds], axis=0) for row, seeds in self.seeds.items()}

    def __call__(self, row: str, column: str) -> Array:
        return self._values[row][_COLUMNS.index(column)]


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


def _plain(value: Any) -> float | None:
    return None if value is None or np.isnan(value) else float(value)


def _ratio(ours: Array, theirs: Array) -> float | None:
    return _plain(ours.sum() / theirs.sum()) if theirs.sum() else None


def rows(
    recipes: Sequence[Recipe],
    samples: Sequence[Sample],
    data: Sequence[str],
    metrics: Mapping[str, str],
    records: Iterable[Record],
    times: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """One row for the full model, then one for each method, options and budget. Ratios are reduced / full.

    A row of which an answer failed says so in "error" and has None for every number.

    Args:
        recipes: without the full model.
        data: for each sample the name of its data set.
        metrics: metric of each data set.
        records: one of each recipe, the full model included, for each sample.
        times: `Spread.to_json` by recipe id; of several seeds the first is timed.
    """
    table = _Table([FULL, *recipes], len(samples), records)
    clusters = Clusters([(name, sample.image_id) for name, sample in zip(data, samples, strict=True)])
    groups = _groups(data, samples)
    found = [
        _row(row, seeds, table, clusters, groups, metrics, samples, times or {}) for row, seeds in table.seeds.items()
    ]
    sound = [row for row in found if not row["error"]]
    _compare(sound, table, clusters)
    for name, cost in _COSTS.items():
        for row in found:
            row["pareto"][name] = _undominated(row, sound, cost)
    return found


def _groups(data: Sequence[str], samples: Sequence[Sample]) -> dict[str, dict[str, Array]]:
    """Numbers of the samples of each data set and of each kind of question, in the order they come."""
    names, kinds = np.array(data), np.array([sample.kind for sample in samples])
    return {
        "data": {str(name): np.flatnonzero(names == name) for name in dict.fromkeys(data)},
        "kind": {str(kind): np.flatnonzero(kinds == kind) for kind in dict.fromkeys(kinds.tolist()) if kind},
    }


def _row(
    row: str,
    seeds: Sequence[Recipe],
    table: _Table,
    clusters: Clusters,
    groups: Mapping[str, Mapping[str, Array]],
    metrics: Mapping[str, str],
    samples: Sequence[Sample],
    times: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    first, full = seeds[0], FULL.row
    score, same, kl = (table(row, name) for name in ("score", "same", "kl"))
    accuracy, accuracy_full = float(score.mean()), float(table(full, "score").mean())
    result: dict[str, Any] = {
        "id": row,
        "method": first.method,
        "options": dict(first.options),
        "keep": first.keep,
        "seeds": [each.seed for each in seeds if each.seed is not None],
        "samples": len(score),
        "error": None,
        "accuracy": accuracy,
        "accuracy_ci": clusters.interval(score),
        "accuracy_full": accuracy_full,
        "relative": accuracy / accuracy_full if accuracy_full else None,
        "accuracy_by_data": {name: float(score[part].mean()) for name, part in groups["data"].items()},
        "accuracy_by_kind": {name: float(score[part].mean()) for name, part in groups["kind"].items()},
        "agreement": float(same.mean()),
        "agreement_ci": clusters.interval(same),
        "kl": float(kl.mean()),
        "kl_ci": clusters.interval(kl),
        "visual_tokens_entering": float(table(row, "entering").mean()),
        "visual_tokens_after": float(table(row, "after").mean()),
        "flops_ratio": _ratio(table(row, "flops"), table(full, "flops")),
        "flops_total_ratio": _ratio(table(row, "flops_total"), table(full, "flops_total")),
        "kv_ratio": _ratio(table(row, "kv_bytes"), table(full, "kv_bytes")),
        "kv_mb": _plain(table(row, "kv_bytes").mean() / 1e6),
        "prefill_ms": times.get(first.id, {}).get("prefill_ms"),
        "prefill_ms_full": times.get(FULL.id, {}).get("prefill_ms"),
        "pareto": {},
    }
    if errors := [error for each in seeds for error in table.errors[each.id]]:
        reasons = "; ".join(dict.fromkeys(errors))
        return _failed(result, f"{len(errors)} of {len(seeds) * len(score)} answers: {reasons}")
    yes_no = {}
    for name, part in groups["data"].items():
        if metrics.get(name) == "yes-no":
            asked = [samples[i] for i in part]
            reports = [yes_no_report([table.predicted[each.id][i] for i in part], asked) for each in seeds]
            yes_no[name] = {key: float(np.mean([report[key] for report in reports])) for key in reports[0]}
    if yes_no:
        result["yes_no"] = yes_no
    return result


_KEPT_OF_FAILED = ("id", "method", "options", "keep", "seeds", "samples", "accuracy_full", "prefill_ms_full")


def _failed(row: Mapping[str, Any], error: str) -> dict[str, Any]:
    """A row without its numbers; those of the full model stay."""
    empty: dict[str, Any] = {name: {} if isinstance(value, dict) else None for name, value in row.items()}
    compared = {"p_full": None, "p_random": None, "random_row": None, "versus": dict.fromkeys(BASELINES)}
    return {**empty, **{name: row[name] for name in _KEPT_OF_FAILED}, "error": error, **compared}


# ------------------------------------------------------------------------------------------------------- comparisons
def _compare(found: list[dict[str, Any]], table: _Table, clusters: Clusters) -> None:
    """Add to each row its paired tests: against the full model, Random, and the baselines at equal compute."""
    randoms = [row for row in found if row["method"] == "random"]
    for row in found:
        ours = table(row["id"], "score")
        is_full = row["id"] == FULL.row
        row["p_full"] = None if is_full else clusters.paired(ours, table(FULL.row, "score"))
        row["p_random"], row["random_row"] = None, None
        if randoms and not is_full and row["method"] != "random":
            nearest = min(randoms, key=lambda r: abs(r["visual_tokens_entering"] - row["visual_tokens_entering"]))
            row["random_row"] = nearest["id"]
            row["p_random"] = clusters.paired(ours, table(nearest["id"], "score"))
        row["versus"] = {
            name: None if is_full or row["method"] in BASELINES else _versus(row, name, found, table, clusters)
            for name in BASELINES
        }


def _versus(
    row: Mapping[str, Any], baseline: str, found: Sequence[dict[str, Any]], table: _Table, clusters: Clusters
) -> dict[str, Any] | None:
    """The row against a baseline at the same total FLOPs.

    The baseline there is a mixture of its two neighbouring budgets (the full model is the largest), sample by sample.
    None where the baseline was not run or never as cheap.
    """
    cost = _COSTS["flops"]
    points = [each for each in found if each["method"] == baseline or each["id"] == FULL.row]
    points = sorted((each for each in points if each[cost] is not None), key=lambda each: each[cost])
    if row[cost] is None or len(points) < 2 or not points[0][cost] <= row[cost] <= points[-1][cost]:
        return None
    above = next(i for i, each in enumerate(points) if each[cost] >= row[cost])
    low, high = points[max(above - 1, 0)], points[above]
    width = high[cost] - low[cost]
    share = (row[cost] - low[cost]) / width if width else 1.0
    theirs = (1 - share) * table(low["id"], "score") + share * table(high["id"], "score")
    ours = table(row["id"], "score")
    return {
        "accuracy": float(theirs.mean()),
        "difference": float((ours - theirs).mean()),
        "p": clusters.paired(ours, theirs),
        "between": [low["id"], high["id"]],
    }


def verdicts(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """For each baseline that was run, the rows that are better and worse than it at equal compute.

    Tested at 5 %, corrected for the number of rows compared with that baseline (Holm). "open": no difference shown;
    "uncompared": cheaper than the baseline ever was.
    """
    result = {}
    for name in BASELINES:
        if not any(row["method"] == name and not row.get("error") for row in found):
            continue
        others = [row for row in found if row["method"] not in (*BASELINES, FULL.method) and not row.get("error")]
        compared = [row for row in others if row["versus"][name] is not None]
        lists: dict[str, list[str]] = {"better": [], "worse": [], "open": []}
        for row, p in zip(compared, holm([row["versus"][name]["p"] for row in compared]), strict=True):
            sign = "better" if row["versus"][name]["difference"] > 0 else "worse"
            lists[sign if p < _SURE else "open"].append(row["id"])
        result[name] = {**lists, "uncompared": [row["id"] for row in others if row["versus"][name] is None]}
    return result


def _undominated(row: Mapping[str, Any], found: Sequence[Mapping[str, Any]], cost: str) -> bool:
    """Whether no other row is at least as accurate and as cheap, and better in one of them."""
    mine = row[cost]
    return mine is not None and not any(
        other[cost] is not None
        and other[cost] <= mine
        and other["accuracy"] >= row["accuracy"]
        and (other[cost] < mine or other["accuracy"] > row["accuracy"])
        for other in found
    )
