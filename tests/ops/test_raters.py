"""Raters, gravity and rank against loops over single tokens."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.ops import raters


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_relevance_of_padded_rows_is_that_of_each_row_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(raters, "_BLOCK", 3)  # several blocks
    visual, text = noise(2, 7, 4), noise(2, 5, 4, seed=1)
    n_visual, n_text = [7, 4], [3, 5]
    visual_valid = torch.arange(7) < torch.tensor(n_visual)[:, None]
    text_valid = torch.arange(5) < torch.tensor(n_text)[:, None]
    found = raters.text_relevance(visual, text, visual_valid, text_valid)
    for b in range(2):
        expected = torch.zeros(5)
        for v in visual[b, : n_visual[b]]:
            weights = [math.exp(float(v @ t)) for t in text[b, : n_text[b]]]
            for t, weight in enumerate(weights):
                expected[t] += weight / sum(weights) / n_visual[b]
        torch.testing.assert_close(found[b], expected)


def test_thresholds_are_per_row_unless_shared():
    relevance = torch.tensor([[0.7, 0.3, 0.0], [0.4, 0.3, 0.3]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    mask, threshold = raters.rater_mask(relevance, valid)
    assert mask.tolist() == [[True, False, False], [True, False, False]]
    torch.testing.assert_close(threshold[:, 0], torch.tensor([0.5, 1 / 3]))
    shared, threshold = raters.rater_mask(relevance, valid, shared=True)
    torch.testing.assert_close(threshold[:, 0], torch.tensor([0.4, 0.4]))
    assert shared.tolist() == [[True, False, False], [False, False, False]]


def test_the_paper_counts_the_average_token():
    relevance, valid = torch.full((1, 4), 0.25), torch.ones(1, 4, dtype=torch.bool)
    assert not raters.rater_mask(relevance, valid)[0].any()
    assert raters.rater_mask(relevance, valid, inclusive=True)[0].all()


def gravity(length: int, dim: int, floor: float | None) -> torch.Tensor:
    ones = raters.rotated_ones(*raters.rope_table(length, dim, 1e4), dim)
    slots = torch.arange(length)[None]
    return raters.gravity_weights(ones, slots[:, :1], slots, floor)[0, 0]


def test_gravity_is_the_sum_of_the_cosines():
    weights = gravity(3000, 128, None)
    for distance in (0, 1, 576, 2900):
        exact = sum(math.cos(distance * 1e4 ** (-2 * i / 128)) for i in range(64)) * 2 / math.sqrt(128)
        assert weights[distance].item() == pytest.approx(exact, abs=1e-4)
    assert weights[0].item() == pytest.approx(11.31, abs=0.01)
    assert int((weights < 0).nonzero()[0]) == 1707


def test_the_guard_holds_beyond_the_change_of_sign():
    bare, guarded = gravity(3000, 128, None), gravity(3000, 128, 0.05)
    assert (1 / guarded).isfinite().all()
    assert guarded.min().item() == pytest.approx(0.05 * 11.3137, abs=1e-4)
    torch.testing.assert_close(guarded[:600], bare[:600])


def test_gravity_whatever_the_layout_of_the_embedding():
    cos, sin = raters.rope_table(50, 8, 1e4)
    adjacent = [part[:, :4].repeat_interleave(2, 1) for part in (cos, sin)]
    slots = torch.arange(50)[None]
    halves = raters.gravity_weights(raters.rotated_ones(cos, sin, 8), slots, slots)
    torch.testing.assert_close(raters.gravity_weights(raters.rotated_ones(*adjacent, 8), slots, slots), halves)
    # Dimensions that do not rotate add 1 each.
    partial = raters.gravity_weights(raters.rotated_ones(cos, sin, 12), slots, slots)
    torch.testing.assert_close(partial, (halves * 8**0.5 + 4) / 12**0.5)


def test_top_heads():
    numbers, mask = raters.top_heads(torch.tensor([[1.0, -2.0, 3.0], [0.0, 5.0, 4.0]]), 2)
    assert numbers.tolist() == [[2, 0], [1, 2]]
    assert mask.tolist() == [[True, False, True], [False, True, True]]


def test_rank_of_padded_matrices_is_that_of_each_alone():
    matrix = noise(3, 6, 20).abs()
    matrix[1, 2] = matrix[1, 0] * 3  # dependent
    rows = torch.arange(6) < torch.tensor([6, 5, 1])[:, None]
    columns = torch.arange(20) < torch.tensor([20, 9, 3])[:, None]
    rank, values, tolerance = raters.matrix_rank(matrix, rows, columns)
    for b, (r, c) in enumerate([(6, 20), (5, 9), (1, 3)]):
        alone = matrix[b, :r, :c]
        assert rank[b] == torch.linalg.matrix_rank(alone)
        torch.testing.assert_close(values[b, :r], torch.linalg.svdvals(alone))
        assert tolerance[b].item() == pytest.approx(max(r, c) * torch.finfo(torch.float32).eps * values[b, 0].item())
    assert rank.tolist() == [6, 4, 1]
    assert raters.matrix_rank(matrix[:, :0], rows[:, :0], columns)[0].tolist() == [0, 0, 0]
