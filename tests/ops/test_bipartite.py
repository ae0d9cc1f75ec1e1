"""Matchings and merges: what they promise, whatever the numbers."""

import pytest
import torch
from torch.nn.functional import normalize

from foveate.ops.bipartite import (
    Merging,
    cosines,
    energy_matching,
    feature_energy,
    merge_schedule,
    soft_matching,
)

X = torch.randn(2, 21, 8, generator=torch.Generator().manual_seed(0))
SIZE = torch.rand(2, 21, 1, generator=torch.Generator().manual_seed(1)) + 0.5


def mergings() -> dict[str, Merging]:
    similarity = cosines(X)
    energy, inner = feature_energy(similarity, 0.3), cosines(X[:, 1:])
    return {
        "soft": soft_matching(X, 6),
        "soft cls": soft_matching(X, 6, class_token=True),
        "soft distill": soft_matching(X, 6, class_token=True, distill_token=True),
        "energy": energy_matching(similarity, energy, 6),
        "energy cls": energy_matching(inner, feature_energy(inner, 0.3), 6, class_token=True),
        "halves": energy_matching(similarity, feature_energy(similarity, 0.5), 6, pairs="halves"),
        "all": energy_matching(similarity, energy, 6, pairs="all"),
    }


def test_of_equally_alike_tokens_the_first_merge():
    alike = torch.ones(1, 9, 4)
    assert soft_matching(alike, 2).kept.tolist() == [[4, 6, 8, 1, 3, 5, 7]]
    assert energy_matching(cosines(alike), torch.ones(1, 9), 2).kept.tolist() == [[4, 5, 6, 7, 8, 1, 3]]


@pytest.mark.parametrize("name", mergings())
def test_merging_conserves_mass(name):
    merging = mergings()[name]
    assert merging.length == 15
    values, size = merging.mean(X, SIZE)
    assert torch.allclose((values * size).sum(1), (X * SIZE).sum(1), atol=1e-4)
    assert torch.allclose(size.sum(1), SIZE.sum(1))
    members = merging.membership()
    assert torch.equal(members.sum(1), torch.ones(2, 21, dtype=torch.long))
    assert members.gather(2, merging.kept[..., None]).all()
    assert torch.allclose(merging.unmerge(values), members.float().transpose(1, 2) @ values)
    assert torch.equal(merging.prune(X), X.gather(1, merging.kept[..., None].expand(-1, -1, 8)))
    if "cls" in name or "distill" in name:
        assert torch.allclose(values[:, 0], X[:, 0])
    if "distill" in name:
        assert (merging.kept[:, 1] == 1).all()


def test_soft_matching_merges_the_most_similar_pairs():
    units = normalize(X[0], dim=-1)
    scores = units[::2] @ units[1::2].T
    pairs = sorted((-scores[i].max().item(), 2 * i, 2 * scores[i].argmax().item() + 1) for i in range(len(scores)))
    index = soft_matching(X, 4).index[0]
    for _, source, target in pairs[:4]:
        assert index[source] == index[target]
    assert soft_matching(X, 0).length == 21
    assert soft_matching(X, 99, class_token=True).length == 11


def test_energy_protects_the_lonely():
    crowd = torch.ones(1, 8, 4) + 0.01 * X[:1, :8, :4]
    lonely = torch.eye(4)[None] * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    similarity = cosines(torch.cat([lonely, crowd], 1))
    merging = energy_matching(similarity, feature_energy(similarity, 0.9), 4)
    assert (merging.membership().sum(2)[0].gather(0, merging.index[0, :4]) == 1).all()


def test_schedule_removes_r_on_average():
    assert merge_schedule(4, 8) == [8, 8, 8, 8]
    assert merge_schedule(5, 8, -1.0) == [16, 12, 8, 4, 0]
    assert merge_schedule(5, 8, 1.0) == [0, 4, 8, 12, 16]
    assert merge_schedule(1, 8) == [8]
