"""Bounds on changed answers: against the truth where it is known."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.reduction import OptionError
from foveate.tune import Bounds, binomial_interval, changed_share
from foveate.tune.estimate import estimate, refuted


def drawn(n: int, generator: torch.Generator, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Margins of a model that is mostly sure, and gaps after losses that are larger where it is not."""
    margins = 6 * torch.rand(n, generator=generator, dtype=torch.float64) ** 0.5
    losses = spread * (2 - margins / 6) * torch.randn(n, generator=generator, dtype=torch.float64)
    return margins, margins - losses


@pytest.mark.parametrize("spread", [0.2, 0.5, 1.0])
def test_the_bound_holds_and_is_sharper_than_counting(spread):
    generator = torch.Generator().manual_seed(1)
    _, gaps = drawn(200_000, generator, spread)
    truth = float((gaps < 0).double().mean())
    guesses = [changed_share(*drawn(64, generator, spread)) for _ in range(60)]
    assert sum(upper >= truth for _, upper in guesses) >= 54  # 95 % +- 5
    errors = torch.tensor([share - truth for share, _ in guesses])
    counting = math.sqrt(truth * (1 - truth) / 64)
    assert errors.square().mean().sqrt() < 0.8 * counting


def test_what_was_seen_is_within_the_bound():
    margins = torch.full((10,), 9.0)
    gaps = torch.tensor([-1.0] * 3 + [9.0] * 7)
    share, upper = changed_share(margins, gaps)
    assert upper >= 0.3
    assert share > 0


def test_a_sure_model_that_loses_nothing_is_as_good_as_so_many_questions_can_show():
    guess = estimate([5.0] * 64, [4.99, 5.01] * 32, [0.0] * 64, Bounds(0.01))
    assert guess.changed < 1e-6
    assert guess.changed_upper == 0.5 / 64
    assert guess.upper_excess < 1


def test_the_same_numbers_give_the_same_bound():
    margins, gaps = drawn(20, torch.Generator().manual_seed(2), 1.0)
    assert changed_share(margins, gaps) == changed_share(margins, gaps)
    low, high = (changed_share(margins, gaps, confidence)[1] for confidence in (0.6, 0.99))
    assert low < high


def test_words_that_are_ruled_out_are_no_accident():
    share, upper = changed_share(torch.tensor([5.0, 5.0, 5.0, 5.0]), torch.tensor([5.0, 5.0, 5.0, -math.inf]))
    assert 0 < share <= upper <= 1


def test_divergence_has_a_bound_of_its_own():
    guess = estimate([5.0] * 8, [5.0] * 8, [0.0] * 7 + [0.8], Bounds(None, 0.2))
    assert guess.kl == pytest.approx(0.1)
    assert guess.kl_upper > 0.2
    assert guess.excess == pytest.approx(0.5)
    assert guess.upper_excess > 1


def test_refuted_by_bad_luck_only():
    bounds = Bounds(0.01)
    assert not refuted([5.0] * 8, [-1.0] + [5.0] * 7, [0.0] * 8, bounds)  # happens to one in 13 good ones
    assert refuted([5.0] * 8, [-1.0] * 2 + [5.0] * 6, [0.0] * 8, bounds)
    assert refuted([5.0] * 8, [5.0] * 8, [1.0, 1.1] * 4, Bounds(None, 0.5))
    assert not refuted([5.0] * 8, [5.0] * 8, [0.0] * 7 + [8.0], Bounds(None, 0.5))


def test_binomial_interval_is_clopper_and_pearsons():
    assert binomial_interval(0, 64) == (0.0, pytest.approx(1 - 0.025 ** (1 / 64)))
    low, high = binomial_interval(6, 1000)
    assert (low, high) == (pytest.approx(0.002205, abs=1e-5), pytest.approx(0.013013, abs=1e-5))
    assert binomial_interval(64, 64)[1] == 1.0


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [((None, None), "max_changed"), ((1.5, None), "1.5"), ((-0.1, None), "-0.1"), ((None, -1.0), "-1"),
     ((None, math.nan), "nan"), ((0.01, None, 1.0), "confidence")],
)  # fmt: skip
def test_impossible_bounds(arguments, culprit):
    with pytest.raises(OptionError, match=culprit):
        Bounds(*arguments)
