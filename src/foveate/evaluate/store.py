"""The folder of a sweep: what was planned, asked, answered and timed. Nothing is lost when it is killed.

* `sweep.json`: the plan, see `Plan`.
* `samples.jsonl`: the questions.
* `answers.jsonl`: one `Record` a line, appended batch by batch (a second process writes `answers-1.jsonl`, and so on);
  put in order once all are there.
* `times.json`: prefill times by recipe.
* `result.json`: what comes of it.

A line that was cut off by a kill is cut away when the sweep goes on.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import journal
from ..files import write_whole
from ..recipe import Recipe
from .data import FRAMES, Sample, choices_of, references
from .runner import Record

__all__ = ["Folder", "Plan", "SweepError"]

VERSION = 2
_FIXED = ("model", "weights", "dtype", "data", "samples", "seed", "frames", "metric", "max_new_tokens", "batch_size")
"""What may not change between a sweep and its continuation."""


class SweepError(ValueError):
    """A folder cannot be used, or a process of the sweep failed. The message says which and why."""


@dataclass
class Plan:
    """What a sweep does.

    Attributes:
        data: names of data sets or files.
        samples: questions drawn from each data set; None for all.
        seed: of the draw.
        metric: as asked for ("auto" too); `metrics` is the one of each data set.
        recipes: the full model is the first.
        refused: {"id", "reason"} of those that this model cannot serve.
        weights: fingerprint of the model.
        frames: of each video that is asked about.
        machine, command: where and how it was started; may differ in a continuation.
    """

    model: str
    data: list[str]
    samples: int | None
    seed: int
    metric: str
    max_new_tokens: int
    batch_size: int
    recipes: list[Recipe]
    refused: list[dict[str, str]] = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=dict)
    dtype: str = "float32"
    device: str = "cpu"
    weights: str = ""
    frames: int = FRAMES
    machine: dict[str, Any] = field(default_factory=dict)
    command: str = ""

    def to_json(self) -> dict[str, Any]:
        """As it is written in `sweep.json`."""
        return {"version": VERSION, **asdict(self), "recipes": [each.to_json() for each in self.recipes]}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Plan:
        """What `to_json` wrote; version 1 said "contestants"."""
        fields = {"recipes" if name == "contestants" else name: row[name] for name in row if name != "version"}
        return cls(**{**fields, "recipes": [Recipe.from_json(each) for each in fields["recipes"]]})

    def difference(self, earlier: Plan) -> str | None:
        """Why the answers of `earlier` cannot be gone on with, None if they can: recipes may only be added."""
        for name in _FIXED:
            ours, theirs = getattr(self, name), getattr(earlier, name)
            if ours != theirs:
                return f"{name} was {_short(theirs)}, now it is {_short(ours)}"
        gone = {each.id for each in earlier.recipes} - {each.id for each in self.recipes}
        if gone:
            return f"{', '.join(sorted(gone)[:3])}{' and others' if len(gone) > 3 else ''} took part and now would not"
        return None


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


class Folder:
    """One sweep on disk.

    Raises:
        SweepError: it cannot be written, another sweep is at work in it, or it holds a sweep that differs.
    """

    def __init__(self, path: Path):
        self.path = path

    # ------------------------------------------------------------------------------------------------- plan, samples
    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second sweep out. The lock goes with the process, however it ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.path / ".lock", "a+")  # noqa: SIM115 - held open on purpose
        except OSError as error:
            raise SweepError(f"out {self.path}: cannot be written ({error.strerror})") from error
        with file:
            try:
                import fcntl
            except ImportError:  # pragma: no cover - Windows
                yield
                return
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise SweepError(f"out {self.path}: another sweep is at work there") from error
            yield

    def begin(self, plan: Plan, samples: Sequence[Sample], data: Sequence[str]) -> None:
        """Write the plan, or check it against the one that is there; cut off half-written lines."""
        asked = journal.lines(
            _described(i, name, sample) for i, (name, sample) in enumerate(zip(data, samples, strict=True))
        )
        if (self.path / "sweep.json").exists():
            difference = plan.difference(self.plan())
            written = self.path / "samples.jsonl"
            if difference is None and written.exists() and written.read_text() != asked:
                difference = f"the questions of {', '.join(plan.data)} are others"
            if difference is not None:
                raise SweepError(f"out {self.path}: holds another sweep: {difference}; give another folder")
        elif self._shards():
            raise SweepError(f"out {self.path}: holds answers but no sweep.json; give another folder")
        for shard in self._shards():
            journal.repair(shard)
        write_whole(self.path / "samples.jsonl", asked)
        self._write("sweep.json", plan.to_json())

    def plan(self) -> Plan:
        """The plan that is there."""
        path = self.path / "sweep.json"
        try:
            return Plan.from_json(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SweepError(f"{path}: cannot be read ({error})") from error

    # ------------------------------------------------------------------------------------------------------- answers
    def shard(self, number: int) -> Path:
        """The file that process `number` appends to."""
        return self.path / (f"answers-{number}.jsonl" if number else "answers.jsonl")

    def _shards(self) -> list[Path]:
        return sorted(self.path.glob("answers*.jsonl"))

    def records(self) -> dict[tuple[str, int], Record]:
        """What was answered, by recipe and sample."""
        found: dict[tuple[str, int], Record] = {}
        for path in self._shards():
            try:
                rows = journal.read(path)
            except ValueError as error:
                raise SweepError(f"{path}, {error}") from error
            for number, row in enumerate(rows, 1):
                try:
                    record = Record.from_json(row)
                except (ValueError, TypeError) as error:
                    raise SweepError(f"{path}, line {number}: cannot be read ({error})") from error
                found.setdefault((record.recipe, record.sample), record)
        return found

    def append(self, number: int, records: Iterable[Record]) -> None:
        """Add to the file of process `number`."""
        journal.append(self.shard(number), (record.to_json() for record in records))

    def arrange(self, records: Iterable[Record]) -> None:
        """Put all answers into one file, in the order given."""
        write_whole(self.shard(0), journal.lines(record.to_json() for record in records))
        for path in self._shards():
            if path != self.shard(0):
                path.unlink()

    # --------------------------------------------------------------------------------------------- times and results
    def times(self) -> dict[str, Any]:
        """Prefill times by recipe, empty if they were not taken yet."""
        path = self.path / "times.json"
        try:
            return json.loads(path.read_text()) if path.exists() else {}
        except ValueError as error:
            raise SweepError(f"{path}: cannot be read ({error})") from error

    def write_times(self, times: Mapping[str, Any]) -> None:
        """Write `times.json`."""
        self._write("times.json", times)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write `result.json`."""
        self._write("result.json", result)

    def _write(self, name: str, value: Any) -> None:
        write_whole(self.path / name, json.dumps(value, indent=2) + "\n")


def _described(number: int, data: str, sample: Sample) -> dict[str, Any]:
    row: dict[str, Any] = {
        "sample": number,
        "data": data,
        "image_id": sample.image_id,
        "kind": sample.kind,
        "question": sample.question,
        "answer": sample.answer,
    }
    if references(sample) != (sample.answer,):
        row["answers"] = list(references(sample))
    if choices_of(sample):
        row["choices"] = list(choices_of(sample))
    return row
