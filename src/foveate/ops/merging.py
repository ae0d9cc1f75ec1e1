"""Merging down to a budget after the vision tower: ragged samples, each to its own number of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import elu, normalize

from .host import BLOCK, to_device
from .select import gather_tokens, inverse, ranked, top_k_mask, true_indices

__all__ = ["Matcher", "energy_pairs", "first_of_each", "merge_to_counts", "soft_pairs"]

Matcher = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (I, n, D), valid (I, n) left-aligned, r (I,)) -> (I, n), the token that each goes into; `r` go into others."""


def soft_pairs(x: Tensor, valid: Tensor, r: Tensor) -> Tensor:
    """ToMe's bipartite soft matching for ragged samples: even tokens into odd ones. A `Matcher`."""
    units = normalize(x.float(), dim=-1)
    scores = units[:, ::2] @ units[:, 1::2].transpose(1, 2)
    best, partner = scores.masked_fill_(~valid[:, None, 1::2], -torch.inf).max(2)
    into = torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)
    even = into[:, ::2]
    even.copy_(torch.where(top_k_mask(best, valid[:, ::2], r), 2 * partner + 1, even))
    return into


def energy_pairs(x: Tensor, valid: Tensor, r: Tensor, margin: float, alpha: float = 1.0) -> Tensor:
    """PiToMe's matching for ragged samples: of the 2r tokens of highest energy, even ranks into odd ones.

    Rows of the similarity are looked at in blocks, so that memory is linear in the number of tokens.
    """
    units, away = normalize(x.float(), dim=-1), ~valid[:, None]
    transposed = units.transpose(1, 2)

    def energy(part: Tensor) -> Tensor:
        near = elu((part @ transposed).sub_(margin), alpha=alpha, inplace=True)
        return near.masked_fill_(away, 0.0).sum(2)

    order = ranked(_by_rows(energy, units) / valid.sum(1, keepdim=True).clamp_min(1), valid)
    own = torch.arange(x.shape[1], device=x.device)
    # 0 takes no part, 1 goes, 2 is gone into.
    role = torch.empty_like(order).scatter_(1, order, torch.where(own < 2 * r[:, None], own % 2 + 1, 0))
    away = (role != 2)[:, None]
    nearest = _by_rows(lambda part: (part @ transposed).masked_fill_(away, -torch.inf).argmax(2), units)
    return torch.where(role == 1, nearest, own)


def _by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of some of the tokens (I, n, D), applied to all (I, N, D) in blocks."""
    return function(x) if x.shape[1] <= BLOCK else torch.cat([function(part) for part in x.split(BLOCK, 1)], 1)


def merge_to_counts(
    x: Tensor, size: Tensor, alive: Tensor, counts: Tensor, match: Matcher, weighted: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge round after round, at most half of the tokens in each, until a sample has as many as it may.

    A merged token takes the place of its first member, so that the order of the tokens stays. The host waits once.

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
    have, wanted = torch.stack([alive.sum(1), counts]).tolist()
    place, gone = (alive.cumsum(1) - 1).clamp_min_(0), 1 << 40
    index, valid = true_indices(alive, max(have), align="left")
    x, size = gather_tokens(x, index).float(), size.gather(1, index).float() * valid
    index = torch.where(valid, index, gone)
    while any(now > then for now, then in zip(have, wanted)):
        removed = [min(now - then, now // 2) if now > then else 0 for now, then in zip(have, wanted)]
        have = [now - less for now, less in zip(have, removed)]
        into = match(x, valid, to_device(removed, x.device))
        source = into != torch.arange(x.shape[1], device=x.device)
        grown = torch.zeros_like(size).scatter_add_(1, into, size)
        weight = size if weighted else (size > 0).to(size.dtype)
        total = grown if weighted else torch.zeros_like(size).scatter_add_(1, into, weight)
        mean = torch.zeros_like(x).scatter_add_(1, into[..., None].expand_as(x), x * weight[..., None])
        # A token that nothing joins is not touched, not even by rounding: other samples may need more rounds.
        x = torch.where((grown != size)[..., None], mean / total.clamp_min(1e-9)[..., None], x)
        first = torch.full_like(index, gone).scatter_reduce_(1, into, index, "amin")
        index, order = first.masked_fill_(source, gone).sort(dim=1, stable=True)
        place = inverse(order).gather(1, into.gather(1, place))
        index, order = index[:, : max(have)], order[:, : max(have)]
        size, valid = grown.gather(1, order), index < gone
        x = x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
    leader = index.gather(1, place.clamp_max(max(index.shape[1] - 1, 0)))
    return leader, index.masked_fill(~valid, -1), x


def first_of_each(labels: Tensor) -> Tensor:
    """For every column of `labels` (I, N) the first column with the same label; negative labels stand alone: (I, N)."""
    ordered, order = labels.sort(dim=1, stable=True)
    columns = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]) | (ordered[:, 1:] < 0)
    start = torch.where(begins, columns, 0).cummax(1).values
    return torch.empty_like(order).scatter(1, order, order.gather(1, start))
