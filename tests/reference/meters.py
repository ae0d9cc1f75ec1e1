"""Counters: floating-point operations, peak memory. What is launched and waited for: `foveate.measure.launches`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["flops", "peak_memory"]


def flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products, attention included."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def peak_memory(run: Callable[[], Any]) -> int:
    """Most bytes that were allocated at a time while `run` ran."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
