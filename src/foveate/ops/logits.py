"""Logits that are no numbers: whether a row of them has a softmax at all."""

from __future__ import annotations

from torch import Tensor

__all__ = ["has_softmax"]


def has_softmax(logits: Tensor) -> Tensor:
    """(..., V) -> (...) bool: whether the softmax exists.

    It does not where a logit is NaN or +inf, or where all are -inf. Single -inf logits are tokens that were ruled out.
    """
    return logits.float().logsumexp(-1).isfinite()
