"""How far a reduced model's next-token distribution is from the full model's."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["next_token_divergence"]


def next_token_divergence(reduced_logits: Tensor, full_logits: Tensor) -> Tensor:
    """KL(p_reduced || p_full) in nats, in float32.

    This direction, reduced distribution first, is that of VTW's code (lzhxmu/VTW @ a3d8cfc3; its paper says "between").

    Args:
        reduced_logits: (..., V).
        full_logits: (..., V), of a shape that broadcasts with the first.

    Returns:
        (...) float32; tokens that the reduced model rules out altogether count nothing. NaN where one of the two has
        no distribution (`ops.logits.has_softmax`).
    """
    reduced, full = reduced_logits.float().log_softmax(-1), full_logits.float().log_softmax(-1)
    probability = reduced.exp()
    return torch.where(probability == 0, 0.0, probability * (reduced - full)).sum(-1)
