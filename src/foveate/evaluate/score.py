"""How an answer is judged: strings only, no model."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["accuracy", "agreement", "matches", "normalise"]

ARTICLES = {"a", "an", "the"}
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(number) for number, word in enumerate(_WORDS)}


def normalise(answer: str) -> str:
    """Lower case, no punctuation, no articles, number words as digits: "The top-left." -> "top left"."""
    words = re.sub(r"[^\w\s.]|_|\.(?!\d)", " ", answer.lower()).split()
    return " ".join(NUMBERS.get(word, word) for word in words if word not in ARTICLES)


def matches(predicted: str, answer: str) -> bool:
    """Whether two answers are the same once normalised."""
    return normalise(predicted) == normalise(answer)


def accuracy(predicted: Sequence[str], answers: Sequence[str]) -> float:
    """Share of answers that match. Raises `ValueError` for lists of different length or empty ones."""
    if len(predicted) != len(answers) or not answers:
        raise ValueError(f"{len(predicted)} answers against {len(answers)}: nothing to score")
    return sum(map(matches, predicted, answers)) / len(answers)


def agreement(predicted: Sequence[str], full: Sequence[str]) -> float:
    """Share of samples on which the reduced model says what the full model says, right or wrong."""
    return accuracy(predicted, full)
