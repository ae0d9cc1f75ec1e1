"""Merging ragged samples down to their budgets."""

import functools

import pytest
import torch

from foveate.ops.bipartite import cosines, energy_matching, feature_energy, soft_matching
from foveate.ops.merging import energy_pairs, first_of_each, merge_to_counts, soft_pairs

MATCHERS = {"soft": soft_pairs, "energy": functools.partial(energy_pairs, margin=0.4)}


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(0))
    alive = torch.ones(3, 20, dtype=torch.bool)
    alive[1, 12:] = False
    alive[2, ::3] = False
    return x, torch.arange(1, 61).view(3, 20), alive


@pytest.mark.parametrize("name", MATCHERS)
def test_counts_are_met_and_mass_is_conserved(name):
    x, size, alive = inputs()
    counts = torch.tensor([3, 12, 5])
    leader, index, values = merge_to_counts(x, size, alive, counts, MATCHERS[name])
    assert (index >= 0).sum(1).tolist() == counts.tolist()
    for row in range(3):
        places = index[row][index[row] >= 0].tolist()
        assert places == sorted(places)
        for k, place in enumerate(places):
            members = [i for i in range(20) if alive[row, i] and leader[row, i] == place]
            assert min(members) == place
            weight = size[row, members].float()
            expected = (x[row, members] * weight[:, None]).sum(0) / weight.sum()
            assert torch.allclose(values[row, k], expected, atol=1e-5)
        alone = merge_to_counts(*(t[row : row + 1] for t in (x, size, alive, counts)), MATCHERS[name])
        assert torch.equal(alone[0][alive[row : row + 1]], leader[row][alive[row]])


def test_one_round_is_the_published_matching():
    x = torch.randn(1, 20, 6, generator=torch.Generator().manual_seed(3))
    similarity = cosines(x)
    published = {
        "soft": soft_matching(x, 7),
        "energy": energy_matching(similarity, feature_energy(similarity, 0.4), 7),
    }
    for name, merging in published.items():
        everything = torch.ones(1, 20, dtype=torch.bool)
        leader, _, _ = merge_to_counts(x, everything.long(), everything, torch.tensor([13]), MATCHERS[name])
        together = merging.index[0][:, None] == merging.index[0]
        assert torch.equal(leader[0][:, None] == leader[0], together)


def test_first_of_each():
    labels = torch.tensor([[5, 5, 2, -1, 5, -1, 2]])
    assert first_of_each(labels).tolist() == [[0, 0, 2, 3, 0, 5, 2]]
