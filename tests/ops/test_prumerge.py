"""Neighbours, merging and spatial samples against loops."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from foveate.ops import prumerge as op
from foveate.ops.select import padded_indices


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("blocked", [True, False])
def test_merging_is_a_loop_over_centres(mean: bool, blocked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocked:
        monkeypatch.setattr(op, "_BLOCK", 3)
    x, key, attention, bonus = (
        draw(2, 20, 5),
        draw(2, 20, 4, seed=1),
        draw(2, 20, seed=2).softmax(1),
        draw(2, 20, seed=3),
    )
    kept = draw(2, 20, seed=4) > 0.3
    candidates = ~kept
    candidates[1, 12:] = False
    centres = padded_indices(kept, int(kept.sum(1).max()))
    merged, owner = op.merge_neighbours(x, key, attention, centres, candidates, 4, mean, bonus)
    for i in range(2):
        best: dict[int, tuple[float, int]] = {}
        for column, c in enumerate(centres[i].tolist()):
            if c < 0:
                continue
            score = normalize(key[i], dim=-1) @ normalize(key[i, c], dim=-1) + bonus[i]
            near = sorted(candidates[i].nonzero()[:, 0].tolist(), key=lambda j: -score[j].item())[:4]
            total = sum(attention[i, j] * x[i, j] for j in near)
            weight = sum(attention[i, j] for j in near)
            expected = (attention[i, c] * x[i, c] + total) / (attention[i, c] + weight) if mean else x[i, c] + total
            torch.testing.assert_close(merged[i, column], expected, atol=1e-5, rtol=1e-4)
            for j in near:
                best[j] = max(best.get(j, (-9.0, -1)), (score[j].item(), column))
        assert owner[i].tolist() == [best.get(j, (0, -1))[1] for j in range(20)]


@pytest.mark.parametrize("neighbours", [3, 32])
def test_official_merging_is_a_loop_over_centres(neighbours: int) -> None:
    """Fewer neighbours where there are fewer; chosen tokens are neighbours of each other, never of themselves."""
    x, key, attention = draw(2, 9, 5), draw(2, 9, 4, seed=1), draw(2, 9, seed=2).softmax(1)
    chosen = torch.tensor([[4, 0, 7], [8, 2, 1]])
    merged, extra = op.merge_official(x, key, attention, chosen, neighbours)
    for i in range(2):
        units = normalize(key[i], dim=-1)
        for column, c in enumerate(chosen[i].tolist()):
            near = sorted(set(range(9)) - {c}, key=lambda j: -float(units[j] @ units[c]))[:neighbours]
            expected = x[i, c] + sum(attention[i, j] * x[i, j] for j in near)
            torch.testing.assert_close(merged[i, column], expected, atol=1e-5, rtol=1e-4)
        rest = sum(attention[i, j] * x[i, j] for j in set(range(9)) - set(chosen[i].tolist()))
        torch.testing.assert_close(extra[i, 0], rest, atol=1e-5, rtol=1e-4)


def test_spatial_samples_are_even_and_exact() -> None:
    eligible = torch.ones(1, 24, dtype=torch.bool)
    assert op.evenly_spaced(eligible, torch.tensor([4])).nonzero()[:, 1].diff().tolist() == [6, 6, 6]
    for n in range(1, 40):
        mask = draw(1, 40, seed=n) > 0
        for count in range(int(mask.sum()) + 1):
            chosen = op.evenly_spaced(mask, torch.tensor([count]))
            assert int(chosen.sum()) == count
            assert not bool((chosen & ~mask).any())


def test_complements() -> None:
    assert op.complement(torch.tensor([[3, 0]]), 4).tolist() == [[1, 2]]
    assert op.complement(torch.tensor([[3, 3]]), 4).tolist() == [[1, 2]]  # the official code loses token 0


@pytest.mark.parametrize("ratio", [0.0, 0.4])
def test_where_the_official_grid_fails(ratio: float) -> None:
    with pytest.raises(ValueError, match="ratio"):
        op.official_selection(draw(1, 64), ratio, plus=True, adaptive=True)
    with pytest.raises(ValueError, match="2 images"):
        op.official_selection(draw(2, 64), 0.1, plus=True, adaptive=True)
