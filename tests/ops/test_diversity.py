"""Farthest-point selection against its definition, row by row."""

import pytest
import torch
from torch.nn.functional import normalize

from foveate.ops import diversity
from foveate.ops.diversity import farthest_points


def slow(features: torch.Tensor, count: int) -> list[int]:
    units = normalize(features.double(), dim=-1)
    distance = (1 - units @ units.T).tolist()
    n = len(features)

    def best(score: dict[int, float]) -> int:
        return max(score, key=lambda i: (score[i], -i))

    nearest = {i: min((distance[i][j] for j in range(n) if j != i), default=4.0) for i in range(n)}
    chosen = [best(nearest)]
    while len(chosen) < count:
        chosen.append(best({i: min(distance[i][j] for j in chosen) for i in range(n) if i not in chosen}))
    return chosen


def points(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("largest", [1024, 4])
def test_ragged_rows_are_chosen_as_if_alone(largest, monkeypatch):
    monkeypatch.setattr(diversity, "BLOCK", largest)
    monkeypatch.setattr(diversity, "_ROWS", 7)
    sizes, counts = [30, 17, 1], torch.tensor([9, 17, 1])
    features = points(3, 30, 12)
    valid = torch.arange(30) < torch.tensor(sizes)[:, None]
    order = farthest_points(features, valid, counts)
    for row, (size, count) in enumerate(zip(sizes, counts.tolist())):
        assert order[row, :count].tolist() == slow(features[row, :size], count)
        assert (order[row, count:] == -1).all()


def test_duplicates_are_chosen_once_unless_the_official_defect_is_wanted():
    features = torch.eye(8).repeat(4, 1)[None]
    valid, counts = torch.ones(1, 32, dtype=torch.bool), torch.tensor([16])
    order = farthest_points(features, valid, counts)[0].tolist()
    assert len(set(order)) == 16
    assert len({i % 8 for i in order[:8]}) == 8
    repeated = farthest_points(features, valid, counts, repeat=True)[0].tolist()
    assert sorted(set(repeated)) == sorted(repeated[:8])
