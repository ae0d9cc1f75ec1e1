"""What a run asks of a device: the kernels it launches, and how often the host waits. Counted without a device, too.

A kernel is a dispatched operation that computes or copies: not a view, an allocation or a question about a shape. A
device may launch several for one of them (a sort), or none (a compiler fused two). A wait is a moment at which the host
cannot go on before the device is done: a number is read (`item`, `bool`), a shape depends on data (`nonzero`, a mask as
an index), or memory is copied from one to the other. Only a copy to the device with `non_blocking=True` is no wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..engine.apply import apply
from ..reduction import Decision, Reducer, View, bind

__all__ = ["Launches", "launches_of_choosing"]

_FREE = {
    "alias", "detach", "empty", "empty_like", "empty_strided", "is_same_size", "lift_fresh", "new_empty",
    "new_empty_strided", "resize_", "scalar_tensor", "set_", "_local_scalar_dense", "_reshape_alias", "_unsafe_view",
}  # fmt: skip
"""Operations that launch nothing, beside views."""
_WAITING = {"_local_scalar_dense", "_unique2", "equal", "is_nonzero", "masked_select", "nonzero", "repeat_interleave",
            "unique_consecutive", "unique_dim"}  # fmt: skip
"""Operations whose result, or its shape, the host must wait for."""
_READS = {"tolist", "cpu", "numpy", "__array__"}
"""Methods that copy to the host, on a CPU without an operation of their own."""
_MOVES = {"to", "cuda", "tensor", "as_tensor", *_READS}


class Launches:
    """Counts, within a `with` block and one thread, what is asked of a device.

    Args:
        device: the type of the device, such as "cuda"; work on other tensors is not counted. None: every tensor counts,
            as if all were on a device. Copies between the host and it then show only where a method says so (`cpu`,
            `tolist`, `numpy`), and host arithmetic in torch counts as kernels.

    Attributes:
        kernels: how many, by operation.
        waits: how many, by operation.
    """

    def __init__(self, device: str | None = None):
        self._device = None if device is None else torch.device(device).type
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._modes: list[ExitStack] = []
        self._moving = False

    def __enter__(self) -> Launches:
        stack = ExitStack()
        stack.enter_context(_Operations(self))
        stack.enter_context(_Methods(self))
        self._modes.append(stack)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._modes.pop().__exit__(*exception)

    def _counts(self, values: Any) -> bool:
        tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
        return self._device is None or any(tensor.device.type == self._device for tensor in tensors)

    def _moved(self, name: str, source: Any, result: Any, non_blocking: bool) -> None:
        """A tensor was copied, or handed to Python; `source` is a tensor, or what a tensor was made of."""
        if name in _READS:
            self.waits[name] += self._counts(source)
            return
        before = source.device if isinstance(source, Tensor) else torch.device("cpu")
        if result is source or not self._counts((source, result)):
            return
        if before == result.device:
            self.kernels[name] += isinstance(source, Tensor)
            return
        self.kernels["copy"] += 1
        if result.device.type == "cpu" or (before.type == "cpu" and not non_blocking):
            self.waits[name] += 1


class _Methods(TorchFunctionMode):
    """Sees the methods that copy between host and device."""

    def __init__(self, launches: Launches):
        super().__init__()
        self.launches = launches

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if name not in _MOVES or not args:
            return function(*args, **kwargs)
        launches, outer = self.launches, self.launches._moving
        launches._moving = True  # what runs inside is the copy itself
        try:
            result = function(*args, **kwargs)
        finally:
            launches._moving = outer
        if not outer:
            launches._moved(name, args[0], result, bool(kwargs.get("non_blocking")))
        return result


class _Operations(TorchDispatchMode):
    """Sees every operation."""

    def __init__(self, launches: Launches):
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        launches, name = self.launches, function.overloadpacket.__name__
        if launches._moving or not launches._counts((args, kwargs, result)):
            return result
        if name in _WAITING or (name.startswith("index") and _has_mask(args)):
            launches.waits[name] += 1
        computes = any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))
        if computes and not function.is_view and name not in _FREE:
            launches.kernels[name] += 1
        return result


def _has_mask(args: tuple) -> bool:
    """Whether a tensor is indexed with a mask, which must be counted first."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)


# ----------------------------------------------------------------------------------------------------- of a method
class _Watched(Reducer):
    """A method, and what it said at each of its stages."""

    def __init__(self, method: Reducer):
        self._method = method
        self.said: list[Decision | None] = []

    def prepare(self, anatomy: Any) -> None:
        self._method = bind(self._method, anatomy)
        for name in ("stages", "taps", "vision_taps", "tower", "positions"):
            setattr(self, name, getattr(self._method, name))

    def decide(self, view: View) -> Decision | None:
        decision = self._method.decide(view)
        self.said.append(None if decision is None else replace(decision))
        return decision


class _Repeated(Reducer):
    """Says what a method has said, without looking."""

    def __init__(self, method: Reducer, said: list[Decision | None]):
        self.stages, self.positions, self._said = method.stages, method.positions, said

    def decide(self, view: View) -> Decision | None:
        decision = self._said.pop(0)
        return None if decision is None else replace(decision)


def launches_of_choosing(
    model: nn.Module, reducer: Reducer, prefill: Callable[[], Any], *, visual: Tensor | None = None,
    device: str | None = None,
) -> Launches:  # fmt: skip
    """What a method asks of the device in order to choose: a prefill, less one in which its decisions are given.

    So it counts what the method reads in the vision tower and in the decoder, where patches stand in the prompt if it
    asks for that, and its decisions; it does not count their execution. What is found out once in a session does not
    count: the first prefill is not the one that is counted.

    Args:
        model: as for `foveate.apply`.
        reducer: the method.
        prefill: runs the model on a prompt.
        visual: as for `foveate.apply`.
        device: as for `Launches`.
    """
    watched = _Watched(reducer)
    with apply(model, watched, visual=visual) as session:
        prefill()
        watched.said.clear()
        with Launches(device) as found:
            prefill()
        bound: Any = session.reducer
    repeated = _Repeated(bound, [*watched.said, *watched.said])
    with apply(model, repeated, visual=visual):
        prefill()
        with Launches(device) as rest:
            prefill()
    found.kernels.subtract(rest.kernels)
    found.waits.subtract(rest.waits)
    return found
