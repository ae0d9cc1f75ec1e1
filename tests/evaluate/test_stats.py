"""Intervals and paired tests, against closed forms, enumeration and simulation."""

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest

from foveate.evaluate.stats import Clusters, holm


def test_interval_of_independent_samples_is_the_normal_one():
    values = (np.arange(800) % 4 == 0).astype(float)
    low, high = Clusters(range(800)).interval(values)
    error = (0.25 * 0.75 / 800) ** 0.5
    assert low == pytest.approx(0.25 - 1.96 * error, abs=0.006)
    assert high == pytest.approx(0.25 + 1.96 * error, abs=0.006)
    assert Clusters(range(800)).interval(values) == [low, high]


def test_questions_about_one_image_are_no_independent_evidence():
    """400 images of which all 5 questions go right or wrong together: as wide as 400 samples, not 2,000."""
    rng = np.random.default_rng(0)
    values = np.repeat(rng.integers(0, 2, 400), 5).astype(float)
    low, high = Clusters(np.repeat(np.arange(400), 5).tolist()).interval(values)
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 400) ** 0.5, rel=0.1)
    low, high = Clusters(range(2000)).interval(values)
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 2000) ** 0.5, rel=0.1)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        clusters = Clusters(np.repeat(np.arange(60), 3).tolist())
        values = np.repeat(rng.normal(size=60), 3) + rng.normal(size=180)
        low, high = clusters.interval(values)
        hits += low <= 0 <= high
    assert 88 <= hits <= 100


def test_paired_test_is_mcnemars():
    ours, theirs = np.zeros(100), np.zeros(100)
    ours[:14], theirs[14:18] = 1, 1
    assert Clusters(range(100)).paired(ours, theirs) == pytest.approx(binomtest(14, 18).pvalue)
    assert Clusters(range(100)).paired(theirs, ours) == pytest.approx(binomtest(14, 18).pvalue)
    assert Clusters(range(100)).paired(ours, ours) == 1


def test_paired_test_of_few_clusters_looks_at_all_patterns():
    differences = np.array([0.5, -0.25, 1.0, 0.75, 0.1])
    observed = abs(differences.sum())
    signs = list(itertools.product([1, -1], repeat=5))
    expected = np.mean([abs(np.dot(sign, differences)) >= observed - 1e-12 for sign in signs])
    assert Clusters(range(5)).paired(differences, np.zeros(5)) == expected


def test_paired_test_is_right_about_nothing():
    """No difference between the methods: p below 5 % in about 5 % of the cases, although questions hang together."""
    rng = np.random.default_rng(2)
    clusters = Clusters(np.repeat(np.arange(80), 4).tolist())
    below = 0
    for _ in range(200):
        noise = np.repeat(rng.normal(size=80), 4)  # what an image does to a method, for all its questions
        below += clusters.paired(noise + rng.normal(size=320), np.zeros(320)) < 0.05
    assert 2 <= below <= 20


def test_clusters_of_unequal_size_weigh_by_their_samples():
    clusters = Clusters(["a", "b", "b", "b"])
    assert clusters.sizes.tolist() == [1, 3]
    low, high = clusters.interval(np.array([0.0, 1, 1, 1]))
    assert (low, high) == (0, 1)


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1, 1]
    assert holm([]) == []
