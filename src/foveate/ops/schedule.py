"""How many visual tokens SparseVLM leaves after which decoder layer. Whole numbers only: no tensor, no model.

Lives here: the official tables (LLaVA-1.5-7B: 576 tokens, 32 layers), and what they become at any depth and any number
of tokens, so that the paper's budget holds: the mean over all layers of the visual tokens left *after* each of them,
merged tokens included.

Source: Gumpest/SparseVLMs @ 26a5f488 (tables of 1.5 and 2.0) and @ b72c5d6 (rank rule); arXiv 2410.04417 (eq. 8).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

__all__ = [
    "COUNTS",
    "DEPTH",
    "LAYERS",
    "RANK_LAYERS",
    "RANK_RULE",
    "TOKENS",
    "Recycling",
    "kept_counts",
    "left_after",
    "mean_after",
    "needs_early_start",
    "paper_share",
    "rank_scale",
    "scaled_layers",
]

DEPTH, TOKENS = 32, 576
LAYERS = (2, 6, 15)
RANK_LAYERS = (2, 6, 15, 19)
COUNTS = {
    "1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
"""Tokens kept after layers 2, 6 and 15 for each official budget; merged tokens come on top."""
RANK_RULE = {192: (13.5, 0.0), 128: (9.0, 6.0), 64: (0.8, 0.0)}
"""Scale and bias of version 1.0 for each official budget."""


@dataclass(frozen=True)
class Recycling:
    """How many of the removed tokens are clustered, and into how many: shares tau and theta, each rounded down + 1.

    `guarded`: merged tokens never outnumber the kept ones, and nothing happens where it would save nothing.
    """

    tau: float = 0.3
    theta: float = 0.1
    guarded: bool = True

    def sizes(self, removed: int, kept: int) -> tuple[int, int]:
        """Candidates and clusters of `removed` tokens, where `kept` stay: (0, 0) of none."""
        if removed <= 0:
            return 0, 0
        pool = min(int(self.tau * removed) + 1, removed)
        clusters = min(int(self.theta * pool) + 1, pool)
        return pool, min(clusters, kept) if self.guarded else clusters

    def left(self, tokens: int, kept: int) -> int:
        """Tokens left of `tokens` when `kept` are kept."""
        return kept + self.sizes(tokens - kept, kept)[1]

    def kept_for(self, wanted: int, tokens: int) -> int:
        """Tokens of `tokens` to keep so that `wanted` are left, merged ones counted; at least one."""
        kept = wanted
        while kept > 1 and self.left(tokens, kept) > wanted:
            kept = max(1, kept - (self.left(tokens, kept) - wanted + 1) // 2)
        return kept


def scaled_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Layers of a 32-layer decoder at the same relative depth of another one."""
    return tuple(sorted({min(round(layer * depth / DEPTH), depth - 1) for layer in layers}))


def needs_early_start(share: float, layers: Sequence[int], depth: int) -> bool:
    """Whether the layers before the first removal would use up so much of the budget that it must come after layer 0.

    Args:
        share: budget / visual tokens.
        layers: of the removals.
        depth: decoder layers.
    """
    return layers[0] > 0 and share < 1.5 * layers[0] / depth


def left_after(
    tokens: int, layers: Sequence[int], keep: Callable[[int], int], recycling: Recycling | None
) -> list[int]:
    """Tokens left after each of `layers`, where of n tokens `keep(n)` are kept and some merged (if that saves any)."""
    left = []
    for _ in layers:
        kept = min(max(keep(tokens), 1), tokens)
        tokens = min(tokens, recycling.left(tokens, kept) if recycling else kept)
        left.append(tokens)
    return left


def mean_after(tokens: int, layers: Sequence[int], left: Sequence[float], depth: int) -> float:
    """Mean over all layers of the tokens left after each."""
    ends = [*layers[1:], depth]
    spent = layers[0] * tokens + sum(n * (end - layer) for n, layer, end in zip(left, layers, ends))
    return spent / depth


def _solve(mean: Callable[[float], float], target: float, low: float, high: float) -> float:
    """`x` in [low, high] for which the rising function `mean` comes nearest to `target` from below, to 2^-40."""
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) <= target else (low, middle)
    return low


# -------------------------------------------------------------------------------------------------- rules of the rank
@lru_cache(maxsize=4096)
def rank_scale(
    tokens: int, rank: int, bias: float, target: float, layers: tuple[int, ...], depth: int, recycling: Recycling | None
) -> float:
    """Scale of version 1.0, kept = rank * scale + bias, so that the mean after all layers is `target` (same rank)."""

    def mean(scale: float) -> float:
        left = left_after(tokens, layers, lambda n: int(min(rank, n) * scale + bias), recycling)
        return mean_after(tokens, layers, left, depth)

    return _solve(mean, target, 0.0, (tokens - min(bias, 0.0)) / max(rank, 1) + 1)


@lru_cache(maxsize=4096)
def paper_share(
    tokens: int, rank: int, target: float, layers: tuple[int, ...], depth: int, recycling: Recycling | None
) -> float:
    """lambda of the paper, removed = lambda * (Lv - rank), so that the mean after all layers is `target`."""

    def mean(rest: float) -> float:
        left = left_after(tokens, layers, lambda n: n - int((1 - rest) * (n - min(rank, n))), recycling)
        return mean_after(tokens, layers, left, depth)

    return 1 - _solve(mean, target, 0.0, 1.0)


# ---------------------------------------------------------------------------------------------------- fixed counts
@lru_cache(maxsize=4096)
def kept_counts(
    version: str, tokens: int, target: float, layers: tuple[int, ...], depth: int, recycling: Recycling | None
) -> tuple[int, ...]:
    """Tokens kept, merged ones not counted, after each of `layers` so that the mean after all layers is `target`.

    The proportions between the layers are those of the official table, interpolated between its budgets and over the
    depth; then all are scaled, and rounded so that the mean is met as nearly as whole tokens allow. 576 tokens on 32
    layers with an official budget give the official counts (whose means are 192.0, 128.6, 96.9 and 64.8 for "1.5").

    Args:
        version: "1.5" or "2.0", whose table it is.
        tokens: visual tokens at the start.
        target: mean after each layer. Where the layers before the first removal use up more, one token is kept.
        layers: ascending.
        depth: decoder layers.
        recycling: None without merged tokens.

    Returns:
        One count per layer, never more than are left there; as many as are left means that nothing is removed.
    """
    if target >= tokens:
        return (tokens,) * len(layers)
    own = recycling == (Recycling() if version == "1.5" else None)
    if own and (depth, layers, tokens) == (DEPTH, LAYERS, TOKENS) and round(target, 6) in COUNTS[version]:
        return COUNTS[version][round(target)]
    shape = [_share(version, target / tokens, layer / depth) for layer in layers]

    def left(scale: float) -> list[float]:
        return [min(tokens, max(1.0, scale * share * tokens)) for share in shape]

    scale = _solve(lambda x: mean_after(tokens, layers, left(x), depth), target, 0.0, 1 / shape[-1])
    kept, before = [], tokens
    for wanted in _rounded(tokens, layers, left(scale), depth, target, 2 if recycling else 1):
        stay = before if wanted >= before else recycling.kept_for(wanted, before) if recycling else wanted
        before = recycling.left(before, stay) if recycling else stay
        kept.append(stay)
    return tuple(kept)


@lru_cache(maxsize=4)
def _anchors(version: str) -> list[tuple[float, tuple[float, ...]]]:
    """Official (budget, tokens left after layers 2, 6 and 15), all as shares of 576; ascending, ending in (1, 1s)."""
    recycling = Recycling() if version == "1.5" else None
    found = []
    for budget, counts in sorted(COUNTS[version].items()):
        kept = iter(counts)
        left = left_after(TOKENS, LAYERS, lambda _: next(kept), recycling)  # noqa: B023
        found.append((budget / TOKENS, tuple(n / TOKENS for n in left)))
    return [*found, (1.0, (1.0,) * len(LAYERS))]


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Piecewise linear, constant beyond the ends."""
    if x <= xs[0]:
        return ys[0]
    for (x0, y0), (x1, y1) in zip(zip(xs, ys), zip(xs[1:], ys[1:])):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return ys[-1]


def _share(version: str, budget: float, depth: float) -> float:
    """Share of the tokens left at a relative depth, as the official tables have it for a budget."""
    anchors = _anchors(version)
    budgets = [anchor for anchor, _ in anchors]
    shares = [_interpolate(budget, budgets, [left[i] for _, left in anchors]) for i in range(len(LAYERS))]
    return _interpolate(depth, [layer / DEPTH for layer in LAYERS], shares)


def _rounded(
    tokens: int, layers: Sequence[int], left: Sequence[float], depth: int, target: float, least: int
) -> list[int]:
    """Whole, non-increasing counts near `left` whose mean after all layers is as near to `target` as possible."""
    counts = [max(round(n), min(least, tokens)) for n in left]
    spans = [end - layer for layer, end in zip(layers, [*layers[1:], depth])]
    # The longest span takes most of what is missing, the shorter ones the ever smaller rest.
    for i in sorted(range(len(layers)), key=lambda i: -spans[i]):
        missing = (target - mean_after(tokens, layers, counts, depth)) * depth
        highest = counts[i - 1] if i else tokens
        lowest = counts[i + 1] if i + 1 < len(counts) else min(least, tokens)
        counts[i] = max(lowest, min(highest, counts[i] + round(missing / spans[i])))
    return counts
