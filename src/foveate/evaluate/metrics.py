"""How one answer is scored, by the metric of its task: strings only, no model.

* `exact`: the same words as one of the answers, normalised (`score.normalise`).
* `vqa`: VQA accuracy over the answers of several people (Antol et al. 2015; GT-Vision-Lab/VQA @ 07aecec5).
* `anls`: normalised Levenshtein similarity, 0 below one half (Biten et al. 2019; DocVQA, InfoVQA).
* `relaxed`: numbers within 5 %, anything else exact (Methani et al. 2020; ChartQA).
* `yes-no`: yes or no, with precision, recall and F1 of "yes" (POPE, Li et al. 2023).
* `choice`: the letter or the text of the right option.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from string import ascii_uppercase
from typing import NamedTuple

from .data import DataError, Sample, choices_of, references
from .score import ARTICLES, NUMBERS, matches, normalise

__all__ = ["AUTO", "METRICS", "Metric", "choose", "yes_no_report"]

AUTO = "auto"
_AGREEING = 3  # people that must agree with an answer for it to count in full
_ASKED = 10  # people in VQA's own data; shorter lists are spellings of one answer as a rule


class Metric(NamedTuple):
    """A score in [0, 1] for one answer, and what it is called in a table."""

    score: Callable[[str, Sample], float]
    title: str


# ------------------------------------------------------------------------------------------------------------- exact
def exact(predicted: str, sample: Sample) -> float:
    """1 if the answer matches one of the sample's, normalised."""
    return float(any(matches(predicted, answer) for answer in references(sample)))


# --------------------------------------------------------------------------------------------------------------- vqa
_PUNCTUATION = ";:/'[]\"()=+\\_><@`,?"
_DIGITS = {"none": "0", **NUMBERS}
_CONTRACTED = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm
    I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've wasn't we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_APOSTROPHES = {word.replace("'", ""): word for word in _CONTRACTED.split()}


@lru_cache(maxsize=65536)
def vqa_normalise(answer: str) -> str:
    """Punctuation, number words, articles and contractions as the official evaluation treats them."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    thousands = re.search(r"\d,\d", text) is not None
    out = text
    for mark in _PUNCTUATION:
        at_edge = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if at_edge or thousands else " ")
    out = re.sub(r"\.(?!\d)", "", out)
    words = [_DIGITS.get(word, word) for word in out.lower().split()]
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def vqa(predicted: str, sample: Sample) -> float:
    """Mean over the annotators, each left out in turn, of min(1, others that said the same / 3).

    The official code normalises the answers of the annotators only in part and expects them to be clean; here they are
    treated like the prediction. A single annotator counts in full.
    """
    counts = Counter(map(vqa_normalise, references(sample)))
    said, people = counts[vqa_normalise(predicted)], counts.total()
    if people == 1:
        return float(said)
    without_one = said * min(1.0, (said - 1) / _AGREEING) + (people - said) * min(1.0, said / _AGREEING)
    return without_one / people


# -------------------------------------------------------------------------------------------------------------- anls
def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    previous = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        current = [i]
        for j, right in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (left != right)))
        previous = current
    return previous[-1]


def anls(predicted: str, sample: Sample) -> float:
    """Best of 1 - distance / longer length over the answers, 0 if not above one half; case and spaces do not count."""
    said = " ".join(predicted.lower().split())
    best = 0.0
    for answer in references(sample):
        wanted = " ".join(answer.lower().split())
        length = max(len(said), len(wanted))
        similarity = 1.0 if not length else 1 - edit_distance(said, wanted) / length
        best = max(best, similarity if similarity > 0.5 else 0.0)
    return best


# ----------------------------------------------------------------------------------------------------------- relaxed
def _number(text: str) -> float | None:
    text = text.strip().rstrip(".")
    try:
        value = float(text.rstrip("%").replace(",", ""))
    except ValueError:
        return None
    if not math.isfinite(value):  # "infinity" and "nan" are words here; any number is within 5 % of an infinite one
        return None
    return value / 100 if text.endswith("%") else value


def relaxed(predicted: str, sample: Sample) -> float:
    """1 for a number within 5 % of one of the answers, or the same words; "12 %" is 0.12."""
    said = _number(predicted)
    for answer in references(sample):
        wanted = _number(answer)
        if said is not None and wanted is not None:
            if abs(said - wanted) <= 0.05 * abs(wanted):
                return 1.0
        elif matches(predicted, answer):
            return 1.0
    return 0.0


# ------------------------------------------------------------------------------------------------------------ yes-no
def yes_or_no(text: str) -> bool | None:
    """Whether an answer says yes: the first "yes", "no" or "not" in it decides; None if there is none."""
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in ("yes", "no", "not"):
            return word == "yes"
    return None


def yes_no(predicted: str, sample: Sample) -> float:
    """1 if the answer says yes where it should, or no where it should."""
    said = yes_or_no(predicted)
    return float(said is not None and said == yes_or_no(sample.answer))


def yes_no_report(predicted: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
    """POPE's table: accuracy, precision, recall and F1 of "yes", and how often it was said.

    An answer that says neither counts as "no" for precision and recall, and as wrong for the accuracy.
    """
    said = [bool(yes_or_no(text)) for text in predicted]
    wanted = [bool(yes_or_no(sample.answer)) for sample in samples]
    hits = sum(a and b for a, b in zip(said, wanted, strict=True))
    precision = hits / sum(said) if any(said) else 0.0
    recall = hits / sum(wanted) if any(wanted) else 0.0
    return {
        "accuracy": sum(map(yes_no, predicted, samples)) / len(samples),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_share": sum(said) / len(samples),
    }


# ------------------------------------------------------------------------------------------------------------ choice
_PREAMBLE = r"(?:(?:[Tt]he )?(?:correct |right )?(?:[Aa]nswer|[Oo]ption)(?: is)?:? *)?"
_LETTER = re.compile(_PREAMBLE + r"\(?([A-Za-z])(?:[).:,]|$)")
_LETTER_AND_WORDS = re.compile(_PREAMBLE + r"([A-Z])\s")  # capitals only: "a star" names no option


def chosen(text: str, choices: Sequence[str]) -> int | None:
    """Index of the option that an answer names, by its text or by its letter; None if it names none."""
    said = normalise(text)
    for index, option in enumerate(choices):
        if said == normalise(option):
            return index
    named = [i for i, option in enumerate(choices) if f" {normalise(option)} " in f" {said} "]
    letter = _LETTER.match(text.strip()) or (_LETTER_AND_WORDS.match(text.strip()) if len(named) != 1 else None)
    if letter:
        index = ascii_uppercase.index(letter[1].upper())
        return index if index < len(choices) else None
    return named[0] if len(named) == 1 else None


def choice(predicted: str, sample: Sample) -> float:
    """1 if the answer names the right option."""
    choices = choices_of(sample)
    right = chosen(sample.answer, choices)
    return float(right is not None and chosen(predicted, choices) == right)


METRICS: dict[str, Metric] = {
    "exact": Metric(exact, "exact match"),
    "vqa": Metric(vqa, "VQA accuracy"),
    "anls": Metric(anls, "ANLS"),
    "relaxed": Metric(relaxed, "relaxed accuracy"),
    "yes-no": Metric(yes_no, "yes/no accuracy"),
    "choice": Metric(choice, "multiple choice"),
}


def choose(metric: str, samples: Sequence[Sample], name: str = "data") -> str:
    """The metric of a data set: `metric` itself, or what its columns call for.

    "auto" means: `choice` with options, `vqa` with the answers of at least ten people, `yes-no` where every answer is
    yes or no, else `exact` (any of the answers).

    Raises:
        DataError: no such metric, or one that the data have no columns for.
    """
    if metric not in METRICS and metric != AUTO:
        raise DataError(f"metric {metric}: known are {AUTO}, {', '.join(METRICS)}")
    if metric == "choice" and not all(map(choices_of, samples)):
        raise DataError(f"metric choice: data {name} has rows without 'choices'")
    if metric == "yes-no" and any(yes_or_no(sample.answer) is None for sample in samples):
        raise DataError(f"metric yes-no: data {name} has answers that are neither yes nor no")
    if metric != AUTO:
        return metric
    if all(map(choices_of, samples)):
        return "choice"
    if all(len(references(sample)) >= _ASKED for sample in samples):
        return "vqa"
    if all(normalise(sample.answer) in ("yes", "no") for sample in samples):
        return "yes-no"
    return "exact"
