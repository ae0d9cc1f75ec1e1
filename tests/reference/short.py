"""The meaning of "exact" where a layer has no keys to hide: it runs on the shorter sequence, one row at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foveate.engine.families.parts import resolve
from tests.reference.masked import MaskedReference

__all__ = ["ShortReference", "is_recurrent"]

_RECURRENT = ("linear_attn", "conv", "mamba")


def _recurs(layer: Any) -> bool:
    kind = getattr(layer, "block_type", None)
    return kind == "linear_attention" or any(hasattr(layer, name) for name in _RECURRENT)


def is_recurrent(model: nn.Module) -> bool:
    """Whether a layer of the decoder has a state, which no mask hides a token from."""
    return any(map(_recurs, resolve(model, text_only=True).layers))


class ShortReference(MaskedReference):
    """Attention does not look at removed tokens; a recurrent layer is handed what is left. One row without padding.

    Args:
        model: unpatched.
        removed: {stage: (1, S) bool}.
        merge: as of `MaskedReference`.
    """

    def __init__(
        self,
        model: nn.Module,
        removed: Mapping[int, Tensor],
        merge: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    ):
        super().__init__(model, removed, merge)
        self._whole: Tensor | None = None

    def _before(self, layer: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        args, changed = super()._before(layer, args, kwargs)
        gone = self._gone(layer)
        if not _recurs(self.layers[layer]):
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
        return self._merged(layer, whole)

    def _left(self, hidden: Tensor, gone: Tensor | None) -> Tensor | None:
        """Slots of a prompt that are left, None where all are; what follows the prompt is never removed."""
        if gone is None or hidden.shape[1] == 1 or self._past:
            return None
        kept = torch.ones(hidden.shape[1], dtype=torch.bool)
        kept[: gone.shape[1]] = ~gone[0, : hidden.shape[1]]
        return kept.nonzero()[:, 0]
