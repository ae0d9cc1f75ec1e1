"""VisPruner: remove near-duplicates in rounds of bipartite comparison."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from .host import BLOCK, to_device, to_host
from .select import index_mask

__all__ = ["remove_duplicates"]

_NEIGHBOURS = 32
"""Nearest neighbours of each token that are listed; what is beyond them is looked up only where it decides."""
_FIRST = 8
"""Those of them that are looked at first."""


@torch.no_grad()
def remove_duplicates(
    features: Tensor, order: Tensor, counts: Tensor, wanted: Tensor, per_round: int | Tensor = 8, canonical: bool = True
) -> Tensor:
    """Bring the listed tokens of every sample down to `wanted`, always removing those most similar to a neighbour.

    In a round the tokens at even places of the list are compared with those at odd places, and of the former the ones
    with the largest cosine go, `per_round` at most. The rounds are run on the host, on the nearest neighbours of each
    token. Up to `BLOCK` tokens everything is handed over with one wait; of more, the neighbours are found on the device
    in blocks of rows, anew whenever half of the tokens have gone, and N x N cosines are never held.

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
    tokens = features.shape[1]
    units = normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
    most = per_round if isinstance(per_round, Tensor) else torch.full_like(counts, per_round)
    handed = [torch.stack([counts, wanted, most], 1), order]
    if tokens <= BLOCK:
        cosines = units @ units.transpose(1, 2)
        listed = torch.arange(order.shape[1], device=order.device) < counts[:, None]
        alive = index_mask(torch.where(listed, order, -1), tokens)
        values, near = cosines.masked_fill(~alive[:, None], -torch.inf).topk(min(_NEIGHBOURS, tokens), dim=2)
        handed += [near, values, cosines]
    facts, order_, *rest = to_host(*handed)
    kept = np.zeros((len(units), tokens), bool)
    for row, (count, left, at_most) in enumerate(facts.tolist()):
        if left:
            source = _Handed(*(part[row] for part in rest)) if rest else _OnDevice(units[row])
            kept[row, _rounds(order_[row, :count], left, at_most, source, canonical)] = True
    return to_device(kept, features.device)


@dataclass
class _Handed:
    """Nearest neighbours (N, k) of each token, how similar they are, and all cosines (N, N)."""

    near: np.ndarray
    values: np.ndarray
    cosines: np.ndarray

    def left(self, tokens: np.ndarray) -> None:
        """These are left: lists of neighbours in which most are gone are of no use."""

    def best(self, tokens: np.ndarray, others: np.ndarray) -> np.ndarray:
        """The largest cosine of each of some tokens to one of others."""
        return self.cosines[np.ix_(tokens, others)].max(1)


class _OnDevice:
    """The same, of features (N, C) that stay where they are."""

    def __init__(self, units: Tensor):
        self.units, self.listed = units, 0

    def left(self, tokens: np.ndarray) -> None:
        if self.listed and 2 * len(tokens) > self.listed:
            return
        self.listed = len(tokens)
        units = self.units[to_device(tokens, self.units.device)]
        count = min(_NEIGHBOURS, len(tokens))
        best = units.new_full((len(units), count), -2.0)
        which = torch.zeros_like(best, dtype=torch.long)
        for start in range(0, len(units), BLOCK):  # each pair once: rows of a block, and columns behind it
            end = start + BLOCK
            cosines = units[start:end] @ units[start:].T
            for mine, found in ((slice(start, end), cosines), (slice(end, None), cosines[:, BLOCK:].T)):
                if found.numel():
                    value, index = found.topk(min(count, found.shape[1]), dim=1)
                    best[mine], place = torch.cat([best[mine], value], 1).topk(count, dim=1)
                    which[mine] = torch.cat([which[mine], index + start], 1).gather(1, place)
        near, values = to_host(which, best)
        self.near = np.zeros((len(self.units), count), np.int64)
        self.values = np.zeros((len(self.units), count), values.dtype)
        self.near[tokens], self.values[tokens] = tokens[near], values

    def best(self, tokens: np.ndarray, others: np.ndarray) -> np.ndarray:
        mine, theirs = (self.units[to_device(part, self.units.device)] for part in (tokens, others))
        return to_host((mine @ theirs.T).amax(1))[0]


def _rounds(left: np.ndarray, wanted: int, per_round: int, source: _Handed | _OnDevice, canonical: bool) -> np.ndarray:
    """The tokens that are left of a list."""
    while len(left) > wanted:
        number = len(left)
        goes = min(per_round, number - wanted)
        if not canonical and (number % 2 or number // 2 < goes):
            raise ValueError(f"{number} tokens cannot be compared pair by pair")
        goes = min(goes, (number + 1) // 2)
        source.left(left)
        even, odd = left[::2], left[1::2]
        ranking = np.argsort(-_most_similar(even, odd, goes, source, canonical), kind="stable")
        left = np.concatenate([even[ranking[goes:]], odd])
        if canonical:
            left.sort()
    return left


def _most_similar(
    even: np.ndarray, odd: np.ndarray, goes: int, source: _Handed | _OnDevice, canonical: bool
) -> np.ndarray:
    """The largest cosine of each even token to an odd one; -inf for what is certainly not among the `goes` largest."""
    if not len(odd):  # a single token: nothing to compare it with, it goes
        return np.zeros(len(even))
    there = np.zeros(len(source.near), bool)
    there[odd] = True
    best = np.full(len(even), -np.inf, source.values.dtype)
    open_ = np.arange(len(even))
    for columns in (slice(_FIRST), slice(None)):  # of most, one of the first few is odd
        hit = there[source.near[even[open_], columns]]
        at = hit.argmax(1)
        found = hit[np.arange(len(at)), at]
        best[open_[found]] = source.values[even[open_[found]], at[found]]
        open_ = open_[~found]
    if canonical and len(open_):  # they are no more similar than the last of their neighbours
        last = len(even) - goes
        least = np.partition(best, last)[last]
        open_ = open_[source.values[even[open_], -1] >= least]
    if len(open_):
        best[open_] = source.best(even[open_], odd)
    return best
