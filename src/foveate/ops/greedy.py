"""Greedy choices in blocks: of the most promising tokens several are chosen before the others are looked at again.

What a token would add never grows while others are chosen. So what it was worth at the start of a block is a bound, and
as long as the best of the candidates is worth more than the best of the others was, it is the best of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Candidates", "beats", "padded"]


@dataclass(frozen=True)
class Candidates:
    """The `m` most promising of `N` tokens.

    Attributes:
        index: (I, m) long, ascending.
        bound: (I, 1), what the best of the others is worth; -inf without others.
        other: (I, 1) long, which one that is; N without others.
    """

    index: Tensor
    bound: Tensor
    other: Tensor

    @classmethod
    def of(cls, worth: Tensor, most: int) -> Candidates:
        """Of tokens worth (I, N), `most` at most."""
        samples, tokens = worth.shape
        if tokens <= most:
            index = torch.arange(tokens, device=worth.device).expand(samples, -1)
            return cls(index, worth.new_full((samples, 1), -torch.inf), torch.full_like(index[:, :1], tokens))
        order = worth.argsort(dim=1, descending=True, stable=True)
        other = order[:, most : most + 1]
        return cls(order[:, :most].sort(1).values, worth.gather(1, other), other)


def beats(worth: float, token: int, bound: float, other: int) -> bool:
    """Whether a candidate is chosen before all others; of equals the lower index is."""
    return bool(worth > bound or (worth == bound and token < other))


def padded(chosen: Sequence[Sequence[int]], fill: int | Sequence[int] = -1) -> np.ndarray:
    """Lists of different lengths as one array, filled up with one number, or one for each list."""
    table = np.empty((len(chosen), max(map(len, chosen), default=0)), dtype=np.int64)
    table[:] = np.asarray(fill).reshape(-1, 1)
    for row, tokens in zip(table, chosen):
        row[: len(tokens)] = tokens
    return table
