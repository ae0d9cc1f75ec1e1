"""Methods against the full model: the same questions, the same batches, interleaved."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from ..engine.session import apply
from ..engine.trace import Trace
from ..measure import Geometry, exact_flops, kv_bytes
from ..reduction import Reducer
from ..tune import next_token_divergence
from .answer import VLM, Batch, answer, batches, prefill_seconds
from .data import Sample
from .score import accuracy, agreement, standard_error

__all__ = ["Contestant", "Costs", "Row", "compare", "costs", "prefill_times"]

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclass(frozen=True)
class Contestant:
    """One method with its options; `reducer=None` is the full model."""

    method: str
    reducer: Reducer | None
    keep: int | float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Costs:
    """What one prefill of `rows` samples computed and stored.

    Attributes:
        visual_tokens: mean over the rows, of the prompt before anything is removed.
        entering, after: visual tokens per layer, averaged over layers and rows: those that entered a layer, and those
            left after it.
        flops: decoder prefill, all rows together (`foveate.measure.exact_flops`); NaN for a mixture of experts.
        kv_bytes: keys and values of all layers and rows after the prefill; NaN likewise.
    """

    rows: int
    visual_tokens: float
    entering: float
    after: float
    flops: float
    kv_bytes: float


@dataclass
class Row:
    """One method on one or more data sets. Ratios are reduced / full; times are milliseconds per prefill of a batch."""

    method: str
    options: dict[str, Any]
    keep: int | float | None
    samples: int
    accuracy: float
    accuracy_full: float
    accuracy_by_data: dict[str, float]
    agreement: float
    kl: float
    visual_tokens_entering: float
    visual_tokens_after: float
    flops_ratio: float
    kv_ratio: float
    kv_mb: float
    prefill_ms: float | None = None
    prefill_ms_full: float | None = None

    @property
    def relative(self) -> float | None:
        """Accuracy as a share of the full model's, None where that is 0."""
        return self.accuracy / self.accuracy_full if self.accuracy_full else None

    @property
    def accuracy_error(self) -> float:
        """Binomial standard error of the accuracy."""
        return standard_error(self.accuracy, self.samples)

    def to_json(self) -> dict[str, Any]:
        """The row as it is written to files."""
        return {**self.__dict__, "relative": self.relative, "accuracy_error": self.accuracy_error}


def costs(vlm: VLM, trace: Trace, full: bool = False) -> Costs:
    """Read the costs of a prefill off its trace; with `full`, those of the same prefill without reduction."""
    if full:
        trace = Trace(trace.n_layers, trace.visual, trace.tokens)
    try:
        geometry = Geometry.from_config(vlm.model.config, visual_tokens=0, text_tokens=0)
    except ValueError:  # a mixture of experts
        geometry = None
    return Costs(
        rows=len(trace.visual),
        visual_tokens=float((trace.visual & trace.tokens).sum(1).double().mean()),
        entering=float(trace.mean_visual_tokens.mean()),
        after=float(trace.mean_visual_tokens_after.mean()),
        flops=math.nan if geometry is None else exact_flops(geometry, trace),
        kv_bytes=math.nan
        if geometry is None
        else kv_bytes(geometry, trace, next(vlm.model.parameters()).element_size()),
    )


@dataclass
class _Tally:
    """What is collected about one contestant, in the order of the samples."""

    texts: list[str]
    kl: list[float] = field(default_factory=list)
    costs: list[Costs] = field(default_factory=list)
    full: list[Costs] = field(default_factory=list)

    def mean(self, name: str) -> float:
        return sum(getattr(c, name) * c.rows for c in self.costs) / sum(c.rows for c in self.costs)

    def ratio(self, name: str) -> float:
        return sum(getattr(c, name) for c in self.costs) / sum(getattr(c, name) for c in self.full)


class _Nothing(Reducer):
    """The full model under the eyes of a trace: nothing is decided, nothing removed."""


def compare(
    vlm: VLM,
    data: Mapping[str, Sequence[Sample]],
    contestants: Sequence[Contestant],
    batch_size: int = 16,
    max_new_tokens: int = 8,
    timing_batches: int = 4,
    timing_repeats: int = 3,
    progress: Progress | None = None,
) -> list[Row]:
    """Accuracy and cost of every contestant, the full model first.

    Every batch is answered by the full model and then by each contestant; so all see the same rows in the same company.
    Prefill times are taken afterwards on the largest batches (`prefill_times`).

    Args:
        data: samples by the name of their data set.
        contestants: the methods; the full model is added.
        timing_batches: batches to time, 0 for no times.

    Returns:
        One row for the full model, then one for each contestant.
    """
    everyone = [Contestant("full", None, 1.0), *contestants]
    samples = [sample for rows in data.values() for sample in rows]
    tallies = [_Tally([""] * len(samples)) for _ in everyone]
    timed: list[Batch] = []
    done = 0
    for batch in batches(vlm, samples, batch_size):
        timed = sorted([*timed, batch], key=lambda each: -len(each.indices))[:timing_batches]
        full_log_probs = None
        for contestant, tally in zip(everyone, tallies, strict=True):
            with apply(vlm.model, contestant.reducer or _Nothing()) as session:
                said = answer(vlm, batch.inputs, max_new_tokens)
            assert session.trace is not None  # a prefill with images just ran
            full_log_probs = said.log_probs if full_log_probs is None else full_log_probs
            tally.kl += next_token_divergence(said.log_probs, full_log_probs).tolist()
            tally.costs.append(costs(vlm, session.trace))
            tally.full.append(costs(vlm, session.trace, full=True))
            for index, text in zip(batch.indices, said.texts, strict=True):
                tally.texts[index] = text
            done += len(batch.indices)
            if progress is not None:
                progress(done, len(samples) * len(everyone))
    times: list[float | None] = [None] * len(everyone)
    if timed:
        times = [*prefill_times(vlm, timed, [contestant.reducer for contestant in everyone], timing_repeats)]
    return list(_rows(everyone, tallies, times, data))


def _rows(
    everyone: Sequence[Contestant],
    tallies: Sequence[_Tally],
    times: Sequence[float | None],
    data: Mapping[str, Sequence[Sample]],
) -> Iterator[Row]:
    answers = [sample.answer for rows in data.values() for sample in rows]
    said_by_full = tallies[0].texts
    for contestant, tally, milliseconds in zip(everyone, tallies, times, strict=True):
        by_data, start = {}, 0
        for name, rows in data.items():
            part = slice(start, start + len(rows))
            by_data[name] = accuracy(tally.texts[part], answers[part])
            start += len(rows)
        yield Row(
            method=contestant.method,
            options=dict(contestant.options),
            keep=contestant.keep,
            samples=len(answers),
            accuracy=accuracy(tally.texts, answers),
            accuracy_full=accuracy(said_by_full, answers),
            accuracy_by_data=by_data,
            agreement=agreement(tally.texts, said_by_full),
            kl=sum(tally.kl) / len(tally.kl),
            visual_tokens_entering=tally.mean("entering"),
            visual_tokens_after=tally.mean("after"),
            flops_ratio=tally.ratio("flops"),
            kv_ratio=tally.ratio("kv_bytes"),
            kv_mb=sum(c.kv_bytes for c in tally.costs) / len(answers) / 1e6,
            prefill_ms=milliseconds,
            prefill_ms_full=times[0],
        )


def prefill_times(
    vlm: VLM, chosen: Sequence[Batch], reducers: Sequence[Reducer | None], repeats: int = 3
) -> list[float]:
    """Median milliseconds of a prefill under each reducer; None is the unmodified model.

    Whoever shares the machine slows all of them alike: each batch goes through all reducers before the next one comes,
    and the order is reversed every other time. The first pass through each is not counted.
    """
    seconds: list[list[float]] = [[] for _ in reducers]
    for turn in range(repeats):
        order = list(range(len(reducers)))[:: -1 if turn % 2 else 1]
        for batch in chosen:
            for i in order:
                reducer = reducers[i]
                with apply(vlm.model, reducer) if reducer is not None else nullcontext():
                    if not seconds[i]:
                        prefill_seconds(vlm, batch.inputs)
                    seconds[i].append(prefill_seconds(vlm, batch.inputs))
    return [1000 * statistics.median(each) for each in seconds]
