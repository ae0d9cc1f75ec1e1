"""Rows and mixtures: what stands at a position depends on the seed and the position alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveate.evaluate.data import DataError
from foveate.train.augment import rand_augment
from foveate.train.batches import Held
from foveate.train.data import HELD_OUT, Endless, Finite, Mixture, evaluation, open_source, parts
from foveate.train.rows import Row, read_rows
from foveate.zoo import easyvqa
from foveate.zoo.scenes import scenes
from tests.train.tiny import squares

PICTURE = Image.new("RGB", (8, 8))


def _numbers(count: int, name: str = "n") -> Finite:
    return Finite(name, [Row((PICTURE,), f"{name}{i}", str(i), i) for i in range(count)])


def test_a_mixture_gives_each_its_share_and_every_row_once_a_pass():
    mixture = Mixture([_numbers(7), _numbers(30, "m")], [1, 3], seed=4)
    places = [mixture.place(position) for position in range(120)]
    assert Counter(number for number, _ in places) == {0: 30, 1: 90}
    first = [row for number, row in places if number == 0]
    assert sorted(first[:7]) == sorted(first[7:14]) == list(range(7))
    assert first[:7] != first[7:14], "every pass has an order of its own"
    second = [row for number, row in places if number == 1]
    assert sorted(second[:30]) == sorted(second[30:60]) == list(range(30))


def test_positions_need_no_history_and_seeds_differ():
    sources, weights = [_numbers(50), _numbers(9, "m")], [2.0, 1.0]
    forwards = [Mixture(sources, weights, 1).place(p) for p in range(200)]
    mixture = Mixture(sources, weights, 1)
    assert [mixture.place(p) for p in reversed(range(200))][::-1] == forwards
    assert [Mixture(sources, weights, 2).place(p) for p in range(200)] != forwards
    assert mixture.rng(7, 1).random() == Mixture(sources, weights, 1).rng(7, 1).random()
    assert len({mixture.rng(p, use).random() for p in range(5) for use in range(2)}) == 10


def test_the_passes_of_a_mixture():
    assert Mixture([_numbers(30), _numbers(90, "m")], [1, 1], 0).examples == 120
    assert Mixture([_numbers(30), Endless("scenes", 0)], [1, 1], 0).examples == 60
    assert Mixture([Endless("scenes", 0)], [1], 0).examples == 40_000


def test_scenes_are_those_of_the_generator():
    source = Endless("scenes", 3)
    expected = scenes(4, seed=3, questions_per_scene=5, split="train")
    assert len(expected) == 20, "every scene of this seed has five questions"
    for index in (0, 19, 7):
        row, sample = source.row(index), expected[index]
        assert (row.text, row.answer, row.image_id) == (sample.question, sample.answer, sample.image_id)
        assert np.array_equal(np.asarray(row.images[0]), np.asarray(sample.image))
    assert {sample.answer for sample in expected} <= source.answers()


def test_easy_vqa_learns_from_its_training_split_and_is_judged_on_the_other(monkeypatch):
    asked = []
    read = easyvqa.easyvqa

    def watched(split="test", count=None, seed=0):
        asked.append(split)
        return read(split, 40, seed)  # all 38,575 take seconds

    monkeypatch.setattr(easyvqa, "easyvqa", watched)
    training = open_source("easy-vqa", "vqa", 0, True)
    (held,) = evaluation(["easy-vqa"], "vqa", 50, True)
    assert asked == ["train", "test"]
    row, sample = training.row(3), read("train", 40, 0)[3]
    assert (row.text, row.answer, row.image_id) == (sample.question, sample.answer, sample.image_id)
    assert held.size == 40


def test_weights_in_names():
    assert parts(["scenes=3", "easy-vqa", "a=b.jsonl"]) == {"scenes": 3.0, "easy-vqa": 1.0, "a=b.jsonl": 1.0}
    with pytest.raises(DataError, match="scenes: named twice"):
        parts(["scenes", "scenes=2"])
    with pytest.raises(DataError, match="scenes=0"):
        parts(["scenes=0"])
    with pytest.raises(DataError, match="too far apart"):
        Mixture([_numbers(3), _numbers(3, "m")], [1, 1000], 0)


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "ve", "retrieval"])
def test_files_of_every_task(tmp_path: Path, task: str):
    rows = [row.open() for row in read_rows(squares(tmp_path, task, 4), task)]
    assert [len(row.images) for row in rows] == [2 if task == "nlvr2" else 1] * 4
    assert [row.answer for row in rows] == {
        "vqa": ["red", "green", "blue", "white"], "nlvr2": ["True", "False", "False", "False"],
        "ve": ["yes", "no", "no", "no"], "retrieval": [None] * 4,
    }[task]  # fmt: skip


def test_no_image_is_both_learnt_and_held_out(tmp_path: Path):
    for number in range(2 * HELD_OUT):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    lines = [{"image": f"{n % 40}.png", "question": f"{n}?", "answer": "x"} for n in range(100)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    training, (held,) = open_source(str(path), "vqa", 0, True), evaluation([str(path)], "vqa", 100, True)
    assert held.size == 2 + 2 + 1  # images 19 and 39, of 100 rows
    assert training.size == 95
    images = [{source.text(i)[1] for i in range(source.size)} for source in (training, held)]
    assert not images[0] & images[1]
    assert open_source(str(path), "vqa", 0, False).size == 100


BAD = [
    ('{"question": "?", "answer": "x"}', r"line 1: no 'image'"),
    ('{"image": "gone.png", "question": "?", "answer": "x"}', r"line 1: .*gone.png: no such file"),
    ('{"image": "a.png", "question": "?"}', r"line 1: no 'answer'"),
    ('{"image": "a.png", "question": " ", "answer": "x"}', r"line 1: 'question' must be text"),
    ('{"image": "a.png", "question": "?", "answer": {}}', r"line 1: 'answer' must be text"),
    ("[1]", r"line 1: expected an object"),
    ("{", r"line 1: not JSON"),
    ("", r"no rows"),
]


@pytest.mark.parametrize(("line", "complaint"), BAD, ids=[complaint for _, complaint in BAD])
def test_a_bad_row_is_named(tmp_path: Path, line: str, complaint: str):
    PICTURE.save(tmp_path / "a.png")
    path = tmp_path / "bad.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match=complaint):
        read_rows(path, "vqa")


def test_several_answers_and_pairs(tmp_path: Path):
    PICTURE.save(tmp_path / "a.png")
    path = tmp_path / "data.jsonl"
    path.write_text('{"image": "a.png", "question": "?", "answer": ["two", "2", "three"]}')
    assert read_rows(path, "vqa")[0].answer == ("two", "2", "three")
    path.write_text('{"images": ["a.png"], "text": "same", "label": "yes"}')
    with pytest.raises(DataError, match="'images' must be two"):
        read_rows(path, "nlvr2")


def test_wrong_texts_are_of_other_images():
    source = Finite("captions", [Row((PICTURE,), f"{image}-{i}", None, image) for image in "abc" for i in range(4)])
    mixture = Mixture([source], [1], 5)
    texts = mixture.wrong_texts(3, "b", 15)
    assert len(texts) == 15
    assert {text[0] for text in texts} == {"a", "c"}
    assert texts == Mixture([source], [1], 5).wrong_texts(3, "b", 15) != mixture.wrong_texts(4, "b", 15)
    assert Held([source]).wrong_texts(0, "a", 5) == Held([source]).wrong_texts(0, "a", 5)
    with pytest.raises(DataError, match="only one image"):
        Mixture([Finite("one", [Row((PICTURE,), "x", None, 1)])], [1], 0).wrong_texts(0, 1, 2)


def test_augmentation_is_a_function_of_its_numbers():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    changed = [np.asarray(rand_augment(image, np.random.default_rng(seed))) for seed in range(12)]
    again = [np.asarray(rand_augment(image, np.random.default_rng(seed))) for seed in range(12)]
    assert all(np.array_equal(one, other) for one, other in zip(changed, again))
    assert all(one.shape == pixels.shape for one in changed)
    assert len({one.tobytes() for one in changed}) > 8
    assert np.array_equal(np.asarray(image), pixels)
