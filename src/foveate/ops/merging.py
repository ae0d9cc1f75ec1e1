"""Merging down to a budget after the vision tower: ragged samples, each to its own number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import elu, normalize

from .host import BLOCK, to_device
from .select import gather_tokens, inverse, ranked, top_k_mask, true_indices

__all__ = ["Matcher", "energy_pairs", "first_of_each", "merge_to_counts", "soft_pairs"]

Matcher = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
"""(x (I, n, D), valid (I, n) left-aligned, r of each) -> (I, n), the token that each goes into; `r` go into others."""


def soft_pairs(x: Tensor, valid: Tensor, r: Sequence[int]) -> Tensor:
    """ToMe's bipartite soft matching for ragged samples: even tokens into odd ones. A `Matcher`."""
    units = normalize(x.float(), dim=-1)
    there, closed = units[:, 1::2].transpose(1, 2), ~valid[:, None, 1::2]
    found = [(part @ there).masked_fill_(closed, -torch.inf).max(2) for part in units[:, ::2].split(BLOCK, 1)]
    best, partner = found[0] if len(found) == 1 else (torch.cat(parts, 1) for parts in zip(*found))
    into = torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)
    even, goes = into[:, ::2], top_k_mask(best, valid[:, ::2], to_device(r, x.device))
    even.copy_(torch.where(goes, 2 * partner + 1, even))
    return into


def energy_pairs(x: Tensor, valid: Tensor, r: Sequence[int], margin: float, alpha: float = 1.0) -> Tensor:
    """PiToMe's matching for ragged samples: of the 2r tokens of highest energy, even ranks into odd ones. A `Matcher`.

    Rows of the similarity are looked at in blocks, so that memory is linear in the number of tokens.
    """
    units, (samples, tokens) = normalize(x.float(), dim=-1), valid.shape
    energy = torch.zeros_like(valid, dtype=units.dtype)
    for start in range(0, tokens, BLOCK):  # each pair once
        rows, later = units[:, start : start + BLOCK], units[:, start:]
        near = elu((rows @ later.transpose(1, 2)).sub_(margin), alpha=alpha, inplace=True)
        near.masked_fill_(~valid[:, None, start:], 0.0)
        energy[:, start : start + BLOCK] += near.sum(2)
        if start + BLOCK < tokens:
            near.masked_fill_(~valid[:, start : start + BLOCK, None], 0.0)
            energy[:, start + BLOCK :] += near[:, :, BLOCK:].sum(1)
    order = ranked(energy / valid.sum(1, keepdim=True).clamp_min(1), valid)[:, : 2 * max(r)]
    source, target = order[:, ::2], order[:, 1::2]
    there = gather_tokens(units, target).transpose(1, 2)
    closed = torch.arange(max(r), device=x.device) >= to_device(r, x.device)[:, None]
    nearest = torch.cat([
        (part @ there).masked_fill_(closed[:, None], -torch.inf).argmax(2)
        for part in gather_tokens(units, source).split(BLOCK, 1)
    ], 1)  # fmt: skip
    into = torch.arange(tokens, device=x.device).repeat(samples, 1)
    return into.scatter_(1, source, torch.where(closed, source, target.gather(1, nearest)))


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
        into = match(x, valid, removed)
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
