"""Counts of tokens: the official ones where they apply, the budget everywhere else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.ops import schedule
from foveate.ops.schedule import COUNTS, LAYERS, RANK_LAYERS, Recycling


def mean(version: str, tokens: int, target: float, depth: int) -> tuple[float, list[int]]:
    """Mean after each layer, as the plain sum over the layers; and what is left after each removal."""
    layers = schedule.scaled_layers(LAYERS, depth)
    if schedule.needs_early_start(target / tokens, layers, depth):
        layers = (0, *layers[1:])
    recycling = Recycling() if version == "1.5" else None
    kept = schedule.kept_counts(version, tokens, target, layers, depth, recycling)
    left, total, now = [], 0, tokens
    for layer in range(depth):
        if layer in layers:
            stay = kept[layers.index(layer)]
            assert 1 <= stay <= now
            now = stay + (recycling.sizes(now - stay, stay)[1] if recycling else 0)
            left.append(now)
        total += now
    return total / depth, left


@pytest.mark.parametrize("version", ["1.5", "2.0"])
@pytest.mark.parametrize("budget", [192, 128, 96, 64])
def test_the_official_counts(version: str, budget: int):
    recycling = Recycling() if version == "1.5" else None
    assert schedule.kept_counts(version, 576, float(budget), LAYERS, 32, recycling) == COUNTS[version][budget]


@pytest.mark.parametrize("version", ["1.5", "2.0"])
@pytest.mark.parametrize("depth", [16, 24, 28, 32, 40])
@pytest.mark.parametrize("tokens", [144, 256, 576, 729, 1280, 2048, 2880])
@pytest.mark.parametrize("keep", [192, 128, 96, 64, 1 / 9, 1 / 6, 2 / 9, 1 / 3, 0.5, 0.8])
def test_the_mean_after_each_layer_is_the_budget(version: str, depth: int, tokens: int, keep: int | float):
    target = min(keep, tokens) if isinstance(keep, int) else keep * tokens
    assert mean(version, tokens, target, depth)[0] == pytest.approx(target, rel=0.02)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["1.5", "2.0"]),
    st.integers(144, 2880),
    st.integers(16, 40),
    st.floats(0.05, 1.0),
)
def test_any_budget_any_depth_any_image(version: str, tokens: int, depth: int, share: float):
    target = share * tokens
    found, left = mean(version, tokens, target, depth)
    assert abs(found - target) <= max(0.02 * target, 0.35)  # below 16 tokens, a third of a token
    assert left == sorted(left, reverse=True)


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 60))
def test_small_images_shallow_decoders(tokens: int, target: int, depth: int):
    found, _ = mean("1.5", tokens, float(min(target, tokens)), depth)
    assert 1 <= found <= tokens


def test_the_official_tables():
    """As read in Gumpest/SparseVLMs @ 26a5f488."""
    assert COUNTS == {
        "1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
        "2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
    }


@pytest.mark.parametrize(("low", "high"), [(64, 96), (96, 128), (128, 192)])
def test_between_official_budgets_counts_lie_between(low: int, high: int):
    middle = schedule.kept_counts("2.0", 576, (low + high) / 2, LAYERS, 32, None)
    for few, count, many in zip(COUNTS["2.0"][low], middle, COUNTS["2.0"][high]):
        assert count == pytest.approx((few + many) / 2, abs=3)


def test_an_early_start_is_for_budgets_that_the_first_layers_would_use_up():
    assert [schedule.needs_early_start(n / 576, LAYERS, 32) for n in (192, 64, 55, 53, 16)] == [False] * 3 + [True] * 2
    assert not schedule.needs_early_start(0.0, (0, 6, 15), 32)


def test_everything_kept():
    assert schedule.kept_counts("1.5", 576, 576.0, LAYERS, 32, Recycling()) == (576, 576, 576)


@pytest.mark.parametrize(("depth", "layers"), [(32, (2, 6, 15)), (16, (1, 3, 8)), (40, (2, 8, 19)), (1, (0,))])
def test_layers_keep_their_relative_depth(depth: int, layers: tuple[int, ...]):
    assert schedule.scaled_layers(LAYERS, depth) == layers


@pytest.mark.parametrize(
    ("removed", "sizes"), [(276, (83, 9)), (109, (33, 4)), (94, (29, 3)), (1, (1, 1)), (0, (0, 0))]
)
def test_how_many_are_merged(removed: int, sizes: tuple[int, int]):
    assert Recycling().sizes(removed, 100) == sizes


def test_merged_tokens_never_outnumber_the_kept_ones():
    assert Recycling().sizes(2800, 10) == (841, 10)
    assert Recycling(guarded=False).sizes(2800, 10) == (841, 85)


@pytest.mark.parametrize("target", [64.0, 128.0, 300.0])
@pytest.mark.parametrize("rank", [3, 15, 60])
def test_rules_of_the_rank_are_solved_for_the_budget(target: float, rank: int):
    layers = schedule.scaled_layers(RANK_LAYERS, 24)
    scale = schedule.rank_scale(576, rank, 0.0, target, layers, 24, Recycling())
    left = schedule.left_after(576, layers, lambda n: int(min(rank, n) * scale), Recycling())
    assert schedule.mean_after(576, layers, left, 24) == pytest.approx(target, abs=1.5)
    every = tuple(range(24))
    share = schedule.paper_share(576, rank, target, every, 24, Recycling())
    left = schedule.left_after(576, every, lambda n: n - int(share * (n - min(rank, n))), Recycling())
    if target > 1.5 * rank:  # the rank is a floor
        assert schedule.mean_after(576, every, left, 24) == pytest.approx(target, rel=0.05)
