"""Greedy DPP selection against determinants computed outright."""

import pytest
import torch
from torch.nn.functional import normalize

from foveate.ops import determinantal
from foveate.ops.determinantal import determinantal_points


def draw(n: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator), torch.rand(n, generator=generator) + 0.1


def slow(features: torch.Tensor, relevance: torch.Tensor, count: int) -> list[int]:
    units = normalize(features.double(), dim=-1) * relevance.double()[:, None]
    kernel, chosen = units @ units.T, []
    for _ in range(count):
        rest = [i for i in range(len(features)) if i not in chosen]
        volume = [torch.logdet(kernel[[*chosen, i]][:, [*chosen, i]]).item() for i in rest]
        chosen.append(rest[volume.index(max(volume))])
    return chosen


@pytest.mark.parametrize("largest", [1024, 4])
def test_ragged_rows_maximise_the_determinant(largest, monkeypatch):
    monkeypatch.setattr(determinantal, "BLOCK", largest)
    features, relevance = draw(2 * 24, 20)
    features, relevance = features.view(2, 24, 20), relevance.view(2, 24)
    valid = torch.arange(24) < torch.tensor([24, 13])[:, None]
    order = determinantal_points(features, relevance, valid, torch.tensor([10, 6]))
    assert order[0].tolist() == slow(features[0], relevance[0], 10)
    assert order[1, :6].tolist() == slow(features[1, :13], relevance[1, :13], 6)
    assert (order[1, 6:] == -1).all()


def test_used_up_rank_is_filled_by_relevance():
    features, relevance = draw(50, 6)
    valid = torch.ones(1, 50, dtype=torch.bool)
    order = determinantal_points(features[None], relevance[None], valid, torch.tensor([20]))[0]
    assert len(set(order.tolist())) == 20
    rest = relevance.clone()
    rest[order[:6]] = -1
    assert order[6:].tolist() == rest.argsort(descending=True)[:14].tolist()
    broken = determinantal_points(features[None], relevance[None], valid, torch.tensor([20]), guard=False)[0]
    assert len(set(broken.tolist())) < 20
