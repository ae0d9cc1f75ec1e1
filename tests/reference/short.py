"""The meaning of "exact" where a layer has no keys to hide: it runs on the shorter sequence, one row at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.masked import MaskedReference

__all__ = ["ShortReference"]

_RECURRENT = ("linear_attn", "conv", "mamba")


class ShortReference(MaskedReference):
    """Attention does not look at removed tokens; a recurrent layer is handed what is left. One row without padding.

    Args:
        model: unpatched.
        removed: {stage: (1, S) bool}.
    """

    def __init__(self, model: nn.Module, removed: Mapping[int, Tensor]):
        super().__init__(model, removed)
        self._whole: Tensor | None = None

    def _is_recurrent(self, layer: int) -> bool:
        module: Any = self.layers[layer]
        kind = getattr(module, "block_type", None)
        return kind == "linear_attention" or any(hasattr(module, name) for name in _RECURRENT)

    def _before(self, layer: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        args, changed = super()._before(layer, args, kwargs)
        gone = self._gone(layer)
        if not self._is_recurrent(layer):
            return args, changed
        changed = {**kwargs, "attention_mask": None}  # a single row without padding
        left = self._left(args[0], gone)
        if left is not None:
            self._whole, args = args[0], (args[0][:, left], *args[1:])
        return args, changed

    def _after(self, layer: int, output: Any) -> Any:
        if self._whole is None:
            return super()._after(layer, output)
        whole, self._whole = self._whole.clone(), None
        whole[:, self._left(whole, self._gone(layer))] = output
        return whole

    def _left(self, hidden: Tensor, gone: Tensor | None) -> Tensor | None:
        """Slots of a prompt that are left, None where all are; what follows the prompt is never removed."""
        if gone is None or hidden.shape[1] == 1 or self._past:
            return None
        kept = torch.ones(hidden.shape[1], dtype=torch.bool)
        kept[: gone.shape[1]] = ~gone[0, : hidden.shape[1]]
        return kept.nonzero()[:, 0]
