"""The steps of Recoverable Compression against a loop, their counts and their budget."""

from __future__ import annotations

import pytest
import torch

from foveate.ops import recoverable as op
from foveate.ops.outliers import THRESHOLD, local_outlier_factor


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


VALID = torch.arange(120) < torch.tensor([[120], [77]])
ATTENTION, SIMILARITY = (2 * draw(2, 120, seed=1)).softmax(1), draw(2, 120, seed=2).pow(3)


def outliers(values: list[float], neighbours: int) -> int:
    return int((local_outlier_factor(torch.tensor([values]), neighbours) > THRESHOLD).sum())


def test_adaptive_steps() -> None:
    found = op.recover(ATTENTION, SIMILARITY, VALID)
    for i in range(2):
        a, s = ATTENTION[i].tolist(), SIMILARITY[i].tolist()
        left = VALID[i].nonzero()[:, 0].tolist()
        visual = sorted(left, key=lambda j: -a[j])[: outliers([a[j] for j in left], 20)]
        left = [j for j in left if j not in visual]
        text = sorted(left, key=lambda j: -s[j])[: outliers([s[j] for j in left], 20)]
        rest = [j for j in left if j not in text]
        centres = sorted(rest, key=lambda j: -a[j])[: outliers([a[j] for j in rest], 10)]
        assert visual
        assert text
        assert centres
        assert found.visual[i].nonzero()[:, 0].tolist() == sorted(visual)
        assert found.text[i].nonzero()[:, 0].tolist() == sorted(text)
        assert [c for c in found.centres[i].tolist() if c >= 0] == centres
        assert bool(found.pooled[i])


@pytest.mark.parametrize("budget", [1, 2, 3, 12, 60, 119, 120, 500])
def test_the_budget_is_met(budget: int) -> None:
    found = op.recover(ATTENTION, SIMILARITY, VALID, torch.tensor([budget, budget]))
    total = found.main.sum(1) + (found.centres >= 0).sum(1) + found.pooled.long()
    assert total.tolist() == [min(budget, 120), min(budget, 77)]
    assert not bool((found.visual & found.text).any())


def test_largest_remainder() -> None:
    weights = torch.tensor([[5, 3, 2], [0, 0, 0], [1, 1, 1]])
    assert op.apportion(weights, torch.tensor([10, 4, 5])).tolist() == [[5, 3, 2], [4, 0, 0], [2, 2, 1]]


def test_the_rest_is_pooled_by_attention() -> None:
    x, key = draw(2, 120, 6, seed=3), draw(2, 120, 4, seed=4)
    found = op.recover(ATTENTION, SIMILARITY, VALID, torch.tensor([20, 20]))
    merged, extra, owner = op.merge_rest(x, key, ATTENTION, SIMILARITY, found, VALID, 5)
    count = found.centres.shape[1]
    for i in range(2):
        centres = [c for c in found.centres[i].tolist() if c >= 0]
        rest = [j for j in VALID[i].nonzero()[:, 0].tolist() if not found.main[i, j] and j not in centres]
        weights = ATTENTION[i, rest]
        torch.testing.assert_close(extra[i, 0], (weights @ x[i, rest]) / weights.sum(), atol=1e-5, rtol=1e-4)
        assert all((int(owner[i, j]) >= 0) == (j in rest) for j in range(120))
        assert bool((owner[i] == count).any())
        assert bool(merged[i].isfinite().all())
