"""What a prefill computed and stored, read off its trace: per sample, and summed over a batch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..engine.trace import Trace
from ..measure import Geometry, exact_flops, kv_bytes, prefill_flops
from ..reduction import Reducer, UnsupportedError
from .answer import VLM, Batch, prefill_seconds

__all__ = ["Costs", "Spread", "costs", "prefill_spreads", "prefill_times", "sample_costs"]


@dataclass
class Costs:
    """What one prefill of `rows` samples computed and stored.

    Attributes:
        visual_tokens: mean over the rows, of the prompt before anything is removed.
        entering, after: visual tokens per layer, averaged over layers and rows: those that entered a layer, and those
            left after it.
        flops: decoder prefill, all rows together (`foveate.measure.exact_flops`); NaN for a mixture of experts.
        kv_bytes: keys and values of all layers and rows after the prefill; NaN likewise.
        flops_total: vision tower and connector included (`foveate.measure.prefill_flops`); NaN where the inputs are not
            given or the tower cannot be followed.
    """

    rows: int
    visual_tokens: float
    entering: float
    after: float
    flops: float
    kv_bytes: float
    flops_total: float = math.nan


def sample_costs(vlm: VLM, trace: Trace, inputs: Mapping[str, Any] | None = None) -> list[Costs]:
    """The costs of each row of a prefill by itself.

    Padding and the fillers of a ragged batch are not counted: they depend on the company, not on the sample. Vision
    tower and connector are shared out equally, since the rows of a batch hold equal images.

    Args:
        trace: of the prefill, `session.trace`.
        inputs: what the model was called with; without them there is no `flops_total`.
    """
    visual = (trace.visual & trace.tokens).sum(1).tolist()
    entering, after = trace.mean_visual_tokens.tolist(), trace.mean_visual_tokens_after.tolist()
    lengths = torch.stack([trace.active(layer - 1).sum(1) for layer in range(trace.n_layers)], dim=1).tolist()
    before = _vision_flops(vlm, trace, inputs) / len(visual)
    dtype_bytes = next(vlm.model.parameters()).element_size()
    try:
        geometry = Geometry.from_config(vlm.model.config, visual_tokens=0, text_tokens=0)
    except ValueError:  # a mixture of experts
        geometry = None
    found: dict[tuple[int, ...], tuple[float, float]] = {}  # rows of equal length cost the same
    result = []
    for row, length in enumerate(map(tuple, lengths)):
        if length not in found:
            found[length] = (
                (math.nan, math.nan)
                if geometry is None
                else (exact_flops(geometry, length), kv_bytes(geometry, length, dtype_bytes))
            )
        flops, stored = found[length]
        result.append(Costs(1, float(visual[row]), entering[row], after[row], flops, stored, flops + before))
    return result


def _vision_flops(vlm: VLM, trace: Trace, inputs: Mapping[str, Any] | None) -> float:
    if inputs is None:
        return math.nan
    try:
        counted = prefill_flops(vlm.model, trace, inputs)
    except (UnsupportedError, ValueError):
        return math.nan
    return float(counted.vision + counted.connector)


def costs(vlm: VLM, trace: Trace, full: bool = False) -> Costs:
    """Read the costs of a prefill off its trace; with `full`, those of the same prefill without reduction."""
    if full:
        trace = Trace(trace.n_layers, trace.visual, trace.tokens)
    rows = sample_costs(vlm, trace)
    total = {field.name: sum(getattr(row, field.name) for row in rows) for field in fields(Costs)}
    for mean in ("visual_tokens", "entering", "after"):
        total[mean] /= len(rows)
    return Costs(**total)


# ---------------------------------------------------------------------------------------------------------------- time
@dataclass
class Spread:
    """Milliseconds of a prefill of a batch: quartiles over `runs` runs."""

    median: float
    q1: float
    q3: float
    runs: int

    def to_json(self) -> dict[str, Any]:
        """As it is written in `times.json`."""
        return {"prefill_ms": self.median, "q1": self.q1, "q3": self.q3, "runs": self.runs}


def prefill_spreads(
    vlm: VLM, chosen: Sequence[Batch], reducers: Sequence[Reducer | None], repeats: int = 3, progress: Any = None
) -> list[Spread]:
    """Milliseconds of a prefill under each reducer; None is the unmodified model.

    Whoever shares the machine slows all of them alike: each batch goes through all reducers before the next one comes,
    and the order is reversed every other time. The first pass through each is not counted.

    Args:
        progress: called with (done, total) runs.
    """
    seconds: list[list[float]] = [[] for _ in reducers]
    done, total = 0, len(reducers) * len(chosen) * repeats
    for turn in range(repeats):
        order = list(range(len(reducers)))[:: -1 if turn % 2 else 1]
        for batch in chosen:
            for i in order:
                reducer = reducers[i]
                with vlm.apply(reducer, batch.samples, batch.inputs) if reducer is not None else nullcontext():
                    if not seconds[i]:
                        prefill_seconds(vlm, batch.inputs)
                    seconds[i].append(prefill_seconds(vlm, batch.inputs))
                done += 1
                if progress is not None:
                    progress(done, total)
    return [_spread([1000 * second for second in each]) for each in seconds]


def _spread(milliseconds: list[float]) -> Spread:
    median = statistics.median(milliseconds)
    if len(milliseconds) < 2:
        return Spread(median, median, median, len(milliseconds))
    q1, _, q3 = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return Spread(median, q1, q3, len(milliseconds))


def prefill_times(
    vlm: VLM, chosen: Sequence[Batch], reducers: Sequence[Reducer | None], repeats: int = 3
) -> list[float]:
    """Median milliseconds of a prefill under each reducer, see `prefill_spreads`."""
    return [spread.median for spread in prefill_spreads(vlm, chosen, reducers, repeats)]
