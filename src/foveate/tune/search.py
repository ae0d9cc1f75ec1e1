"""The cheapest method, layer and budget that stays close to the full model, by successive halving.

Questions come in rounds, each as many as all before it together. In a round every active candidate is led along the
full model's answers (`reference`); those that already changed more answers than the bound allows by bad luck are
refuted, and with them every smaller budget of their family. After a round half of the candidates are eliminated: the
cheapest of those that look good enough stay. What is left after all rounds is judged by its upper confidence bound
(`estimate`), the cheapest first. If none passes, the eliminated ones become active again, the cheapest half first:
only what was refuted is given up for good.
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
from ..recipe import Recipe
from ..reduction import OptionError, UnsupportedError
from .candidates import Family
from .cost import bill
from .estimate import Bounds, Estimate, estimate, refuted
from .journal import FULL_MODEL, Journal, Measurement
from .reference import Reference

__all__ = ["Batch", "SearchResult", "Trial", "round_sizes", "search"]

Batch = tuple[Sequence[int], Mapping[str, Any]]
"""Numbers of the samples, and what to call the model with."""

ACTIVE, ELIMINATED, REFUTED, REFUSED, PASSED = "active", "eliminated", "refuted", "refused", "passed"


@dataclass
class Trial:
    """How a candidate did.

    Attributes:
        state: "active", "eliminated" (others looked better), "refuted" (too many answers changed), "refused" (cannot
            work in this model; `reason` says why), "passed".
        gaps, kl: of the samples seen, as in `Outcome`, with `margins` of the full model on the same.
        flops, flops_full: of these prefills, and of the full model's.
    """

    recipe: Recipe
    family: str
    state: str = ACTIVE
    reason: str = ""
    rounds: int = 0
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
        trials: every candidate, in the order of the grid.
        samples: questions of the whole set.
        evaluations: pairs of candidate and question that were measured.
        prefills: FLOPs spent on prefills, in full prefills of one question; the full model's own included.
        prefills_exhaustive: the same for every candidate on every question with nothing shared. A candidate that was
            ruled out unseen is counted at the cost of the next larger budget.
        seconds: spent measuring, over all runs if it was resumed.
    """

    chosen: Trial | None
    trials: list[Trial]
    samples: int
    evaluations: int
    prefills: float
    prefills_exhaustive: float
    seconds: float


def round_sizes(samples: int, rounds: int = 4) -> list[int]:
    """Samples new in each round, so that each round doubles what was seen: 64 -> 8, 8, 16, 32."""
    seen = [0, *(max(1, round(samples / 2**turn)) for turn in reversed(range(rounds)))]
    return [size for size in (after - before for before, after in itertools.pairwise(seen)) if size > 0]


def search(
    model: nn.Module,
    rounds: Sequence[Sequence[Batch]],
    families: Sequence[Family],
    bounds: Bounds,
    max_new_tokens: int = 16,
    journal: Journal | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """Find the cheapest candidate whose answers stay within the bounds.

    Args:
        model: any Hugging Face vision-language model that generates.
        rounds: the questions, in batches, see `round_sizes`; drawn at random, so that each round stands for all.
        families: see `candidates.families`.
        bounds: what is good enough.
        max_new_tokens: longest answer.
        journal: where measurements are kept, so that a search that was stopped goes on.
        progress: called with rounds of candidates done and to do; the latter falls as candidates drop out.
    """
    kept = Journal(None) if journal is None else journal
    return _Search(model, rounds, families, bounds, max_new_tokens, kept, progress).run()


class _Search:
    def __init__(
        self,
        model: nn.Module,
        rounds: Sequence[Sequence[Batch]],
        families: Sequence[Family],
        bounds: Bounds,
        max_new_tokens: int,
        journal: Journal,
        progress: Callable[[int, int], None] | None,
    ):
        self.model, self.rounds, self.bounds, self.journal = model, rounds, bounds, journal
        self.max_new_tokens, self.progress = max_new_tokens, progress
        self.families = {family.name: [Trial(c, family.name) for c in family.candidates] for family in families}
        self.trials = [trial for family in self.families.values() for trial in family]
        self._prefix = resolve(model).depth - 1
        self.evaluations, self.seconds, self.spent = 0, 0.0, 0.0
        self.full: dict[tuple[int, ...], Measurement] = {}

    def run(self) -> SearchResult:
        """Halve until one passes, each time with the cheaper half of what was eliminated before."""
        started = list(self.trials)
        while True:
            for turn in range(len(self.rounds)):
                self._advance(started, turn)
                if turn < len(self.rounds) - 1:
                    self._halve(started)
            chosen = self._judge(started)
            eliminated = [trial for trial in self.trials if trial.state == ELIMINATED]
            if chosen is not None or not eliminated:
                return self._result(chosen)
            started = sorted(eliminated, key=lambda trial: trial.cost)[: math.ceil(len(eliminated) / 2)]
            for trial in started:
                trial.state = ACTIVE

    # ------------------------------------------------------------------------------------------------- measuring
    def _advance(self, trials: Sequence[Trial], turn: int) -> None:
        """Measure the candidates that have not seen this round yet on its batches."""
        waiting = [trial for trial in trials if trial.state == ACTIVE and trial.rounds == turn]
        ids = {id(trial) for trial in waiting}
        done = 0
        for samples, inputs in self.rounds[turn]:
            batch = _Batch(self, tuple(samples), inputs, self._prefix)
            for family in self.families.values():
                for trial in reversed(family):  # from the largest budget: what fails there need not be seen below
                    if id(trial) in ids and trial.state == ACTIVE:
                        batch.measure(trial)
                        if refuted(trial.margins, trial.gaps, trial.kl, self.bounds):
                            _refute(family, trial)
            done += len(samples)
            if self.progress is not None:
                active = sum(trial.state == ACTIVE for trial in waiting)
                self.progress(done * active, sum(len(numbers) for numbers, _ in self.rounds[turn]) * active)
        for trial in waiting:
            trial.rounds += 1

    def _halve(self, trials: Sequence[Trial]) -> None:
        """Eliminate half of the active ones: the cheapest that look good enough stay, then the nearest to it."""
        active = [trial for trial in trials if trial.state == ACTIVE]
        order = []
        for trial in active:
            trial.estimate = estimate(trial.margins, trial.gaps, trial.kl, self.bounds)
            excess = trial.estimate.excess
            order.append(((0, trial.cost, excess) if excess <= 1 else (1, excess, trial.cost), trial))
        order.sort(key=lambda pair: pair[0])
        for _, trial in order[math.ceil(len(order) / 2) :]:
            trial.state = ELIMINATED

    def _judge(self, trials: Sequence[Trial]) -> Trial | None:
        """The cheapest whose upper bounds are good enough after all rounds; of equals the less divergent."""
        active = [trial for trial in trials if trial.state == ACTIVE]
        for trial in sorted(active, key=lambda each: (each.cost, each.mean_kl)):
            trial.estimate = estimate(trial.margins, trial.gaps, trial.kl, self.bounds)
            if trial.estimate.upper_excess <= 1:
                trial.state = PASSED
                return trial
            trial.state, trial.reason = REFUTED, "not sure enough on these questions"
        return None

    def _result(self, chosen: Trial | None) -> SearchResult:
        samples = sum(len(numbers) for turn in self.rounds for numbers, _ in turn)
        one = sum(measured.flops for measured in self.full.values()) / max(1, sum(len(key) for key in self.full))
        exhaustive = 0.0
        for family in self.families.values():
            cost = 1.0
            for trial in reversed(family):
                if trial.state != REFUSED:
                    cost = cost if math.isnan(trial.cost) else trial.cost
                    exhaustive += cost * samples
        return SearchResult(
            chosen, self.trials, samples, self.evaluations, self.spent / one, exhaustive + samples, self.seconds
        )


class _Batch:
    """One batch of a search; the full model is asked when something is missing in the journal."""

    def __init__(self, search: _Search, samples: tuple[int, ...], inputs: Mapping[str, Any], prefix: int):
        self.search, self.samples, self.inputs, self.prefix = search, samples, inputs, prefix
        self._reference: Reference | None = None

    def measure(self, trial: Trial) -> None:
        """Add the candidate's measurement on this batch to its trial."""
        search, key = self.search, trial.recipe.id
        found = search.journal.find(key, self.samples) or search.journal.add(self._run(trial.recipe))
        search.seconds += found.seconds
        if found.refused:
            trial.state, trial.reason = REFUSED, found.refused
            return
        full = self._full()
        search.evaluations += len(self.samples)
        search.spent += found.spent
        trial.margins += full.gaps
        trial.gaps += found.gaps
        trial.kl += found.kl
        trial.flops += found.flops
        trial.flops_full += full.flops
        trial.entering += found.entering
        if trial.cost >= 1:
            trial.state, trial.reason = REFUSED, "saves nothing in this model"

    def _run(self, recipe: Recipe) -> Measurement:
        start, reference = time.perf_counter(), self.reference
        try:
            outcome = reference.measure(recipe.build())
        except (OptionError, UnsupportedError) as error:
            return Measurement(recipe.id, list(self.samples), refused=" ".join(str(error).split()))
        ours, full = bill(self.search.model, outcome.trace, self.inputs), reference.bill
        shared = (0.0 if outcome.tower_ran else full.tower) + outcome.skipped / reference.anatomy.depth * full.layers
        return Measurement(
            recipe.id,
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
            self._reference = Reference(self.search.model, self.inputs, self.search.max_new_tokens, self.prefix)
        return self._reference

    def _full(self) -> Measurement:
        search = self.search
        if self.samples not in search.full:
            found = search.journal.find(FULL_MODEL, self.samples)
            if found is None:
                start, reference = time.perf_counter(), self.reference
                total, samples = reference.bill.total, list(self.samples)
                seconds = time.perf_counter() - start
                found = Measurement(FULL_MODEL, samples, reference.margins.tolist(), [], total, 0.0, total, seconds)
                search.journal.add(found)
            search.full[self.samples] = found
            search.spent += found.spent
            search.seconds += found.seconds
        return search.full[self.samples]


def _refute(family: Sequence[Trial], trial: Trial) -> None:
    """Out with a candidate, and with every smaller budget of its family."""
    trial.state = REFUTED
    trial.reason = f"{trial.changed} of {len(trial.gaps)} answers changed, mean KL {trial.mean_kl:.4f}"
    for smaller in family[: family.index(trial)]:
        if smaller.state in (ACTIVE, ELIMINATED):
            smaller.state, smaller.reason = REFUTED, f"{trial.recipe.id} fails already"
