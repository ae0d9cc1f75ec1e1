"""Room at the end of a list takes no part: every operation on a padded list gives what it gives on the list alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.ops import fopru, merging, outliers, prumerge, pumer, raters, recoverable, visionzip
from foveate.ops.density_peaks import density_peaks, merge_clusters
from foveate.ops.determinantal import determinantal_points
from foveate.ops.diversity import farthest_points
from foveate.ops.duplication import least_duplicated
from foveate.ops.select import gather_tokens, padded_indices, ranked, top_k_indices, top_k_mask
from foveate.ops.vispruner import remove_duplicates

Given = dict[str, Any]
"""x (1, N, C), a, b (1, N), valid (1, N), n tokens, k wanted."""


def _k(g: Given) -> Tensor:
    return torch.tensor([g["k"]])


def _duplicates(canonical: bool) -> Callable[[Given], list[Tensor]]:
    def run(g: Given) -> list[Tensor]:
        n = g["n"] if canonical else g["n"] // 2 * 2  # the official code compares pairs
        listed = g["valid"] & (g["valid"].cumsum(1) <= n)
        order = ranked(g["a"], listed)
        wanted = torch.tensor([min(g["k"], n) if canonical else max(n - 2, 0)])
        return [remove_duplicates(g["x"], order, torch.tensor([n]), wanted, 2, canonical)]

    return run


def _merged(match: merging.Matcher) -> Callable[[Given], list[Tensor]]:
    def run(g: Given) -> list[Tensor]:
        leader, index, values = merging.merge_to_counts(g["x"], torch.ones_like(g["a"]), g["valid"], _k(g), match)
        return [torch.where(g["valid"], leader, 0), index, values]

    return run


def _neighbours(g: Given) -> list[Tensor]:
    kept = top_k_mask(g["a"], g["valid"], _k(g))
    centres = padded_indices(kept, g["k"])
    merged, owner = prumerge.merge_neighbours(g["x"], g["x"], g["b"].abs(), centres, g["valid"] & ~kept, 3)
    return [merged, owner, prumerge.evenly_spaced(g["valid"] & ~kept, _k(g) // 2)]


def _contextual(g: Given) -> list[Tensor]:
    targets, assigned = visionzip.contextual_groups(g["x"], g["valid"], _k(g), g["k"])
    return [targets, assigned, visionzip.merge_into_targets(g["x"], targets, assigned)]


def _recovered(g: Given) -> list[Tensor]:
    found = recoverable.recover(g["a"].abs(), g["b"], g["valid"], _k(g), 4, 3)
    merged, extra, column = recoverable.merge_rest(g["x"], g["x"], g["a"].abs(), g["b"], found, g["valid"], 3)
    return [found.visual, found.text, found.centres, found.pooled, merged, extra, column]


def _clusters(g: Given) -> list[Tensor]:
    found = density_peaks(g["x"], g["valid"], _k(g), g["k"])
    return [found.centres, found.assignment * g["valid"], merge_clusters(g["x"], g["valid"], found)]


def _pivots(g: Given) -> list[Tensor]:
    pivots, exists = top_k_indices(g["a"], g["valid"], 2)
    chosen = gather_tokens(g["x"], pivots)
    return [exists, least_duplicated(chosen @ g["x"].transpose(1, 2), g["valid"], exists.long() * _k(g)[:, None] // 2)]


def _raters(g: Given) -> list[Tensor]:
    relevance = raters.text_relevance(g["x"][:, :2], g["x"], torch.ones(1, 2, dtype=torch.bool), g["valid"])
    rank = raters.matrix_rank(g["x"].transpose(1, 2), torch.ones(1, g["x"].shape[2], dtype=torch.bool), g["valid"])
    return [raters.rater_mask(relevance, g["valid"])[0], rank[0]]


def _significant(g: Given) -> list[Tensor]:
    key = g["x"].unflatten(2, (2, -1))
    given_, received = fopru.given_and_received(key, key, key[:, 0], 0.5, g["valid"], block=4)
    return [given_, received, fopru.significance(given_, received, g["valid"]) * g["valid"]]


def _pumer(style: pumer.MergeStyle) -> Callable[[Given], list[Tensor]]:
    def run(g: Given) -> list[Tensor]:
        found = pumer.reduce_image(g["a"], g["x"], g["valid"], 0.2, 0.2, style)
        words = pumer.reduce_text(g["x"], g["valid"].long(), 0.4)
        return [found.origin(), found.apply(g["x"])] + ([words.origin(), words.apply(g["x"])] if words else [])

    return run


OPERATIONS: dict[str, Callable[[Given], list[Tensor]]] = {
    "best tokens": lambda g: [top_k_mask(g["a"], g["valid"], _k(g))],
    "best rows": lambda g: [fopru.best_rows(g["a"], g["valid"], torch.tensor([3]), _k(g))],
    "clusters": _clusters,
    "contextual tokens": _contextual,
    "determinantal points": lambda g: [determinantal_points(g["x"], g["a"].abs(), g["valid"], _k(g))],
    "duplicates": _duplicates(True),
    "duplicates, official": _duplicates(False),
    "energy": _merged(lambda x, valid, r: merging.energy_pairs(x, valid, r, 0.45)),
    "farthest points": lambda g: [farthest_points(g["x"], g["valid"], _k(g))],
    "neighbours": _neighbours,
    "outlier factor": lambda g: [outliers.local_outlier_factor(g["a"], 4, g["valid"]) * g["valid"]],
    "outliers": lambda g: [outliers.upper_outliers(g["a"], g["valid"])],
    "pivots": _pivots,
    "pumer": _pumer("tome"),
    "pumer, by score": _pumer("diff"),
    "raters": _raters,
    "recovery": _recovered,
    "significance": _significant,
    "soft matching": _merged(merging.soft_pairs),
}


def _trimmed(result: Tensor, n: int, longer: int) -> Tensor:
    """The result without its padding: of the token axis, of lists padded with -1."""
    return result[:, :n] if result.dim() > 1 and result.shape[1] == longer else result


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 14), room=st.integers(1, 9), size=st.sampled_from([0.0, 1.0, 1e3]))
def test_room_at_the_end_takes_no_part(operation: str, seed: int, n: int, room: int, size: float):
    generator = torch.Generator().manual_seed(seed)
    x, garbage = torch.randn(1, n, 6, generator=generator), size * torch.randn(1, room, 6, generator=generator)
    k = 1 + seed % (n - 1)
    alone: Given = {
        "x": x, "a": torch.randn(1, n, generator=generator), "b": torch.randn(1, n, generator=generator),
        "valid": torch.ones(1, n, dtype=torch.bool), "n": n, "k": k,
    }  # fmt: skip
    more = size * torch.randn(2, 1, room, generator=generator)
    padded = alone | {
        "x": torch.cat([x, garbage], 1), "a": torch.cat([alone["a"], more[0]], 1),
        "b": torch.cat([alone["b"], more[1]], 1), "valid": torch.arange(n + room)[None] < n,
    }  # fmt: skip
    for with_room, without in zip(OPERATIONS[operation](padded), OPERATIONS[operation](alone), strict=True):
        with_room = _trimmed(with_room, n, n + room)
        assert with_room.shape == without.shape
        if with_room.is_floating_point():
            torch.testing.assert_close(with_room, without, atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(with_room, without)


def test_one_sample_is_merged_as_if_it_were_alone():
    """Rounds that another sample needs change nothing, not even by rounding."""
    generator = torch.Generator().manual_seed(3)
    x, size = torch.randn(2, 16, 6, generator=generator), torch.full((2, 16), 3.0)
    alive, counts = torch.ones(2, 16, dtype=torch.bool), torch.tensor([15, 1])
    together = merging.merge_to_counts(x, size, alive, counts, merging.soft_pairs)
    alone = merging.merge_to_counts(x[:1], size[:1], alive[:1], counts[:1], merging.soft_pairs)
    for a, b in zip(together[1:], alone[1:]):
        assert torch.equal(a[:1, :15], b)
