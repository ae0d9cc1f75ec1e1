"""Targets, groups and the mosaic against loops."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from foveate.ops import visionzip as op


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("target_weighs", [True, False])
def test_groups_are_a_loop_over_sources(target_weighs: bool) -> None:
    x, metric, rest = draw(3, 30, 6), draw(3, 30, 4, seed=1), draw(3, 30, seed=2) > -0.5
    counts = torch.tensor([4, 1, 0])
    targets, assigned = op.contextual_groups(metric, rest, counts, 4)
    merged = op.merge_into_targets(x, targets, assigned, target_weighs)
    for i in range(3):
        left = rest[i].nonzero()[:, 0].tolist()
        count = int(counts[i])
        step = max(1, len(left) // max(count, 1))
        expected = left[::step][:count]
        assert targets[i].tolist() == expected + [-1] * (4 - count)
        groups: dict[int, list[int]] = {t: [] for t in range(count)}
        for j in (j for j in left if j not in expected):
            cosines = [float(normalize(metric[i, j], dim=0) @ normalize(metric[i, t], dim=0)) for t in expected]
            if cosines:
                groups[cosines.index(max(cosines))].append(j)
        for t, sources in groups.items():
            members = [x[i, j] for j in sources]
            if target_weighs:
                value = torch.stack([x[i, expected[t]], *members]).mean(0)
            else:
                value = x[i, expected[t]] + (torch.stack(members).mean(0) if members else 0)
            torch.testing.assert_close(merged[i, t], value)
            assert all(int(assigned[i, j]) == t for j in sources)
        assert int((assigned[i] >= 0).sum()) == sum(map(len, groups.values()))


def test_the_split_is_the_official_one() -> None:
    dominant, contextual = op.split_counts(torch.tensor([64, 128, 192, 1, 0, 3]), 10 / 64)
    assert contextual.tolist() == [10, 20, 30, 0, 0, 0]
    assert dominant.tolist() == [54, 108, 162, 1, 0, 3]


def test_the_mosaic_is_row_major() -> None:
    dominant = torch.tensor([[0, 4, 1], [0, 2, 3]])  # two tiles of 2 x 2 side by side: patches 0, 3 and 1, 2
    order = op.mosaic_order(dominant, tokens=4, width=2, height=1, side=2)
    assert order.tolist() == [1, 5, 2, 6, 0, 4, 3, 7]
