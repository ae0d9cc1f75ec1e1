"""Logits of the rows that are left, in the shape of the whole prompt: 0 where a token was removed.

They are the largest tensor of a training step. The loss takes their rows; whoever else touches them is given all.
Gradients pass through them either way, so that hooks and `torch.autograd.grad` see what they see in the plain model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .frame import ActiveSet, take_rows
from .lane import LazyFrame, laid_out, short_rows

__all__ = ["LazyLogits", "rows_of"]

_OF_THE_GRAPH = {Tensor.register_hook, Tensor.retain_grad, torch.autograd.grad} | {
    getattr(Tensor, name).__get__ for name in ("grad", "grad_fn", "is_leaf", "retains_grad")
}
"""What is asked of the logits themselves, laid out or not."""


class LazyLogits(LazyFrame):
    """(B, S, V), of which only the rows (B, n, V) that ran are there."""

    @staticmethod
    def __new__(cls, rows: Tensor, active: ActiveSet) -> LazyLogits:
        shape = (*active.keep.shape, *rows.shape[2:])
        return cls._of(rows, active, lambda: rows.new_zeros(shape), leaf=False)

    @staticmethod
    def of(rows: Tensor, active: ActiveSet) -> Tensor:
        """With the graph of their rows."""
        if torch._C._are_functorch_transforms_active():  # torch.func takes no autograd function as it is
            return LazyLogits(rows, active).lay_out()
        if torch.is_grad_enabled() and rows.requires_grad:
            return _Whole.apply(rows, active)
        return LazyLogits(rows, active)

    @property
    def in_graph(self) -> bool:
        """Whether gradients pass through them."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.grad_fn is not None

    def lay_out(self) -> Tensor:
        """All of them, an ordinary tensor."""
        if self.full is None and self.in_graph:
            with torch.enable_grad():
                self.full = _LaidOut.apply(self)
        return super().lay_out()

    def each_row(self, function: Any) -> Any:
        """The same done to each row by itself, which leaves 0 as it is."""
        return LazyLogits.of(function(rows_of(self)), self.active)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in _OF_THE_GRAPH:
            with torch._C.DisableTorchFunctionSubclass():
                return laid_out(function(*args, **(kwargs or {})))
        return super().__torch_function__(function, types, args, kwargs)


def rows_of(logits: Any) -> Tensor:
    """(B, n, V) rows of a frame at which nobody has looked, whose gradient passes through it if it is of logits."""
    return _Rows.apply(logits) if isinstance(logits, LazyLogits) and logits.in_graph else logits.rows


class _Whole(Function):
    """Rows -> logits."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, active: ActiveSet) -> LazyLogits:
        ctx.active = active
        return LazyLogits(rows, active)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        active, rows = ctx.active, short_rows(gradient, ctx.active)
        if rows is None:
            rows = take_rows(laid_out(gradient), active)
            if active.valid is not None:  # a filler stands at the slot of another token
                rows = rows * active.valid[..., None].to(rows)
        return rows, None


class _Rows(Function):
    """Logits -> rows."""

    @staticmethod
    def forward(ctx: Any, logits: LazyLogits) -> Tensor:
        ctx.active = logits.active
        return logits.rows.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> LazyLogits:
        return LazyLogits(gradient, ctx.active)


class _LaidOut(Function):
    """Logits -> an ordinary tensor."""

    @staticmethod
    def forward(ctx: Any, logits: LazyLogits) -> Tensor:
        return LazyFrame.lay_out(logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
