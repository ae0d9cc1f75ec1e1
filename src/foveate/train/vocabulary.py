"""Answers as labels: those a model has learnt already, or new ones for a fresh head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..evaluate.data import DataError
from ..evaluate.score import normalise

__all__ = ["Vocabulary", "is_generic"]

_SOFT = (0.0, 0.3, 0.6, 0.9)
"""VQAv2's score of an answer that so many annotators gave; 1 from four on."""


def is_generic(label2id: Mapping[str, int]) -> bool:
    """Whether labels are transformers' placeholders (LABEL_0, ...), which mean nothing."""
    return all(name == f"LABEL_{number}" for name, number in label2id.items())


class Vocabulary:
    """Label numbers of answers. An answer is found as it is or, failing that, normalised ("Two." is "2").

    Attributes:
        label2id: answer -> label.
    """

    def __init__(self, label2id: Mapping[str, int]) -> None:
        self.label2id = dict(label2id)
        self._normal: dict[str, int] = {}
        for name, number in self.label2id.items():
            self._normal.setdefault(normalise(name), number)

    @classmethod
    def of(cls, answers: Iterable[str]) -> Vocabulary:
        """Labels for a fresh head, in the order of the alphabet."""
        return cls({answer: number for number, answer in enumerate(sorted(set(answers)))})

    def __len__(self) -> int:
        return max(self.label2id.values()) + 1

    def find(self, answer: str) -> int | None:
        """The label of an answer, None if there is none."""
        return self.label2id.get(answer, self._normal.get(normalise(answer)))

    def unknown(self, answers: Iterable[str]) -> list[str]:
        """Answers without a label, sorted."""
        return sorted({answer for answer in answers if self.find(answer) is None})

    def label(self, answer: str | tuple[str, ...] | None) -> int:
        """The label to choose, of several answers the most frequent known one; -1 if none is known."""
        answers = (answer,) if isinstance(answer, str) else answer or ()
        found = Counter(label for one in answers if (label := self.find(one)) is not None)
        return found.most_common(1)[0][0] if found else -1

    def target(self, answer: str | tuple[str, ...] | None) -> Tensor:
        """(labels,) scores from 0 to 1; VQAv2's soft scores for several answers."""
        scores = torch.zeros(len(self))
        if isinstance(answer, str):
            number = self.find(answer)
            if number is not None:
                scores[number] = 1
            return scores
        found = Counter(label for one in answer or () if (label := self.find(one)) is not None)
        for label, times in found.items():
            scores[label] = _SOFT[times] if times < len(_SOFT) else 1.0
        return scores

    def must_know(self, answers: Iterable[str], where: str) -> None:
        """Raises `DataError` that names the answers without a label."""
        missing = self.unknown(answers)
        if missing:
            shown = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise DataError(
                f"data {where}: {len(missing)} answers that the model has no label for ({shown}); correct them, or "
                "leave such rows out with --skip-unknown"
            )
