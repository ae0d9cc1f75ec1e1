"""Density peaks against a slow twin that looks at one token after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from foveate.ops.density_peaks import density_peaks, merge_clusters


@dataclass
class Twin:
    centres: list[int]
    assignment: list[int]
    merged: Tensor
    density: list[float]


def slow(tokens: Tensor, clusters: int, neighbours: int | None, normalise: bool, isolation: str, assign: str, how: str):
    """Density peaks of one sample (N, D), by the book and in double precision; of equals, the first is denser."""
    points = tokens.double()
    n, dim = points.shape
    apart = [[math.dist(a, b) / (math.sqrt(dim) if normalise else 1) for b in points.tolist()] for a in points.tolist()]
    k = min(neighbours or clusters, n)
    height = [-sum(d * d for d in sorted(row)[:k]) / k for row in apart]
    delta = []
    for i in range(n):
        denser = [apart[i][j] for j in range(n) if height[j] > height[i] or (height[j] == height[i] and j < i)]
        delta.append(min(denser) if denser else max(map(max, apart)) if isolation == "sample" else max(apart[i]))
    score = [h + math.log(d) if d > 0 else -math.inf for h, d in zip(height, delta)]
    centres = sorted(range(n), key=lambda i: (-score[i], i))[:clusters]
    assignment = []
    for i in range(n):
        if i in centres:
            assignment.append(centres.index(i))
        elif assign == "euclidean":
            assignment.append(min(range(clusters), key=lambda c: apart[i][centres[c]]))
        else:
            alike = [float(torch.cosine_similarity(points[i], points[c], dim=0)) for c in centres]
            assignment.append(max(range(clusters), key=alike.__getitem__))
    members = [[points[i] for i in range(n) if assignment[i] == c] for c in range(clusters)]
    merged = torch.stack([torch.stack(m).sum(0) / (len(m) if how == "mean" else 1) for m in members])
    return Twin(centres, assignment, merged, [math.exp(h) for h in height])


CASES = [
    (None, True, "sample", "euclidean", "mean"),
    (None, False, "token", "cosine", "sum"),
    (4, True, "token", "euclidean", "sum"),
]


@pytest.mark.parametrize(("neighbours", "normalise", "isolation", "assign", "how"), CASES)
@pytest.mark.parametrize("seed", range(4))
def test_a_ragged_batch_is_what_the_slow_twin_says_row_by_row(neighbours, normalise, isolation, assign, how, seed):
    sizes, clusters = [40, 13, 26, 1, 7], [5, 2, 3, 1, 1]
    tokens = torch.randn(5, 40, 12, generator=torch.Generator().manual_seed(seed))
    valid = torch.arange(40) < torch.tensor(sizes)[:, None]
    found = density_peaks(
        tokens, valid, torch.tensor(clusters), 5, neighbours=neighbours, normalise=normalise, isolation=isolation,
        assignment=assign,
    )  # fmt: skip
    merged = merge_clusters(tokens, valid, found, how)
    for b, (n, count) in enumerate(zip(sizes, clusters)):
        twin = slow(tokens[b, :n], count, neighbours, normalise, isolation, assign, how)
        assert found.centres[b].tolist() == twin.centres + [-1] * (5 - count)
        assert found.assignment[b, :n].tolist() == twin.assignment
        torch.testing.assert_close(merged[b, :count].double(), twin.merged, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            found.density[b, :n].double(), torch.tensor(twin.density).double(), atol=1e-5, rtol=0
        )


def test_the_densities_may_all_be_zero():
    """Hidden states of a large model: distances at which exp() underflows."""
    tokens = torch.randn(1, 30, 16, generator=torch.Generator().manual_seed(0))
    valid, count = torch.ones(1, 30, dtype=torch.bool), torch.tensor([4])
    near = density_peaks(tokens, valid, count, 4)
    far = density_peaks(tokens * 1000, valid, count, 4)
    assert (far.density == 0).all()
    twin = slow(tokens[0] * 1000, 4, None, True, "sample", "euclidean", "mean")
    assert far.centres[0].tolist() == twin.centres
    assert near.density.min() > 0


def test_a_large_common_offset_changes_nothing():
    tokens = torch.randn(1, 60, 64, generator=torch.Generator().manual_seed(1))
    valid, count = torch.ones(1, 60, dtype=torch.bool), torch.tensor([6])
    near, far = density_peaks(tokens, valid, count, 6), density_peaks(tokens + 500, valid, count, 6)
    assert torch.equal(near.centres, far.centres)
    assert torch.equal(near.assignment, far.assignment)


def test_identical_tokens():
    tokens, valid = torch.ones(2, 10, 4), torch.ones(2, 10, dtype=torch.bool)
    found = density_peaks(tokens, valid, torch.tensor([3, 1]), 3)
    assert [len(set(row.tolist())) for row in found.centres] == [3, 2]
    assert merge_clusters(tokens, valid, found).isfinite().all()


def test_noise_breaks_ties_of_the_official_density():
    tokens, valid, count = torch.zeros(1, 4, 2), torch.ones(1, 4, dtype=torch.bool), torch.tensor([1])
    tokens[0, 3] = 1.0
    noise = torch.tensor([[0.1, 0.9, 0.2, 0.3]])
    found = density_peaks(tokens, valid, count, 1, noise=noise, guarded=False)
    torch.testing.assert_close(found.density, 1 + noise * 1e-6, atol=2e-7, rtol=0)
    assert found.centres.tolist() == [[1]]
