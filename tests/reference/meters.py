"""Counters: device synchronisations, floating-point operations, peak memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Syncs", "flops", "peak_memory"]

_WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "repeat_interleave", "_unique2"}
"""Operations whose result, or its shape, the host must wait for."""
_BY_HAND = ("tolist", "cpu", "numpy", "__array__")
"""Methods that copy to the host without an operation of their own on a CPU."""


class Syncs(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: `syncs.total`, by kind in `syncs.kinds`."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.kinds.values())

    def __enter__(self) -> Syncs:
        self._real = {name: getattr(Tensor, name) for name in _BY_HAND}
        for name, real in self._real.items():
            setattr(Tensor, name, self._counted(name, real))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        for name, real in self._real.items():
            setattr(Tensor, name, real)
        super().__exit__(*exception)

    def _counted(self, name: str, real: Callable) -> Callable:
        def method(*args: Any, **kwargs: Any) -> Any:
            self.kinds[name] += 1
            return real(*args, **kwargs)

        return method

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = function.overloadpacket.__name__
        if name in _WAITING or (name.startswith("index") and _has_mask(args)):
            self.kinds[name] += 1
        return function(*args, **(kwargs or {}))


def _has_mask(args: tuple) -> bool:
    """Whether a tensor is indexed with a mask, which must be counted first."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)


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
