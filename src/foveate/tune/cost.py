"""What a prefill costs, and what of it a search really computes where it shares the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from ..engine.trace import Trace
from ..measure import prefill_flops
from ..reduction import UnsupportedError

__all__ = ["Bill", "bill"]


class Bill(NamedTuple):
    """FLOPs of a prefill, all rows of the batch together.

    Where they cannot be worked out (mixtures of experts, unusual towers), tokens entering a decoder layer, summed over
    the layers, stand in for the whole; ratios of two bills of one model mean the same either way.
    """

    total: float
    tower: float
    layers: float
    """Decoder layers, without the head."""


def bill(model: nn.Module, trace: Trace, inputs: Mapping[str, Any]) -> Bill:
    """The bill of a prefill.

    Args:
        trace: of the prefill.
        inputs: what the model was called with.
    """
    try:
        flops = prefill_flops(model, trace, inputs, fillers=False)
    except (UnsupportedError, ValueError):
        tokens = float(sum(int(trace.active(layer - 1).sum()) for layer in range(trace.n_layers)))
        return Bill(tokens, 0.0, tokens)
    return Bill(float(flops.total), float(flops.vision), float(flops.decoder))
