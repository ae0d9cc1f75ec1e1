"""The cheapest method, layer and budget that stays close to the full model: a race by successive halving.

Questions come in rungs, each as many as all before it together. In a rung every candidate still in the race is led
along the full model's answers (`reference`); out are those that already changed more answers than the bound allows by
bad luck, and, within a family, every smaller budget with them. After a rung the better half goes on: of those that
look good enough the cheapest. Whoever got through all rungs is judged by its upper confidence bound (`estimate`), the
cheapest first. If none passes, the race goes on among those that were left behind, cheapest first: nothing is given up
unseen but what was refuted.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..engine.families.parts import resolve
from ..reduction import OptionError, UnsupportedError
from .candidates import Candidate, Family
from .cost import bill
from .estimate import Bounds, Estimate, estimate, refuted
from .journal import FULL_MODEL, Journal, Measurement
from .reference import Reference

__all__ = ["Batch", "SearchResult", "Standing", "rung_sizes", "search"]

Batch = tuple[Sequence[int], Mapping[str, Any]]
"""Numbers of the samples, and what to call the model with."""

RACING, BEHIND, REFUTED, REFUSED, PASSED = "racing", "left behind", "refuted", "refused", "passed"


@dataclass
class Standing:
    """How a candidate did.

    Attributes:
        state: "racing", "left behind" (others looked better), "refuted" (too many answers changed), "refused" (cannot
            work in this model; `reason` says why), "passed".
        gaps, kl: of the samples seen, as in `Outcome`, with `margins` of the full model on the same.
        flops, flops_full: of these prefills, and of the full model's.
    """

    candidate: Candidate
    family: str
    state: str = RACING
    reason: str = ""
    rungs: int = 0
    margins: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    flops: float = 0.0
    flops_full: float = 0.0
    entering: float = 0.0
    estimate: Estimate | None = None

    @property
    def cost(self) -> float:
        """Prefill FLOPs, vision tower included, as a share of the full model's; NaN before the first sample."""
        return self.flops / self.flops_full if self.flops_full else math.nan

    @property
    def changed(self) -> int:
        """Answers seen to change."""
        return sum(gap < 0 for gap in self.gaps)

    @property
    def mean_kl(self) -> float:
        """Mean KL(reduced || full) of the first answer token, nats."""
        return sum(self.kl) / len(self.kl) if self.kl else math.nan

    @property
    def visual_tokens(self) -> float:
        """Visual tokens that entered a decoder layer, averaged over layers and samples."""
        return self.entering / len(self.gaps) if self.gaps else math.nan


@dataclass
class SearchResult:
    """What a search found and what it took.

    Attributes:
        chosen: the cheapest candidate within the bounds; None: nothing qualifies, keep the full model.
        standings: every candidate, in the order of the grid.
        samples: questions of the whole set.
        evaluations: pairs of candidate and question that were measured.
        prefills: FLOPs spent on prefills, in full prefills of one question; the full model's own included.
        prefills_exhaustive: the same for every candidate on every question with nothing shared. A candidate that was
            ruled out unseen is counted at the cost of the next larger budget.
        seconds: spent measuring, over all runs if it was resumed.
    """

    chosen: Standing | None
    standings: list[Standing]
    samples: int
    evaluations: int
    prefills: float
    prefills_exhaustive: float
    seconds: float


def rung_sizes(samples: int, rungs: int = 4) -> list[int]:
    """Samples new in each rung, so that each rung doubles what was seen: 64 -> 8, 8, 16, 32."""
    seen = [0, *(max(1, round(samples / 2**rung)) for rung in reversed(range(rungs)))]
    return [size for size in (after - before for before, after in itertools.pairwise(seen)) if size > 0]


def search(
    model: nn.Module,
    rungs: Sequence[Sequence[Batch]],
    families: Sequence[Family],
    bounds: Bounds,
    max_new_tokens: int = 16,
    journal: Journal | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """Find the cheapest candidate whose answers stay within the bounds.

    Args:
        model: any Hugging Face vision-language model that generates.
        rungs: the questions, in batches, see `rung_sizes`; drawn at random, so that each rung stands for all.
        families: see `candidates.families`.
        bounds: what is good enough.
        max_new_tokens: longest answer.
        journal: where measurements are kept, so that a search that was stopped goes on.
        progress: called with rungs of candidates done and to do; the latter falls as candidates drop out.
    """
    kept = Journal(None) if journal is None else journal
    return _Race(model, rungs, families, bounds, max_new_tokens, kept, progress).run()


class _Race:
    def __init__(
        self,
        model: nn.Module,
        rungs: Sequence[Sequence[Batch]],
        families: Sequence[Family],
        bounds: Bounds,
        max_new_tokens: int,
        journal: Journal,
        progress: Callable[[int, int], None] | None,
    ):
        self.model, self.rungs, self.bounds, self.journal = model, rungs, bounds, journal
        self.max_new_tokens, self.progress = max_new_tokens, progress
        self.families = {family.name: [Standing(c, family.name) for c in family.candidates] for family in families}
        self.standings = [standing for family in self.families.values() for standing in family]
        self._prefix = resolve(model).depth - 1
        self.evaluations, self.seconds, self.spent = 0, 0.0, 0.0
        self.full: dict[tuple[int, ...], Measurement] = {}

    def run(self) -> SearchResult:
        """The race, then one more for each lot of those left behind, until one passes."""
        started = list(self.standings)
        while True:
            for rung in range(len(self.rungs)):
                self._advance(started, rung)
                if rung < len(self.rungs) - 1:
                    self._halve(started)
            chosen = self._judge(started)
            behind = [standing for standing in self.standings if standing.state == BEHIND]
            if chosen is not None or not behind:
                return self._result(chosen)
            started = sorted(behind, key=lambda standing: standing.cost)[: math.ceil(len(behind) / 2)]
            for standing in started:
                standing.state = RACING

    # ------------------------------------------------------------------------------------------------- measuring
    def _advance(self, runners: Sequence[Standing], rung: int) -> None:
        """Measure the runners that have not seen this rung yet on its batches."""
        waiting = [standing for standing in runners if standing.state == RACING and standing.rungs == rung]
        ids = {id(standing) for standing in waiting}
        done = 0
        for samples, inputs in self.rungs[rung]:
            batch = _Batch(self, tuple(samples), inputs, self._prefix)
            for family in self.families.values():
                for standing in reversed(family):  # from the largest budget: what fails there need not be seen below
                    if id(standing) in ids and standing.state == RACING:
                        batch.measure(standing)
                        if refuted(standing.margins, standing.gaps, standing.kl, self.bounds):
                            _refute(family, standing)
            done += len(samples)
            if self.progress is not None:
                racing = sum(standing.state == RACING for standing in waiting)
                self.progress(done * racing, sum(len(numbers) for numbers, _ in self.rungs[rung]) * racing)
        for standing in waiting:
            standing.rungs += 1

    def _halve(self, runners: Sequence[Standing]) -> None:
        """Leave half of the racing ones behind: keep the cheapest that look good enough, then the nearest to it."""
        racing = [standing for standing in runners if standing.state == RACING]
        order = []
        for standing in racing:
            standing.estimate = estimate(standing.margins, standing.gaps, standing.kl, self.bounds)
            excess = standing.estimate.excess
            order.append(((0, standing.cost, excess) if excess <= 1 else (1, excess, standing.cost), standing))
        order.sort(key=lambda pair: pair[0])
        for _, standing in order[math.ceil(len(order) / 2) :]:
            standing.state = BEHIND

    def _judge(self, runners: Sequence[Standing]) -> Standing | None:
        """The cheapest whose upper bounds are good enough after all rungs; of equals the less divergent."""
        racing = [standing for standing in runners if standing.state == RACING]
        for standing in sorted(racing, key=lambda each: (each.cost, each.mean_kl)):
            standing.estimate = estimate(standing.margins, standing.gaps, standing.kl, self.bounds)
            if standing.estimate.upper_excess <= 1:
                standing.state = PASSED
                return standing
            standing.state, standing.reason = REFUTED, "not sure enough on these questions"
        return None

    def _result(self, chosen: Standing | None) -> SearchResult:
        samples = sum(len(numbers) for rung in self.rungs for numbers, _ in rung)
        one = sum(measured.flops for measured in self.full.values()) / max(1, sum(len(key) for key in self.full))
        exhaustive = 0.0
        for family in self.families.values():
            cost = 1.0
            for standing in reversed(family):
                if standing.state != REFUSED:
                    cost = cost if math.isnan(standing.cost) else standing.cost
                    exhaustive += cost * samples
        return SearchResult(
            chosen, self.standings, samples, self.evaluations, self.spent / one, exhaustive + samples, self.seconds
        )


class _Batch:
    """One batch of a race; the full model is asked when something is missing in the journal."""

    def __init__(self, race: _Race, samples: tuple[int, ...], inputs: Mapping[str, Any], prefix: int):
        self.race, self.samples, self.inputs, self.prefix = race, samples, inputs, prefix
        self._reference: Reference | None = None

    def measure(self, standing: Standing) -> None:
        """Add the candidate's measurement on this batch to its standing."""
        race, key = self.race, standing.candidate.key
        found = race.journal.find(key, self.samples) or race.journal.add(self._run(standing.candidate))
        race.seconds += found.seconds
        if found.refused:
            standing.state, standing.reason = REFUSED, found.refused
            return
        full = self._full()
        race.evaluations += len(self.samples)
        race.spent += found.spent
        standing.margins += full.gaps
        standing.gaps += found.gaps
        standing.kl += found.kl
        standing.flops += found.flops
        standing.flops_full += full.flops
        standing.entering += found.entering
        if standing.cost >= 1:
            standing.state, standing.reason = REFUSED, "saves nothing in this model"

    def _run(self, candidate: Candidate) -> Measurement:
        start, reference = time.perf_counter(), self.reference
        try:
            outcome = reference.measure(candidate.build())
        except (OptionError, UnsupportedError) as error:
            return Measurement(candidate.key, list(self.samples), refused=" ".join(str(error).split()))
        ours, full = bill(self.race.model, outcome.trace, self.inputs), reference.bill
        shared = (0.0 if outcome.tower_ran else full.tower) + outcome.skipped / reference.anatomy.depth * full.layers
        return Measurement(
            candidate.key,
            list(self.samples),
            outcome.gaps.tolist(),
            outcome.kl.tolist(),
            ours.total,
            float(outcome.trace.mean_visual_tokens.sum()),
            ours.total - shared,
            time.perf_counter() - start,
        )

    @property
    def reference(self) -> Reference:
        """The full model on this batch."""
        if self._reference is None:
            self._reference = Reference(self.race.model, self.inputs, self.race.max_new_tokens, self.prefix)
        return self._reference

    def _full(self) -> Measurement:
        race = self.race
        if self.samples not in race.full:
            found = race.journal.find(FULL_MODEL, self.samples)
            if found is None:
                start, reference = time.perf_counter(), self.reference
                total, samples = reference.bill.total, list(self.samples)
                seconds = time.perf_counter() - start
                found = Measurement(FULL_MODEL, samples, reference.margins.tolist(), [], total, 0.0, total, seconds)
                race.journal.add(found)
            race.full[self.samples] = found
            race.spent += found.spent
            race.seconds += found.seconds
        return race.full[self.samples]


def _refute(family: Sequence[Standing], standing: Standing) -> None:
    """Out with a candidate, and with every smaller budget of its family."""
    standing.state = REFUTED
    standing.reason = f"{standing.changed} of {len(standing.gaps)} answers changed, mean KL {standing.mean_kl:.4f}"
    for smaller in family[: family.index(standing)]:
        if smaller.state in (RACING, BEHIND):
            smaller.state, smaller.reason = REFUTED, f"{standing.candidate.key} fails already"
