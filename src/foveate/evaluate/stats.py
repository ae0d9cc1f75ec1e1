"""How sure a number is: bootstrap intervals and paired tests, with questions about one image drawn together.

Everything is seeded, so the same answers give the same interval. numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

__all__ = ["Clusters", "holm"]

Array = np.ndarray

_RESAMPLES = 2000
_FLIPS = 9999
_ENUMERATED = 12  # up to 2^12 sign patterns are all looked at


class Clusters:
    """Samples that are not independent of each other: questions about the same image.

    Args:
        keys: one for each sample; equal keys belong together.
        level: of the intervals.
        seed: of the draws.
    """

    def __init__(self, keys: Sequence[Hashable], level: float = 0.95, seed: int = 0):
        numbers: dict[Hashable, int] = {}
        self.index = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
        self.count, self.level, self.seed = len(numbers), level, seed
        self.sizes = self._sums(np.ones(len(self.index)))
        self._drawn: Array | None = None
        self._signs: Array | None = None

    def _sums(self, values: Array) -> Array:
        return np.bincount(self.index, weights=values, minlength=self.count)

    def interval(self, values: Array) -> list[float]:
        """Percentile bootstrap of the mean of `values` (samples,): [low, high]. Clusters are drawn, not samples."""
        if self._drawn is None:
            rng = np.random.default_rng(self.seed)
            self._drawn = rng.multinomial(self.count, np.full(self.count, 1 / self.count), size=_RESAMPLES)
        means = (self._drawn @ self._sums(values)) / (self._drawn @ self.sizes)
        tail = (1 - self.level) / 2
        return [float(each) for each in np.quantile(means, [tail, 1 - tail])]

    def paired(self, ours: Array, theirs: Array) -> float:
        """Two-sided p of the hypothesis that the paired scores of two methods (samples,) are exchangeable.

        The differences of whole clusters change sign at random. Where all that differ weigh the same, as right against
        wrong with one question per image, this is McNemar's exact test; with few clusters all patterns are looked at,
        otherwise 9,999 of them.
        """
        sums = self._sums(ours - theirs)
        if not np.isfinite(sums).all():
            raise ValueError("scores that are no numbers cannot be compared")
        sums = sums[np.abs(sums) > 1e-12]
        if not len(sums):
            return 1.0
        if np.allclose(np.abs(sums), abs(sums[0])):
            return _sign_test(int((sums > 0).sum()), len(sums))
        observed = abs(sums.sum()) - 1e-9
        if len(sums) <= _ENUMERATED:
            patterns = 1 - 2.0 * ((np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1)
            return float((np.abs(patterns @ sums) >= observed).mean())
        if self._signs is None:
            rng = np.random.default_rng(self.seed + 1)
            self._signs = 1 - 2 * rng.integers(0, 2, size=(_FLIPS, self.count)).astype(np.float32)
        drawn = self._signs[:, : len(sums)] @ sums
        return float((1 + (np.abs(drawn) >= observed).sum()) / (1 + _FLIPS))


def _sign_test(wins: int, count: int) -> float:
    """Exact two-sided binomial test of `wins` in `count` fair draws."""
    tail = sum(math.comb(count, k) for k in range(min(wins, count - wins) + 1))
    return min(1.0, 2 * tail / 2**count)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the share of false alarms among all of them stays bounded."""
    order = np.argsort(p_values)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
