"""PuMer token by token, for one sample without padding: the obvious twin of `foveate.ops.pumer`, default reading."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

__all__ = ["image_groups", "pooled", "text_groups"]


def image_groups(
    scores: Tensor, key: Tensor, prune: float, merge: float, style: str = "tome"
) -> tuple[list[list[int]], bool]:
    """Which image tokens make up each token that is left, and whether they are averaged: scores (N,), key (N, d)."""
    tokens = len(scores)
    kept = max(tokens - round(prune * tokens), 1)
    patches = sorted(range(1, tokens), key=lambda i: -float(scores[i]))[: kept - 1]
    order = [0, *patches]

    def likeness(a: int, b: int) -> float:
        if style == "diff":
            return -abs(float(scores[a] - scores[b]))
        weigh = scores if style == "tip" else torch.ones(tokens)
        return float(cosine_similarity(key[a] * weigh[a], key[b] * weigh[b], dim=0))

    return _merge(order, min(round(merge * tokens), (kept - 1) // 2), likeness), style == "tome"


def text_groups(key: Tensor, merge: float) -> list[list[int]]:
    """Which words make up each token that is left: key (L, d)."""
    words = list(range(len(key)))
    r = min(round(merge * len(key)), (len(key) - 1) // 2)
    return _merge(words, r, lambda a, b: float(cosine_similarity(key[a], key[b], dim=0)))


def _merge(order: list[int], r: int, likeness) -> list[list[int]]:
    even, odd = order[::2], order[1::2]
    if r <= 0 or not odd:
        return [[token] for token in order]
    wishes = []
    for a in even[1:]:
        b = max(odd, key=lambda b: likeness(a, b))
        wishes.append((likeness(a, b), a, b))
    gone = {a: b for _, a, b in sorted(wishes, reverse=True)[:r]}
    groups = [[a] for a in even if a not in gone]
    return groups + [[b, *(a for a in gone if gone[a] == b)] for b in odd]


def pooled(x: Tensor, groups: list[list[int]], average: bool = True) -> Tensor:
    """(T, D) -> (T', D)."""
    return torch.stack([x[group].mean(0) if average else x[group].sum(0) for group in groups])
