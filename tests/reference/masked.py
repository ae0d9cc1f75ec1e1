"""The unpatched model that never looks at a removed token: the meaning of "exact"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from foveate.engine.families.layers import positional_names
from foveate.engine.families.parts import resolve

__all__ = ["MaskedReference", "to_rows"]


def to_rows(mask: Tensor, rows: int) -> Tensor:
    """Repeat a (B, ...) tensor for beams: (rows, ...)."""
    return mask.repeat_interleave(rows // mask.shape[0], 0)


class MaskedReference:
    """Nothing is taken away; in the layers after a stage no query may attend to what the stage removed.

    Works on any decoder layer that is handed an `attention_mask`, in prefill and decode, with SDPA and eager attention.

    Args:
        model: unpatched.
        removed: {stage: (B, T) bool}; T counts from the start of the KV cache.
        merge: {stage: function of the hidden states (B, S, D) that returns new ones}; called in the prefill only.
    """

    def __init__(
        self,
        model: nn.Module,
        removed: Mapping[int, Tensor],
        merge: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    ):
        self.layers = resolve(model, text_only=True).layers
        self.removed = dict(removed)
        self.merge = dict(merge or {})
        self._handles: list[Any] = []
        self._past = self._total = self._stored = 0

    def __enter__(self) -> MaskedReference:
        for i, layer in enumerate(self.layers):

            def enter(module: nn.Module, args: tuple, kwargs: dict, i: int = i) -> tuple[tuple, dict]:
                return self._before(i, args, kwargs)

            def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any, i: int = i) -> Any:
                cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
                self._stored = 0 if cache is None else cache.get_seq_length()
                return self._after(i, output)

            self._handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(leave, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _tokens_of(self, hidden: Tensor) -> int:
        return hidden.shape[1 if hasattr(self.layers[0], "attn_hc") else -2]  # (B, S, streams, D)

    @staticmethod
    def _pinned(layer: int, kwargs: dict) -> int:
        """Slots of the prompt that stay in front of a mask whose window slides behind them (Unlimited-OCR)."""
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        stored = [] if cache is None else cache.layers[layer : layer + 1]  # older caches have none for shared keys
        return getattr(stored[0], "prefill_length", None) or 0 if stored else 0

    def _merged(self, stage: int, hidden: Tensor) -> Tensor:
        is_prefill = self._tokens_of(hidden) > 1
        return self.merge[stage](hidden) if stage in self.merge and is_prefill else hidden

    def _before(self, layer: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = {**dict(zip(positional_names(self.layers[layer], len(args) - 1), args[1:])), **kwargs}
        args = args[:1]
        hidden = args[0]
        if layer == 0:
            cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
            stored = 0 if cache is None else cache.get_seq_length()
            self._past = self._total - max(0, self._stored - stored) if stored else 0  # cropped between two passes
            self._total = self._past + self._tokens_of(hidden)
            hidden = self._merged(-1, hidden)
        return self._handed(layer, hidden, kwargs)

    def _handed(self, layer: int, hidden: Tensor, kwargs: dict) -> tuple[tuple, dict]:
        """What a layer is called with."""
        gone = self._gone(layer)
        if gone is not None:
            kwargs = {**kwargs, "attention_mask": self._blind(layer, hidden, gone, kwargs)}
        return (hidden,), kwargs

    def _after(self, layer: int, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self._merged(layer, output[0]), *output[1:])
        return self._merged(layer, output)

    def _gone(self, layer: int) -> Tensor | None:
        """Everything removed by the stages before a layer."""
        gone = None
        for stage, removed in self.removed.items():
            if stage < layer:
                gone = removed if gone is None else gone | removed
        return gone

    def _blind(self, layer: int, hidden: Tensor, gone: Tensor, kwargs: dict) -> Tensor:
        """The layer's mask with the columns of removed tokens closed."""
        rows, n_queries = hidden.shape[-3:-1]
        total = self._total
        past = total - n_queries  # fewer queries than tokens where a decoder cuts them to those whose logits are wanted
        mask = kwargs.get("attention_mask")
        if mask is None:  # transformers leaves a plainly causal mask, within all windows, to the kernel
            mask = torch.arange(total) <= torch.arange(past, total)[:, None]
            mask = mask[None, None]
        columns = torch.arange(total - mask.shape[-1], total)
        pinned = self._pinned(layer, kwargs)
        columns = torch.where(torch.arange(len(columns)) < pinned, columns - (total - mask.shape[-1]), columns)
        known = torch.zeros(rows, total, dtype=torch.bool)
        known[:, : gone.shape[1]] = to_rows(gone, rows)[:, :total]
        closed = known[:, columns][:, None, None]
        mask = mask.expand(rows, -1, -1, -1)
        if mask.dtype != torch.bool:
            return mask.masked_fill(closed, torch.finfo(mask.dtype).min)
        mask = mask & ~closed
        return mask | ~mask.any(-1, keepdim=True)  # a query that sees nothing is removed or padding: avoid NaN
