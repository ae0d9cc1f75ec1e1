"""Removing duplicates against a loop over rounds."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from foveate.ops import vispruner as op


def slow(features: torch.Tensor, left: list[int], wanted: int, per_round: int, canonical: bool) -> list[int]:
    units = normalize(features.double(), dim=-1)
    while len(left) > wanted:
        even, odd = left[::2], left[1::2]
        best = [max((float(units[a] @ units[b]) for b in odd), default=0.0) for a in even]
        order = sorted(range(len(even)), key=lambda i: -best[i])
        left = [even[i] for i in order[min(per_round, len(left) - wanted) :]] + odd
        left = sorted(left) if canonical else left
    return sorted(left)


@pytest.mark.parametrize("canonical", [True, False])
@pytest.mark.parametrize("matrix", [True, False])
def test_rounds(canonical: bool, matrix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not matrix:
        monkeypatch.setattr(op, "BLOCK", 1)
    features = torch.randn(4, 60, 8, generator=torch.Generator().manual_seed(0))
    lengths, wanted = ([60, 41, 7, 30], [11, 6, 7, 1]) if canonical else ([60, 42, 8, 30], [11, 6, 8, 9])
    order = torch.stack([torch.randperm(60, generator=torch.Generator().manual_seed(i)) for i in range(4)])
    if canonical:
        order = torch.stack([torch.cat([row[:n].sort().values, row[n:]]) for row, n in zip(order, lengths)])
    kept = op.remove_duplicates(features, order, torch.tensor(lengths), torch.tensor(wanted), 4, canonical)
    for i in range(4):
        expected = slow(features[i], order[i, : lengths[i]].tolist(), wanted[i], 4, canonical)
        assert kept[i].nonzero()[:, 0].tolist() == expected


def test_of_equal_duplicates_the_first_go() -> None:
    order, counts = torch.arange(10)[None], torch.tensor([10])
    kept = op.remove_duplicates(torch.ones(1, 10, 4), order, counts, torch.tensor([8]), 2)
    assert kept[0].nonzero()[:, 0].tolist() == [1, 3, 4, 5, 6, 7, 8, 9]


def test_the_official_code_needs_even_numbers() -> None:
    features, order = torch.randn(1, 9, 4), torch.arange(9)[None]
    with pytest.raises(ValueError, match="9 tokens"):
        op.remove_duplicates(features, order, torch.tensor([9]), torch.tensor([4]), 8, canonical=False)
    kept = op.remove_duplicates(features, order, torch.tensor([9]), torch.tensor([0]), 8, canonical=False)
    assert not bool(kept.any())  # important_ratio=1 skips the rounds


def test_rounding_errors_change_nothing() -> None:
    """What the official order makes of a relative error of 1e-6 is another choice; here it is the same one."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 32, generator=generator)
    features = centres[torch.randint(40, (576,), generator=generator)] + 0.3 * torch.randn(576, 32, generator=generator)
    order, counts, wanted = torch.arange(576)[None], torch.tensor([576]), torch.tensor([64])
    expected = op.remove_duplicates(features[None], order, counts, wanted)
    for seed in range(3):
        noise = 1 + 1e-6 * torch.randn(features.shape, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(op.remove_duplicates((features * noise)[None], order, counts, wanted), expected)
