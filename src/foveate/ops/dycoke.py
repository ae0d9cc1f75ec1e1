"""DyCoke's temporal merging: which frame each frame is compared with.

Source: arXiv 2411.15024; KD-TAO/DyCoke @ dd746349 (re-implemented from the formulas).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from .host import to_device

__all__ = ["WINDOW", "partners", "similarity"]

WINDOW = 4
"""Frames of a window; its first one stays whole."""


def partners(frames: int) -> list[int]:
    """The frame with which each frame is compared; itself, if it stays whole.

    In a window of four the second is compared with the first, the fourth with the third, the third with the first.
    """
    return [t - (0, 1, 2, 1)[t % WINDOW] for t in range(frames)]


def similarity(x: Tensor, valid: Tensor) -> Tensor:
    """Cosine of every token to the one at its place in the partner frame: (V, T, P); -2 where there is none.

    Args:
        x: (V, T, P, C) float.
        valid: (V, T, P) bool.
    """
    other = to_device(partners(x.shape[1]), x.device)
    units = normalize(x, dim=-1)
    return (units * units[:, other]).sum(-1).masked_fill(~valid[:, other], -2.0)
