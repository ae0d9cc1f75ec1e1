"""easy-VQA as samples: deterministic draws, object masks, and a clear word when the package is missing."""

import sys

import numpy as np
import pytest

from foveate.zoo import easyvqa as module
from foveate.zoo.easyvqa import easyvqa
from foveate.zoo.scenes import GRID


def test_draws_are_deterministic_and_differ_by_seed():
    pytest.importorskip("easy_vqa")
    one, two, other = easyvqa(count=50), easyvqa(count=50), easyvqa(count=50, seed=1)
    assert [(s.question, s.image_id) for s in one] == [(s.question, s.image_id) for s in two]
    assert [(s.question, s.image_id) for s in one] != [(s.question, s.image_id) for s in other]
    assert len(one) == 50
    for sample in one:
        assert sample.image.mode == "RGB"
        assert sample.asked.shape == (GRID, GRID)
        assert 0.01 < sample.asked.mean() < 0.8


def test_questions_of_one_image_share_it():
    pytest.importorskip("easy_vqa")
    samples = easyvqa(count=400)
    images = {}
    for sample in samples:
        assert images.setdefault(sample.image_id, sample.image) is sample.image


def test_splits_are_disjoint():
    pytest.importorskip("easy_vqa")
    train, test = (module._read(split)[1] for split in ("train", "test"))
    assert len(train) == 4000
    assert len(test) == 1000
    assert not set(train.values()) & set(test.values())


def test_unknown_split_is_named():
    pytest.importorskip("easy_vqa")
    with pytest.raises(ValueError, match="'dev'"):
        easyvqa("dev")


def test_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    module._read.cache_clear()
    with pytest.raises(ImportError, match="pip install easy-vqa"):
        easyvqa()
    module._read.cache_clear()


def test_masks_find_the_object():
    pytest.importorskip("easy_vqa")
    for sample in easyvqa(count=20, seed=5):
        rows, columns = np.nonzero(sample.asked)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert sample.asked.sum() > 0.3 * height * width, "one compact object"
