"""The last norm, the head and the loss on the rows that are left: nobody asks what a removed token would say next."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.loss.loss_utils import ForCausalLMLoss

from ..families.parts import Anatomy
from ..undo import Shared, Undo
from .call import Call
from .hooks import PassingHooks
from .lane import LazyFrame, short_rows
from .logits import LazyLogits, rows_of

__all__ = ["Ends"]


class Ends(Shared):
    """Of one model. Logits of removed slots are 0; what the norm makes of them is computed if somebody looks.

    Args:
        undo: takes everything out.
        anatomy: of the model.
        call: gives the state of the calling thread.
    """

    def __init__(self, undo: Undo, anatomy: Anatomy, call: Callable[[], Call]):
        norm, head = getattr(anatomy.decoder, "norm", None), anatomy.model.get_output_embeddings()
        self._head, self._call = head, call
        self._hooks = PassingHooks(undo, [m for m in (norm, head) if m is not None], self._before, self._after)
        self.put_in, self.take_out = self._hooks.put_in, self._hooks.take_out
        if getattr(anatomy.model, "loss_function", None) is ForCausalLMLoss:
            undo.set(anatomy.model, "_loss_function", _loss)

    def _before(self, number: int, module: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> Any:
        rows = short_rows(args[0]) if args and kwargs is not None else None
        self._call().short[number] = None if rows is None else args[0]
        return None if rows is None else ((rows, *args[1:]), kwargs)

    def _after(self, number: int, module: nn.Module, args: tuple, output: Any) -> Any:
        frame = self._call().short.pop(number, None)
        if frame is None:
            return None
        if module is self._head:
            return LazyLogits.of(output, frame.active)
        return LazyFrame(output, frame.active, lambda: module.forward(frame.base))


@functools.wraps(ForCausalLMLoss)
def _loss(logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Any:
    """transformers' loss of the rows that are left; a row that predicts a label always is."""
    rows = short_rows(logits)
    if rows is None or labels is None or kwargs.get("shift_labels") is not None or labels.shape != logits.shape[:2]:
        return ForCausalLMLoss(logits, labels, *args, **kwargs)
    active, ignored = logits.active, kwargs.get("ignore_index", -100)  # type: ignore[attr-defined]
    index = active.index.to(labels.device)
    shifted = pad(labels, (0, 1), value=ignored)[:, 1:].gather(1, index)
    if active.valid is not None:
        shifted = shifted.masked_fill(~active.valid.to(labels.device), ignored)
    return ForCausalLMLoss(rows_of(logits), labels, *args, **{**kwargs, "shift_labels": shifted})
