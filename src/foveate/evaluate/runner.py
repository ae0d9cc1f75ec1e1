"""Batches of questions go through all recipes in turns, and every answer becomes a record."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..engine.vision.shared import SharedVision, shareable
from ..recipe import Recipe
from ..reduction import BudgetError, OptionError, Reducer, UnsupportedError
from ..tune import next_token_divergence
from .answer import VLM, Answers, Batch, answer, groups
from .costs import sample_costs
from .data import Sample
from .grid import FULL, build_reducer
from .metrics import METRICS
from .score import matches

__all__ = ["Record", "Runner"]

_NO_NUMBERS = "its logits are NaN or infinite"


@dataclass(frozen=True)
class Record:
    """One recipe's answer to one sample; everything in it concerns that sample alone.

    Attributes:
        recipe: its id.
        sample: its number.
        predicted: the answer.
        score: by the metric of its data set, in [0, 1].
        same: whether the full model says the same, normalised.
        kl: KL(recipe || full) of the first answer token, nats; None with an `error`.
        visual_tokens, entering, after, flops, flops_total, kv_bytes: see `costs.Costs`; None where not known.
        error: why there is no answer; then the score is 0.
    """

    recipe: str
    sample: int
    predicted: str
    score: float
    same: bool
    kl: float | None
    visual_tokens: float | None
    entering: float | None
    after: float | None
    flops: float | None
    flops_total: float | None
    kv_bytes: float | None
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """As it is written in `answers.jsonl`."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Record:
        """What `to_json` wrote; older versions said "contestant". Raises `TypeError` for anything else."""
        return cls(**{"recipe" if name == "contestant" else name: value for name, value in dict(row).items()})


class _Nothing(Reducer):
    """The full model under the eyes of a trace: nothing is decided, nothing removed."""


class Runner:
    """Asks the questions.

    How questions are put into batches depends on the samples and the batch size alone, so an answer does not change
    with what was asked before, or by whom.

    Args:
        samples: all of them.
        metrics: name of the metric of each sample.
        recipes: without the full model, which is added in front.
        reducers: their methods, None to build them.
        share_vision: run the tower once for all methods that leave it alone.
    """

    def __init__(
        self,
        vlm: VLM,
        samples: Sequence[Sample],
        metrics: Sequence[str],
        recipes: Sequence[Recipe],
        reducers: Sequence[Reducer] | None = None,
        batch_size: int = 32,
        max_new_tokens: int = 8,
        share_vision: bool = True,
    ):
        self.vlm, self.samples, self.metrics = vlm, samples, metrics
        self.recipes = [FULL, *recipes]
        built = [build_reducer(each, vlm) for each in recipes] if reducers is None else reducers
        self.reducers: list[Reducer | None] = [None, *built]
        self.max_new_tokens, self.share_vision = max_new_tokens, share_vision
        self.groups = list(groups(vlm, samples, batch_size))

    def batch(self, group: Sequence[int]) -> Batch:
        """The samples of these numbers, ready for the model."""
        chosen = [self.samples[index] for index in group]
        return Batch(list(group), chosen, self.vlm.inputs(chosen))

    def ask(self, batch: Batch, wanted: Sequence[int]) -> Iterator[list[Record]]:
        """Records of a batch for each recipe (by number, 0 is the full model) in `wanted`, in their order.

        The full model is asked in any case, since the others are compared with it. A method that this batch cannot be
        served with has records with an `error`.

        Raises:
            UnsupportedError: the full model's logits are no numbers.
        """
        shared, full = SharedVision(self.vlm.model), None
        for number in sorted({0, *wanted}):
            reducer = self.reducers[number]
            try:
                with self.vlm.apply(reducer or _Nothing(), batch.samples, batch.inputs) as session:
                    sharing = self.share_vision and shareable(session.reducer)
                    with shared.serving() if sharing else contextlib.nullcontext():
                        said = answer(self.vlm, batch.inputs, self.max_new_tokens)
            except (BudgetError, OptionError, UnsupportedError) as error:
                if full is None:
                    raise
                yield [self._failed(number, index, "", " ".join(str(error).split())) for index in batch.indices]
                continue
            assert session.trace is not None  # a prefill with images just ran
            full = full or said.checked("the full model's")
            if number in wanted:
                yield self._records(number, batch, said, full, session.trace)

    def _records(self, number: int, batch: Batch, said: Answers, full: Answers, trace: Any) -> list[Record]:
        # Rounding makes the KL of equals a little negative; clamp_min leaves NaN as it is.
        kl = next_token_divergence(said.log_probs, full.log_probs).clamp_min(0).tolist()
        bills = sample_costs(self.vlm, trace, batch.inputs)
        return [
            self._failed(number, index, text, _NO_NUMBERS)
            if not sound
            else Record(
                recipe=self.recipes[number].id,
                sample=index,
                predicted=text,
                score=METRICS[self.metrics[index]].score(text, self.samples[index]),
                same=matches(text, reference),
                kl=divergence,
                visual_tokens=bill.visual_tokens,
                entering=bill.entering,
                after=bill.after,
                flops=_known(bill.flops),
                flops_total=_known(bill.flops_total),
                kv_bytes=_known(bill.kv_bytes),
            )
            for index, text, sound, reference, divergence, bill in zip(
                batch.indices, said.texts, said.sound, full.texts, kl, bills, strict=True
            )
        ]

    def _failed(self, number: int, sample: int, predicted: str, error: str) -> Record:
        unknown = dict.fromkeys(("kl", "visual_tokens", "entering", "after", "flops", "flops_total", "kv_bytes"))
        return Record(self.recipes[number].id, sample, predicted, 0.0, False, **unknown, error=error)

    def largest(self, count: int) -> list[Batch]:
        """The `count` largest batches, for timing."""
        chosen = sorted(self.groups, key=lambda group: -len(group))[:count]
        return [self.batch(group) for group in chosen]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
