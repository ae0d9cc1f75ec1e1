"""Scenes: reproducible, honest about their answers, and with test digits that training never sees."""

from collections import Counter

import numpy as np
import pytest

from foveate.zoo import scenes as module
from foveate.zoo.scenes import COLORS, GRID, IMAGE_SIZE, KINDS, PATCH, SHAPES, ask, paint, place, scenes


@pytest.fixture(scope="module")
def samples():
    return scenes(60, seed=3)


def painted(seed, split="test"):
    rng = np.random.default_rng(seed)
    return paint(rng, place(rng), split)


def test_same_seed_same_samples(samples):
    again = scenes(60, seed=3)
    assert [(s.question, s.answer, s.kind, s.image_id) for s in samples] == [
        (s.question, s.answer, s.kind, s.image_id) for s in again
    ]
    assert all(np.array_equal(np.asarray(a.image), np.asarray(b.image)) for a, b in zip(samples, again))
    assert all(np.array_equal(a.asked, b.asked) for a, b in zip(samples, again))


def test_a_scene_does_not_depend_on_how_many_are_drawn(samples):
    few = scenes(2, seed=3)
    assert [s.question for s in few] == [s.question for s in samples[: len(few)]]


def test_seeds_and_splits_differ(samples):
    for other in (scenes(5, seed=4), scenes(5, seed=3, split="train"), scenes(5, seed=3, split="validation")):
        assert [s.question for s in other] != [s.question for s in samples[: len(other)]]


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"'dev'.*train, validation, test"):
        scenes(1, seed=0, split="dev")


def test_shapes_and_types(samples):
    assert len(samples) == 300
    for sample in samples:
        assert sample.image.size == (IMAGE_SIZE, IMAGE_SIZE)
        assert sample.image.mode == "RGB"
        assert sample.asked.shape == sample.owner.shape == (GRID, GRID)
        assert sample.asked.dtype == bool
        assert not (sample.asked & (sample.owner == 0)).any(), "asked patches belong to an object"
        assert len(sample.answer.split()) == 1


def test_every_kind_is_asked_and_none_dominates(samples):
    counts = Counter(sample.kind for sample in samples)
    assert set(counts) == set(KINDS)
    assert max(counts.values()) < 0.25 * len(samples)


def test_no_question_is_asked_twice_of_a_scene(samples):
    assert len({(s.image_id, s.question) for s in samples}) == len(samples)


def test_about_a_sixth_of_the_patches_are_objects(samples):
    assert 0.12 < np.mean([(s.owner > 0).mean() for s in samples]) < 0.22


def test_yes_and_no_are_balanced_and_no_is_hard():
    answers = Counter()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        things = place(rng)
        for question in ask(rng, things, 30):
            if question.kind == "exist":
                answers[question.answer] += 1
                color, shape = question.text.rstrip("?").split()[-2:]
                if question.answer == "no" and len({(t.color, t.shape) for t in things}) > 2:
                    assert any(t.color == color or t.shape == shape for t in things)
    assert 0.4 < answers["yes"] / answers.total() < 0.6


@pytest.mark.parametrize("seed", range(40))
def test_answers_agree_with_an_independent_reading_of_the_question(seed):
    rng = np.random.default_rng(seed)
    things = place(rng)
    questions = ask(rng, things, 30)
    assert questions
    for question in questions:
        assert question.answer == read(question.text, things), question.text


def read(text, things):
    """Answer a question from the list of things by its words alone."""
    words = text.rstrip("?").split()
    colors, shapes = [w for w in words if w in COLORS], [w for w in words if w in SHAPES]
    digits = [int(w) for w in words if w.isdigit()]
    match = [
        t
        for t in things
        if (not colors or t.color in colors) and (not shapes or t.shape in shapes) and (not digits or t.digit in digits)
    ]
    if words[0] == "is":
        return "yes" if match else "no"
    if words[0] == "how":
        return str(len(match))
    (thing,) = match
    if words[0] == "where":
        x, y = thing.left + thing.side / 2, thing.top + thing.side / 2
        return ("top" if y < IMAGE_SIZE / 2 else "bottom") + "-" + ("left" if x < IMAGE_SIZE / 2 else "right")
    return str({"color": thing.color, "shape": thing.shape, "digit": thing.digit}[words[1]])


@pytest.mark.parametrize("seed", range(20))
def test_objects_are_where_the_grid_says(seed):
    scene = painted(seed)
    for index, thing in enumerate(scene.things):
        rows, columns = np.nonzero(scene.owner == index + 1)
        assert len(rows) >= 4
        assert rows.min() >= thing.top // PATCH
        assert rows.max() <= (thing.top + thing.side) // PATCH
        assert columns.min() >= thing.left // PATCH
        assert columns.max() <= (thing.left + thing.side) // PATCH
        assert scene.owner[thing.center_patch] == index + 1


def test_painted_colors_are_the_named_ones():
    for seed in range(10):
        scene = painted(seed)
        for thing in scene.things:
            if thing.digit is None:
                x, y = map(int, thing.center)
                seen = scene.pixels[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3).mean(0)
                nearest = min(COLORS, key=lambda name: np.abs(seen - COLORS[name]).sum())
                assert nearest == thing.color


def test_held_out_digits_are_other_images():
    images, labels = module._digit_images()
    assert images.shape == (1797, 8, 8)
    assert labels.shape == (1797,)
    ranges = [set(range(*bounds)) for bounds in module._SPLITS.values()]
    assert sum(map(len, ranges)) == len(set.union(*ranges)) == 1797, "splits cover all digits, none twice"
    pictures = [{images[i].tobytes() for i in members} for members in ranges]
    for other in pictures[1:]:
        assert not pictures[0] & other, "no training picture occurs in another split"
    for first, last in module._SPLITS.values():
        assert set(labels[first:last]) == set(range(10))


def test_digits_are_drawn_from_their_split(monkeypatch):
    drawn = []
    images, labels = module._digit_images()

    class Spy:
        def __getitem__(self, index):
            drawn.append(int(index))
            return images[index]

    monkeypatch.setattr(module, "_digit_images", lambda: (Spy(), labels))
    for split, (first, last) in module._SPLITS.items():
        drawn.clear()
        for seed in range(20):
            painted(seed, split)
        assert drawn
        assert all(first <= index < last for index in drawn)


def test_shipped_digits_are_those_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.datasets")
    images, labels = module._digit_images()
    truth = sklearn.load_digits()
    assert np.array_equal(images * 16, truth.images)
    assert np.array_equal(labels, truth.target)
