"""How many answers a setting changes, from few questions: a point estimate and an upper confidence bound.

Counting is too blunt: none of 64 changed only says "fewer than 4.6 %" at 95 %. But each question i tells more than yes
or no. The full model is ahead of its closest rival by a margin m_i, the reduction takes a loss d_i = m_i - g_i of it
(negative: it adds to it), and the answer changes where d_i > m_i. Nearly all questions survive by a distance, and how
margins and losses are spread says how many others would not. So every margin is tried against every loss:

* **Pairs.** The share is the mean over i and j of [d_j > m_i], n^2 pairs in place of n (a V-statistic). The assumption
  is that loss and margin are independent. They are not: where the model is unsure, the image is hard and the loss
  larger (rank correlation about -0.2 on `zoo:tiny-llava`). So only questions of similar margin lend each other their
  losses, a quarter of the sample to either side; assumed is only that losses are exchangeable among these.
* **Smoothing.** A loss stands for a Laplace distribution around itself, scale half the mean |d|, so that what just did
  not cross counts a little. It makes the estimate higher by a tenth or so.
* **The unseen.** The bootstrap knows no question harder than the hardest it has seen, so half a made-up one is put
  among them: half the smallest margin, and the largest loss. On a sample it weighs about 1 / 2n. This is what makes the
  bound hold where a sample happens to hold no hard question; it is also why tight bounds need a model that is sure.
* **The bound** is the quantile of the share over bootstrap samples of the questions; the observed changes take part, as
  pairs of each question with itself. It is never below the share observed, nor below half a question of those asked:
  rare outliers leave no trace in the others (without this, 95 % bounds on easy-VQA held in 77 % of the cases, all
  failures far below 1 %). So a bound of 1 % takes 50 questions at least.

`benchmarks/tune.py` holds it against the truth: how often the bound is above the changed share of all questions, and
how often the cheapest setting within a limit breaks it. Of 33 settings, each bounded at 95 %, the choice broke limits
of 1 to 5 % in up to 12 % of the draws (28 % in the worst case), each bounded at 99 % in up to 7 %: so each is bounded
at a fifth of the doubt that is asked for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reduction import OptionError

__all__ = ["Bounds", "Estimate", "binomial_interval", "changed_share", "estimate", "finest", "refuted"]

_RESAMPLES = 2000
_REFUTED_AT = 0.01
_NEIGHBOURS = 4  # questions that lend each other their losses: to either side one in so many of the sample
_SMOOTHING = 0.5
_UNSEEN = 0.5
_LUCK = 5  # the cheapest of many that pass is a lucky one: each is asked to be so many times as sure
_LARGEST = 1e4  # a word that the reduced model rules out altogether


@dataclass(frozen=True)
class Bounds:
    """What is good enough.

    Attributes:
        max_changed: largest share of greedy answers that may differ from the full model's; None: any.
        max_divergence: largest mean KL(reduced || full) of the first answer token, nats; None: any.
        confidence: that the choice keeps to them.

    Raises:
        OptionError: no bound at all, or one that is no share, no divergence, no confidence.
    """

    max_changed: float | None = 0.01
    max_divergence: float | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.max_changed is None and self.max_divergence is None:
            raise OptionError("give max_changed, max_divergence or both")
        if self.max_changed is not None and not 0 <= self.max_changed < 1:
            raise OptionError(f"max-changed={self.max_changed}: give a share of answers from 0 to below 1")
        if self.max_divergence is not None and not 0 <= self.max_divergence < math.inf:
            raise OptionError(f"max-divergence={self.max_divergence}: give a number of nats from 0 on")
        if not 0.5 <= self.confidence < 1:
            raise OptionError(f"confidence={self.confidence}: give a number from 0.5 to below 1")


@dataclass(frozen=True)
class Estimate:
    """Share of changed answers and mean KL, with upper bounds; `excess` is the worse of them over what is allowed."""

    changed: float
    changed_upper: float
    kl: float
    kl_upper: float
    excess: float
    upper_excess: float


def estimate(margins: Sequence[float], gaps: Sequence[float], kl: Sequence[float], bounds: Bounds) -> Estimate:
    """Estimates and upper bounds of one candidate on the `n` samples it has seen."""
    confidence = 1 - (1 - bounds.confidence) / _LUCK
    changed, changed_upper = changed_share(torch.tensor(margins), torch.tensor(gaps), confidence)
    divergence, divergence_upper = _mean(torch.tensor(kl, dtype=torch.float64), confidence)
    return Estimate(
        changed,
        changed_upper,
        divergence,
        divergence_upper,
        max(_over(changed, bounds.max_changed), _over(divergence, bounds.max_divergence)),
        max(_over(changed_upper, bounds.max_changed), _over(divergence_upper, bounds.max_divergence)),
    )


def changed_share(margins: Tensor, gaps: Tensor, confidence: float = 0.95) -> tuple[float, float]:
    """Share of changed answers, and its upper confidence bound.

    Args:
        margins: (n,) of the full model.
        gaps: (n,) of the reduced one.
    """
    margins, losses = margins.double(), (margins.double() - gaps.double()).clamp(-_LARGEST, _LARGEST)
    counts = torch.ones(1, len(margins), dtype=torch.float64)
    share = float(_share(counts, *_pairs(margins, losses)))
    pairs = _pairs(torch.cat([margins, margins.amin()[None] / 2]), torch.cat([losses, losses.amax()[None]]))
    upper = _share(_draws(len(margins), _UNSEEN), *pairs).quantile(confidence)
    return share, max(float(upper), float((gaps < 0).double().mean()), finest(len(margins)))


def finest(n: int) -> float:
    """The smallest bound that `n` questions can show: half a changed answer."""
    return 0.5 / n


def binomial_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact two-sided interval of a share counted in `n` independent draws (Clopper and Pearson, 1934)."""
    tail = (1 - confidence) / 2
    low = _bisect(lambda share: 1 - _fewer(successes, n, share) < tail) if successes else 0.0
    high = _bisect(lambda share: _fewer(successes + 1, n, share) > tail) if successes < n else 1.0
    return low, high


def refuted(margins: Sequence[float], gaps: Sequence[float], kl: Sequence[float], bounds: Bounds) -> bool:
    """Whether a candidate that is good enough would have done so badly on these samples in one case of a hundred.

    NaN, and an infinite divergence where one is bounded, refute it at once.
    """
    n = len(gaps)
    if any(map(math.isnan, (*gaps, *kl))):
        return True
    if bounds.max_changed is not None:
        changed = sum(gap < 0 for gap in gaps)
        if changed and 1 - _fewer(changed, n, bounds.max_changed) < _REFUTED_AT:
            return True
    if bounds.max_divergence is not None and math.inf in kl:
        return True
    if bounds.max_divergence is not None and n >= 8:
        mean = sum(kl) / n
        spread = math.sqrt(sum((value - mean) ** 2 for value in kl) / (n - 1) / n)
        return mean - 2.5 * spread > bounds.max_divergence
    return False


# ------------------------------------------------------------------------------------------------------- statistics
def _pairs(margins: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """(n, n) each: whether the loss of question j may stand for that of i, and how probably it changes answer i."""
    order = margins.argsort().argsort()
    near = ((order[:, None] - order).abs() <= max(4, len(margins) // _NEIGHBOURS)).double()
    scale = (_SMOOTHING * losses.abs().mean()).clamp_min(1e-9)
    excess = (losses - margins[:, None]) / scale
    tail = 0.5 * excess.abs().neg().exp()
    changes = torch.where(excess > 0, 1 - tail, tail)
    seen = (losses > margins).double()
    return near, near * torch.maximum(changes, torch.diag(seen))


def _share(counts: Tensor, near: Tensor, changes: Tensor) -> Tensor:
    """(R,) share of changed answers where question i was drawn `counts` (R, n) times."""
    share = (counts @ changes.T) / (counts @ near.T).clamp_min(1e-12)
    return (counts * share).sum(1) / counts.sum(1)


@functools.cache
def _draws(n: int, unseen: float = 0.0) -> Tensor:
    """(R, n) how often each of n questions is drawn in n draws, R times; always the same ones.

    With `unseen`, (R, n + 1): one more, of that weight.
    """
    weights = torch.ones(n + (unseen > 0), dtype=torch.float64)
    weights[n:] = unseen
    generator = torch.Generator().manual_seed(n)
    picked = torch.multinomial(weights.expand(_RESAMPLES, -1), n, replacement=True, generator=generator)
    return torch.zeros(_RESAMPLES, len(weights), dtype=torch.float64).scatter_add(
        1, picked, torch.ones(picked.shape).double()
    )


def _mean(values: Tensor, confidence: float) -> tuple[float, float]:
    if not len(values):
        return math.nan, math.nan
    return float(values.mean()), float((_draws(len(values)) @ values / len(values)).quantile(confidence))


def _fewer(successes: int, n: int, share: float) -> float:
    """P(fewer than so many of n), each with probability `share`."""
    if not 0 < share < 1:
        return float(share == 0 and successes > 0)
    logs = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        + k * math.log(share) + (n - k) * math.log1p(-share)
        for k in range(successes)
    )  # fmt: skip
    return min(1.0, sum(map(math.exp, logs)))


def _bisect(below: Callable[[float], bool]) -> float:
    """The share in (0, 1) up to which `below` holds."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return (low + high) / 2


def _over(value: float, bound: float | None) -> float:
    if bound is None:
        return 0.0
    if math.isnan(value):
        return math.inf
    return value / bound if bound else (0.0 if value <= 0 else math.inf)
