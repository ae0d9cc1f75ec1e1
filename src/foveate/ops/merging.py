"""Merging down to a budget after the vision tower: ragged samples, each to its own number of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import elu, normalize

from .select import gather_tokens, inverse, ranked, top_k_mask, true_indices

__all__ = ["Matcher", "energy_pairs", "first_of_each", "merge_to_counts", "soft_pairs"]

Matcher = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x (I, n, D), valid (I, n) left-aligned, r (I,)) -> tokens that go (I, n) bool, `r` each, and into which (I, n)."""


def soft_pairs(x: Tensor, valid: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """ToMe's bipartite soft matching for ragged samples: even tokens into odd ones. A `Matcher`."""
    units = normalize(x.float(), dim=-1)
    scores = units[:, ::2] @ units[:, 1::2].transpose(1, 2)
    best, into = scores.masked_fill_(~valid[:, None, 1::2], -torch.inf).max(2)
    source, partner = torch.zeros_like(valid), torch.zeros_like(valid, dtype=torch.long)
    source[:, ::2], partner[:, ::2] = top_k_mask(best, valid[:, ::2], r), 2 * into + 1
    return source, partner


def energy_pairs(x: Tensor, valid: Tensor, r: Tensor, margin: float, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """PiToMe's matching for ragged samples: of the 2r tokens of highest energy, even ranks into odd ones."""
    units = normalize(x.float(), dim=-1).masked_fill(~valid[..., None], 0.0)
    similarity = units @ units.transpose(1, 2)
    number = valid.sum(1, keepdim=True)
    near = elu(similarity - margin, alpha=alpha, inplace=True).masked_fill_(~valid[:, None], 0.0)
    energy = near.sum(2) / number.clamp_min(1)
    rank = inverse(ranked(energy, valid))
    taking_part = (rank < 2 * r[:, None]) & valid
    source, target = taking_part & (rank % 2 == 0), taking_part & (rank % 2 == 1)
    return source, similarity.masked_fill_(~target[:, None], -torch.inf).argmax(2)


def merge_to_counts(
    x: Tensor, size: Tensor, alive: Tensor, counts: Tensor, match: Matcher, weighted: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge round after round, at most half of the tokens in each, until a sample has as many as it may.

    A merged token takes the place of its first member, so that the order of the tokens stays.

    Args:
        x: (I, N, D).
        size: (I, N) how many patches each token stands for.
        alive: (I, N) bool, tokens that exist.
        counts: (I,) tokens wanted, at least 1 where there are any.
        match: which tokens merge in a round.
        weighted: means are weighted by size.

    Returns:
        leader (I, N): the token whose place each token's group takes (undefined where not alive); index (I, n): those
        places, ascending, -1 for padding; and the groups' values (I, n, D).
    """
    number = alive.sum(1)
    have, wanted = torch.stack([number, counts]).tolist()
    place = alive.cumsum(1) - 1
    index, valid = true_indices(alive, max(have), align="left")
    x = gather_tokens(x, index).float()
    size = size.gather(1, index).float()
    while any(now > then for now, then in zip(have, wanted)):
        removed = [min(now - then, now // 2) if now > then else 0 for now, then in zip(have, wanted)]
        r = torch.minimum(number - counts, number // 2).clamp_min(0)
        source, partner = match(x, valid, r)
        number = number - r
        have = [now - gone for now, gone in zip(have, removed)]
        into = torch.where(source, partner, torch.arange(x.shape[1], device=x.device))
        weight = torch.where(valid, size if weighted else torch.ones_like(size), 0)
        total = torch.zeros_like(weight).scatter_add(1, into, weight)
        mean = torch.zeros_like(x).scatter_add(1, into[..., None].expand_as(x), x * weight[..., None])
        # A token that nothing joins is not touched, not even by rounding: other samples may need more rounds.
        joined = torch.zeros_like(into).scatter_add(1, into, source.long()) > 0
        x = torch.where(joined[..., None], mean / total.clamp_min(1e-9)[..., None], x)
        size = torch.zeros_like(size).scatter_add(1, into, torch.where(valid, size, 0))
        index = torch.full_like(index, 1 << 40).scatter_reduce(1, into, index, "amin")
        valid = valid & ~source
        order = torch.where(valid, index, 1 << 41).argsort(dim=1, stable=True)
        place = inverse(order).gather(1, into.gather(1, place.clamp_min(0)))
        order = order[:, : max(have)]
        index, size, valid = index.gather(1, order), size.gather(1, order), valid.gather(1, order)
        x = gather_tokens(x, order)
    leader = index.gather(1, place.clamp(0, max(index.shape[1] - 1, 0)))
    return leader, torch.where(valid, index, -1), x


def first_of_each(labels: Tensor) -> Tensor:
    """For every column of `labels` (I, N) the first column with the same label; negative labels stand alone: (I, N)."""
    ordered, order = labels.sort(dim=1, stable=True)
    columns = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]) | (ordered[:, 1:] < 0)
    start = torch.where(begins, columns, 0).cummax(1).values
    return torch.empty_like(order).scatter(1, order, order.gather(1, start))
