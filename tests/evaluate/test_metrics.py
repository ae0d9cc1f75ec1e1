"""Scores of single answers, against values worked out by hand and slow twins."""

import itertools
import random

import pytest
from PIL import Image

from foveate.evaluate.data import DataError, LabelledSample, Sample
from foveate.evaluate.metrics import METRICS, choose, edit_distance, vqa_normalise, yes_no_report

IMAGE = Image.new("RGB", (2, 2))


def sample(answer="", answers=(), choices=()):
    return LabelledSample(IMAGE, "?", answer or answers[0], "", 0, answers=tuple(answers), choices=tuple(choices))


def score(metric, said, *args, **kwargs):
    return METRICS[metric].score(said, sample(*args, **kwargs))


def test_exact_takes_any_of_several_answers():
    assert score("exact", "The Red star.", "red star") == 1
    assert score("exact", "two", "3", answers=["3", "2"]) == 1
    assert score("exact", "blue", "red", answers=["red", "green"]) == 0


@pytest.mark.parametrize(
    ("said", "normal"),
    [
        ("Two dogs.", "2 dogs"),
        ("none", "0"),
        ("a man's hat", "man s hat"),
        ("10,000", "10000"),
        ("left/right", "left right"),
        ("yes , it is", "yes it is"),
        ("3.5", "3.5"),
        ("dont know", "don't know"),
        ("St. John", "st john"),
        ("red\nand blue", "red and blue"),
    ],
)
def test_vqa_normalisation(said, normal):
    assert vqa_normalise(said) == normal


def test_vqa_accuracy_by_leaving_each_annotator_out():
    """As the definition says it: for each annotator min(1, how many of the others said it / 3), averaged."""
    draw = random.Random(0)
    for _ in range(50):
        answers = [draw.choice(["red", "blue", "a red", "2", "two"]) for _ in range(10)]
        for said in ("red", "Blue", "two", "green"):
            slow = 0.0
            for i in range(10):
                others = answers[:i] + answers[i + 1 :]
                slow += min(1, sum(vqa_normalise(said) == vqa_normalise(other) for other in others) / 3) / 10
            assert score("vqa", said, answers=answers) == pytest.approx(slow)
    assert score("vqa", "red", answers=["red"] * 3 + ["blue"] * 7) == pytest.approx(0.9)
    assert score("vqa", "red", answers=["red"] * 4 + ["blue"] * 6) == 1
    assert score("vqa", "red", answer="red") == 1


def test_edit_distance_against_the_recursion():
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    words = ["".join(letters) for n in range(4) for letters in itertools.product("ab", repeat=n)]
    for a, b in itertools.product(words, words):
        assert edit_distance(a, b) == slow(a, b)


def test_anls():
    assert score("anls", "Hello  World", "hello world") == 1
    assert score("anls", "hallo", "hello") == pytest.approx(0.8)
    assert score("anls", "hxxxx", "hello") == 0
    assert score("anls", "ab", "ax") == 0  # exactly one half does not count
    assert score("anls", "helo", "x", answers=["something else", "hello"]) == pytest.approx(0.8)
    assert score("anls", "", "hello") == 0


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [("105", "100", 1), ("95", "100", 1), ("105.1", "100", 0), ("12%", "0.12", 1), ("1,000", "1000", 1),
     ("0.01", "0", 0), ("0", "0", 1), ("-95", "-100", 1), ("95", "-100", 0), ("The US", "us", 1), ("100", "many", 0),
     ("2019", "2019.", 1)],
)  # fmt: skip
def test_relaxed(said, answer, right):
    assert score("relaxed", said, answer) == right


def test_yes_or_no():
    assert score("yes-no", "Yes, there is a dog.", "yes") == 1
    assert score("yes-no", "There is not.", "No") == 1
    assert score("yes-no", "a dog", "yes") == 0
    wanted = [sample(answer) for answer in ("yes", "yes", "no", "no", "yes")]
    report = yes_no_report(["yes", "no", "yes", "no", "perhaps"], wanted)
    assert report["accuracy"] == 0.4
    assert report["precision"] == 0.5
    assert report["recall"] == pytest.approx(1 / 3)
    assert report["f1"] == pytest.approx(0.4)
    assert report["yes_share"] == 0.4
    assert yes_no_report(["no"], [sample("no")])["f1"] == 0


@pytest.mark.parametrize(
    ("said", "index"),
    [("B", 1), ("(b)", 1), ("b.", 1), ("B) a blue star", 1), ("Blue star", 1), ("The answer is C", 2), ("option a", 0),
     ("it is the blue star", 1), ("a star", None), ("E", None), ("", None), ("red circle or blue star", None),
     ("C because of the rim", 2)],
)  # fmt: skip
def test_choice(said, index):
    choices = ["red circle", "blue star", "green box"]
    for right, option in enumerate(choices):
        assert score("choice", said, option, choices=choices) == (right == index)


def test_the_metric_is_chosen_by_the_columns():
    plain = Sample(IMAGE, "?", "red", "", 0)
    assert choose("auto", [plain, sample("yes")]) == "exact"
    assert choose("auto", [sample("yes"), sample("No.")]) == "yes-no"
    assert choose("auto", [sample(answers=["a", "b"] * 5)] * 2) == "vqa"
    assert choose("auto", [sample(answers=["a", "b"] * 4)] * 2) == "exact"
    assert choose("auto", [sample("a", choices=["a", "b"])]) == "choice"
    assert choose("anls", [plain]) == "anls"
    with pytest.raises(DataError, match=r"metric bleu.*anls"):
        choose("bleu", [plain])
    with pytest.raises(DataError, match="mine has rows without 'choices'"):
        choose("choice", [plain], "mine")
    with pytest.raises(DataError, match="neither yes nor no"):
        choose("yes-no", [plain])
