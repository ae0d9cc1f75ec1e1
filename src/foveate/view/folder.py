"""What a sweep has left in its folder, read for tables and pictures. Reads files and draws nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluate.grid import FULL
from ..evaluate.runner import Record
from ..evaluate.stats import Clusters
from ..evaluate.store import Folder, Plan, SweepError

__all__ = ["AXES", "Axis", "Entry", "Results", "read"]


@dataclass(frozen=True)
class Axis:
    """A cost against which accuracy is drawn: where a row holds it, and what to write below it."""

    name: str
    column: str
    title: str
    unit: str
    log: bool = False


AXES = {
    axis.name: axis
    for axis in (
        Axis("tokens", "visual_tokens_entering", "visual tokens", "visual tokens entering a decoder layer, mean", True),
        Axis("flops", "flops_total_ratio", "FLOPs", "FLOPs of the prefill, vision tower included, of the full model's"),
        Axis("ms", "prefill_ms", "milliseconds", "measured prefill of a batch, median milliseconds"),
    )
}


@dataclass(frozen=True)
class Entry:
    """A method with its options at one budget, all seeds together.

    Attributes:
        row: as in `result.json`.
        name: the method, with as many options as tell it from other entries of that method.
        scores: (samples,) mean over the seeds.
        seeds: ids of its recipes, one for each seed.
    """

    row: Mapping[str, Any]
    name: str
    scores: np.ndarray
    seeds: tuple[str, ...]

    @property
    def method(self) -> str:
        """Name in the registry."""
        return self.row["method"]

    @property
    def keep(self) -> int | float | None:
        """The budget as asked for."""
        return self.row.get("keep")

    @property
    def label(self) -> str:
        """Name and budget."""
        return self.name if self.keep is None else f"{self.name} {self.keep:g}"

    @property
    def accuracy(self) -> float:
        """Mean score."""
        return self.row["accuracy"]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy; the accuracy twice where none was computed."""
        low, high = self.row.get("accuracy_ci") or (self.accuracy, self.accuracy)
        return low, high

    def cost(self, axis: Axis) -> float | None:
        """Where it stands on an axis, None if that was not measured."""
        value = self.row.get(axis.column)
        return None if value is None or not math.isfinite(value) else float(value)

    def on_front(self, axis: Axis) -> bool:
        """Whether nothing in the sweep is as cheap and more accurate."""
        return bool((self.row.get("pareto") or {}).get(axis.name))


@dataclass(frozen=True)
class Results:
    """A sweep, finished or not.

    Attributes:
        samples: `samples.jsonl`, in order.
        records: the answers, by recipe and sample.
        entries: without the full model and those that failed; empty unless finished.
        failed: id -> error of the settings without a result.
        full: the full model; None unless finished.
        times: recipe id -> {"prefill_ms", "q1", "q3", "runs"}.
        started, ended: when the plan and the result were written.
        notes: what has to be known to read the numbers.
    """

    plan: Plan
    samples: Sequence[Mapping[str, Any]]
    records: Mapping[tuple[str, int], Record]
    entries: Sequence[Entry]
    failed: Mapping[str, str]
    full: Entry | None
    times: Mapping[str, Mapping[str, Any]]
    started: datetime
    ended: datetime | None
    notes: Sequence[str] = ()

    @property
    def finished(self) -> bool:
        """Whether the sweep got to its end."""
        return self.full is not None

    @property
    def budgets(self) -> list[int | float | None]:
        """As asked for: fractions before counts, large ones first, None last."""
        return sorted({e.keep for e in self.entries}, key=lambda k: (k is None, isinstance(k, int), -(k or 0)))

    def clusters(self, chosen: Sequence[int] | np.ndarray | None = None) -> Clusters:
        """Questions about one image belong together; of the samples `chosen` only."""
        rows = self.samples if chosen is None else [self.samples[i] for i in chosen]
        return Clusters([(row["data"], row["image_id"]) for row in rows])

    def groups(self, column: str) -> dict[str, np.ndarray]:
        """Numbers of the samples by their "data" or "kind", in the order they come; empty kinds left out."""
        found: dict[str, list[int]] = {}
        for number, row in enumerate(self.samples):
            if row.get(column):
                found.setdefault(str(row[column]), []).append(number)
        return {name: np.array(numbers) for name, numbers in found.items()}

    def full_cost(self, axis: Axis) -> float | None:
        """Where the full model stands on an axis."""
        return None if self.full is None else self.full.cost(axis)


def read(path: str | Path) -> Results:
    """Read the folder of a sweep, finished or not.

    Raises:
        SweepError: no sweep there, or a file that is not what it should be.
    """
    folder = Folder(Path(path))
    plan, records = folder.plan(), folder.records()
    samples = _samples(folder.path / "samples.jsonl")
    result = _result(folder.path / "result.json")
    try:
        rows = [] if result is None else result["rows"]
        failed = {row["id"]: row["error"] for row in rows if row.get("error")}
        sound = [row for row in rows if row["id"] not in failed]
        entries = list(_entries(plan, sound, records, len(samples)))
    except (KeyError, TypeError, IndexError) as error:
        raise SweepError(f"{folder.path / 'result.json'}: does not fit its sweep ({error!r})") from error
    full = next((entry for entry in entries if entry.method == FULL.method), None)
    if result is not None and full is None:
        raise SweepError(f"{folder.path / 'result.json'}: no row of the full model")
    return Results(
        plan=plan,
        samples=samples,
        records=records,
        entries=[entry for entry in entries if entry is not full],
        failed=failed,
        full=full,
        times=folder.times(),
        started=_written(folder.path / "sweep.json"),
        ended=_written(folder.path / "result.json") if full is not None else None,
        notes=[str(each) for each in (result or {}).get("notes", ())],
    )


def _entries(
    plan: Plan, rows: Sequence[Mapping[str, Any]], records: Mapping[tuple[str, int], Record], count: int
) -> Iterator[Entry]:
    names = _names(rows)
    scores = {recipe.id: np.full(count, np.nan) for recipe in plan.recipes}
    for (recipe, sample), record in records.items():
        scores[recipe][sample] = record.score
    for row in rows:
        seeds = tuple(each.id for each in plan.recipes if each.row == row["id"])
        yield Entry(row, names[row["id"]], np.mean([scores[seed] for seed in seeds], axis=0), seeds)


def _names(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Row id -> method, with what tells its options from those that the method takes part with as well.

    That is the name of its first option if no other set has it ("cdpruner clip"), else all of them with their values.
    """
    sets: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        chosen = sets.setdefault(row["method"], [])
        if row["options"] not in chosen:
            chosen.append(row["options"])
    found = {}
    for row in rows:
        variants, options = sets[row["method"]], row["options"]
        words = [f"{name}={value}" for name, value in options.items()]
        if len(variants) == 1:
            words = []
        elif options and sum(next(iter(options)) in other for other in variants) == 1:
            words = [next(iter(options))]
        found[row["id"]] = " ".join([row["method"], *words])
    return found


def _samples(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise SweepError(f"{path}: cannot be read ({error})") from error


def _result(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise SweepError(f"{path}: cannot be read ({error})") from error


def _written(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
