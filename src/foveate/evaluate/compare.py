"""Methods against the full model in one go, nothing written: what `foveate demo` shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..recipe import Recipe
from . import results
from .answer import VLM
from .costs import Costs, costs, prefill_spreads, prefill_times
from .data import Sample
from .metrics import AUTO, choose
from .runner import Runner

__all__ = ["Costs", "compare", "costs", "prefill_times"]

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


def compare(
    vlm: VLM,
    data: Mapping[str, Sequence[Sample]],
    recipes: Sequence[Recipe],
    batch_size: int = 16,
    max_new_tokens: int = 8,
    timing_batches: int = 4,
    timing_repeats: int = 3,
    metric: str = AUTO,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Accuracy and cost of every recipe, the full model first, as `results.rows` describes them.

    Every batch is answered by the full model and then by each recipe; so all see the same rows in the same company.
    Prefill times are taken afterwards on the largest batches.

    Args:
        data: samples by the name of their data set.
        recipes: the methods; the full model is added.
        timing_batches: batches to time, 0 for no times.
        progress: called for the answers, then for the times.
    """
    samples = [sample for part in data.values() for sample in part]
    names = [name for name, part in data.items() for _ in part]
    metrics = {name: choose(metric, part, name) for name, part in data.items()}
    runner = Runner(
        vlm, samples, [metrics[name] for name in names], recipes, None, batch_size, max_new_tokens
    )  # fmt: skip
    everyone = range(len(runner.recipes))
    records = []
    for group in runner.groups:
        for answered in runner.ask(runner.batch(group), everyone):
            records += answered
            if progress is not None:
                progress(len(records), len(samples) * len(everyone))
    times = {}
    if timing_batches:
        failed = {record.recipe for record in records if record.error}
        timed = [pair for pair in zip(runner.recipes, runner.reducers) if pair[0].id not in failed]
        spreads = prefill_spreads(
            vlm, runner.largest(timing_batches), [each for _, each in timed], timing_repeats, progress
        )
        times = {each.id: spread.to_json() for (each, _), spread in zip(timed, spreads, strict=True)}
    return results.rows(recipes, samples, names, metrics, records, times)
