"""The short lane: between the stages of a method the hidden states stay short, and the frame is laid out on demand.

A layer hands on a `LazyFrame`: a tensor of the frame's shape that holds nothing but the rows that ran. The next layer
takes the rows; whoever else touches it (DeepStack, a hook, an operation of the decoder's own) is given the frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ...reduction import UnsupportedError
from .frame import ActiveSet, put_rows

__all__ = ["LazyFrame", "laid_out", "short_rows"]

_FACTS = {
    getattr(Tensor, name).__get__
    for name in (
        "shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "is_cuda", "is_mps", "is_xpu", "is_sparse",
        "is_meta", "is_quantized", "requires_grad",
    )
}  # fmt: skip
_FACTS |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.__len__}
_FACTS |= {Tensor.is_floating_point, Tensor.is_complex}
"""What is answered without the frame."""
_BY_NUMBER = {
    Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul, Tensor.div, Tensor.__truediv__, torch.div, Tensor.tanh,
    torch.tanh, Tensor.float,
}  # fmt: skip
"""What decoders do to logits (scale, soft cap, float32), to each by itself: the rows stay short."""


class LazyFrame(Tensor):
    """A frame (B, S, ...) of which only the rows that ran are there.

    Attributes:
        rows: (B, n, ...), fillers included.
        active: where they stand.
        full: the frame, once somebody has looked at it; from then on it counts, changes in place included.
    """

    rows: Tensor
    active: ActiveSet
    full: Tensor | None
    _others: Tensor | Callable[[], Tensor]
    _graph: bool

    @staticmethod
    def __new__(cls, rows: Tensor, active: ActiveSet, base: Tensor | Callable[[], Tensor]) -> LazyFrame:
        return cls._of(rows, active, base, leaf=rows.requires_grad)

    @classmethod
    def _of(cls, rows: Tensor, active: ActiveSet, base: Tensor | Callable[[], Tensor], leaf: bool) -> Any:
        shape = (*active.keep.shape, *rows.shape[2:])
        # A wrapper without memory of its own: what goes round Python fails, it cannot read rubbish.
        frame = Tensor._make_wrapper_subclass(cls, shape, dtype=rows.dtype, device=rows.device, requires_grad=leaf)
        frame.__dict__.update(rows=rows, active=active, full=None, _others=base, _graph=torch.is_grad_enabled())
        if leaf:
            with torch._C.DisableTorchFunctionSubclass():
                frame.register_hook(_lost)
        return frame

    @contextmanager
    def _as_made(self) -> Iterator[None]:
        """The modes in which the frame was made, whoever looks at it when."""
        with torch.inference_mode(self.rows.is_inference()), torch.set_grad_enabled(self._graph):
            yield

    @property
    def base(self) -> Tensor:
        """What the other slots hold, (B, S, ...)."""
        if not isinstance(self._others, Tensor):
            with self._as_made():
                self._others = self._others()
        return self._others

    def lay_out(self) -> Tensor:
        """The frame, (B, S, ...), an ordinary tensor."""
        if self.full is None:
            base = self.base
            with self._as_made():
                self.full = put_rows(base, self.active, self.rows)
        return self.full

    def each_row(self, function: Callable[[Tensor], Tensor]) -> Any:
        """The same done to each row by itself."""
        return LazyFrame(function(self.rows), self.active, lambda: function(self.base))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, LazyFrame) and first.full is None:
            if function in _FACTS:
                with torch._C.DisableTorchFunctionSubclass():
                    return function(*args, **kwargs)
            if function is Tensor.__getitem__:
                part = _end_of(first, args[1])
                if part is not None:
                    return part
            numbers = not kwargs and all(isinstance(other, int | float) for other in args[1:])
            # Without a graph of its own, inside an autograd function, the result must be an ordinary tensor.
            alive = torch.is_grad_enabled() or not first.rows.requires_grad
            if function in _BY_NUMBER and numbers and alive:
                return first.each_row(lambda rows: function(rows, *args[1:]))
            if function is Tensor.to and _stays(first, args[1:], kwargs):
                return first
        args, kwargs = tree_map_only(LazyFrame, lambda frame: frame.lay_out(), (args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Reached by what does not ask `__torch_function__`."""
        args, kwargs = tree_map_only(LazyFrame, lambda frame: frame.lay_out(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _lost(gradient: Tensor) -> None:
    """A gradient arrives at a lazy frame itself: what it was given to did not ask `__torch_function__`."""
    raise UnsupportedError(
        "an autograd function (reentrant checkpointing around a layer is one) was handed the hidden states between two "
        "decoder layers as they are, so that gradients would be lost; use checkpointing with use_reentrant=False, or "
        "put a forward hook on the layer, which makes it hand on ordinary tensors"
    )


def _end_of(frame: LazyFrame, index: Any) -> Tensor | None:
    """`frame[:, -k:]` where all of it ran, and `frame[:, 0:]`; None: something else is asked for."""
    if not (isinstance(index, tuple) and len(index) >= 2 and all(isinstance(part, slice) for part in index)):
        return None
    everything = slice(None)
    tokens, others = index[1], (index[0], *index[2:])
    if any(part != everything for part in others) or tokens.stop is not None or tokens.step is not None:
        return None
    if not tokens.start and (tokens.start is None or isinstance(tokens.start, int)):
        return frame
    start = tokens.start
    if not isinstance(start, int) or not -frame.active.tail <= start < 0:
        return None
    return frame.rows[:, start:]


def _stays(frame: LazyFrame, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether `frame.to(...)` asks for the device and type that it has."""
    given = {type(value): value for value in (*args, *kwargs.values())}
    known = {torch.device: frame.rows.device, torch.dtype: frame.rows.dtype, bool: False, str: str(frame.rows.device)}
    return all(kind in known and value == known[kind] for kind, value in given.items())


def short_rows(value: Any, active: ActiveSet | None = None) -> Tensor | None:
    """The rows (B, n, ...) of a frame at which nobody has looked; None for anything else.

    Args:
        value: what was handed on.
        active: the slots that the rows must be of, None: any.
    """
    # An ordinary isinstance: nothing of it is asked of the tensor.
    if isinstance(value, LazyFrame) and value.full is None and (active is None or value.active is active):
        return value.rows
    return None


def laid_out(value: Any, but: str | None = None) -> Any:
    """The same with ordinary tensors in place of lazy frames, in containers, too, `but` for one name of an output."""
    if isinstance(value, LazyFrame):
        return value.lay_out()
    if isinstance(value, dict):  # outputs of models are dictionaries
        for name, part in list(value.items()):
            new = part if name == but else laid_out(part)
            if new is not part:
                value[name] = new
        return value
    if type(value) in (tuple, list):
        new = [laid_out(part) for part in value]
        return value if all(a is b for a, b in zip(new, value)) else type(value)(new)
    return value
