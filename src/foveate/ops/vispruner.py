"""VisPruner: remove near-duplicates in rounds of bipartite comparison."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .select import index_mask, true_indices

__all__ = ["remove_duplicates"]

_LARGEST_MATRIX = 4096
"""Tokens up to which all cosines are computed at once; above, only those of a round."""


def _pairs(units: Tensor, cosines: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Cosines of the tokens `left` (I, a) and `right` (I, b): (I, a, b)."""
    if cosines is not None:
        cells = (left[:, :, None] * units.shape[1] + right[:, None]).flatten(1)
        return cosines.flatten(1).gather(1, cells).view(*left.shape, right.shape[1])
    sample = torch.arange(len(units), device=units.device)[:, None]
    return units[sample, left] @ units[sample, right].transpose(1, 2)


def remove_duplicates(
    features: Tensor, order: Tensor, counts: Tensor, wanted: Tensor, per_round: int | Tensor = 8, canonical: bool = True
) -> Tensor:
    """Bring the listed tokens of every sample down to `wanted`, always removing those most similar to a neighbour.

    In a round the tokens at even places of the list are compared with those at odd places, and of the former the ones
    with the largest cosine go, `per_round` at most.

    Source: VisPruner, arXiv 2412.01818; Theia-4869/VisPruner @ aefa01ad, `encode_images`.

    Args:
        features: (I, N, C); compared in float32 (float64 if they are).
        order: (I, M) long, the list, left-aligned; what comes after its end takes no part.
        counts: (I,) its length in each sample.
        wanted: (I,) at most `counts`.
        per_round: tokens that go in a round, or how many in each sample (I,).
        canonical: after each round the list is in ascending order, so that nothing depends on the order of
            similarities that are nearly equal; any length is served. False, the official code: what is left of the even
            places follows in descending order of similarity, then the odd places.

    Returns:
        (I, N) bool, what is left.

    Raises:
        ValueError: `canonical=False` with an odd number of tokens at the start of a round, or fewer comparisons than
            tokens to remove: the official code fails.
    """
    samples, tokens = features.shape[:2]
    most = per_round if isinstance(per_round, Tensor) else torch.full_like(counts, per_round)
    have, then, at_most = torch.stack([counts, wanted, most]).tolist()
    if not any(then):
        return torch.zeros(samples, tokens, dtype=torch.bool, device=features.device)
    units = normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
    cosines = units @ units.transpose(1, 2) if tokens <= _LARGEST_MATRIX else None
    order = torch.where(torch.arange(order.shape[1], device=order.device) < counts[:, None], order, tokens)
    while any(n > w for n, w in zip(have, then)):
        gone = [max(min(m, n - w, (n + 1) // 2), 0) for n, w, m in zip(have, then, at_most)]
        goes = torch.minimum(torch.minimum(most, counts - wanted), (counts + 1) // 2).clamp_min(0)
        if not canonical:
            wrong = [n for n, w, m in zip(have, then, at_most) if n > w and (n % 2 or n // 2 < min(m, n - w))]
            if wrong:
                raise ValueError(f"{wrong[0]} tokens cannot be compared pair by pair")
        even, odd = order[:, ::2], order[:, 1::2]
        similar = _pairs(units, cosines, even.clamp_max(tokens - 1), odd.clamp_max(tokens - 1))
        if not odd.shape[1]:  # a single token: nothing to compare it with, it goes
            similar = units.new_zeros(*even.shape, 1)
        else:
            similar = similar.masked_fill((odd == tokens)[:, None], -2.0)
        best = similar.amax(2).masked_fill(even == tokens, -torch.inf)
        ranking = best.argsort(dim=1, descending=True, stable=True)
        removed = torch.arange(even.shape[1], device=order.device) < goes[:, None]
        left = even.gather(1, ranking).masked_fill(removed, tokens)
        have = [n - g for n, g in zip(have, gone)]
        # A sample that is done keeps its list; its padding is at the end already.
        done = (goes == 0)[:, None]
        counts = counts - goes
        new = torch.cat([left, odd], 1)
        if canonical:
            new = new.sort(1).values
        else:
            new = new.gather(1, true_indices(new != tokens, new.shape[1], align="left")[0])
        order = torch.where(done, order, new)[:, : max(have)]
    return index_mask(order, tokens)
