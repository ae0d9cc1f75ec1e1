"""The meaning of "exact" where a layer has no keys to hide: it runs on the shorter sequence, one row at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Cache

from foveate.engine.families.parts import resolve
from tests.reference.masked import MaskedReference

__all__ = ["ShortReference", "is_recurrent"]

_RECURRENT = ("linear_attn", "conv", "mamba")
_KINDS = ("linear_attention", "indexed_attention")
"""Of layers that say their kind themselves: an index pools neighbours (GLM-5), so a hidden token would leave a hole."""


def _recurs(layer: Any) -> bool:
    return getattr(layer, "block_type", None) in _KINDS or any(hasattr(layer, name) for name in _RECURRENT)


def _convolves_beside_attention(layer: Any) -> bool:
    return hasattr(layer, "self_attn") and any("conv" in name for name, _ in layer.named_modules())


def _cut(value: Any, left: Tensor) -> Any:
    """A tensor (beams, S, ...) at some slots; anything else as it is."""
    follows = isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] > int(left[-1])
    return value[:, left] if follows else value


def is_recurrent(model: nn.Module) -> bool:
    """Whether a layer of the decoder has a state, which no mask hides a token from."""
    layers = resolve(model, text_only=True).layers
    return any(_recurs(layer) or _convolves_beside_attention(layer) for layer in layers)


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
        self._slots: dict[int, Tensor] = {}

    def _handed(self, layer: int, hidden: Tensor, kwargs: dict) -> tuple[tuple, dict]:
        module, gone = self.layers[layer], self._gone(layer)
        hybrid = _convolves_beside_attention(module) and not _recurs(module)
        if not _recurs(module) and not hybrid:
            return super()._handed(layer, hidden, kwargs)
        left = self._left(hidden, gone)
        if left is not None:
            self._whole = hidden
            kwargs = {name: value if name == "attention_mask" else _cut(value, left) for name, value in kwargs.items()}
            hidden = hidden[:, left]
        # A single row without padding.
        kwargs = {**kwargs, "conv_mask" if "conv_mask" in kwargs else "attention_mask": None}
        if getattr(module, "block_type", None) == "indexed_attention":
            kwargs["attention_mask"] = torch.ones(hidden.shape[:2], dtype=torch.bool)
        if hybrid:
            kwargs["attention_mask"] = self._own_mask(layer, hidden.shape[1], left, kwargs)
            if "relative_distance" in kwargs:  # transformers 5.24 computes it outside the layer
                stored = torch.arange(kwargs["attention_mask"].shape[-1])
                kwargs["relative_distance"] = stored[-hidden.shape[1] :, None] - stored
        return (hidden,), kwargs

    def _own_mask(self, layer: int, count: int, left: Tensor | None, kwargs: dict) -> Tensor:
        """Who sees whom among the keys that a layer holds, (1, 1, n, N) bool: causal, in its window of the prompt."""
        queries = torch.arange(self._past, self._total) if left is None else self._past + left
        stored = queries if not self._past else torch.cat([self._slots[layer], queries])
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        if cache is not None and cache.layers[layer].is_initialized:
            stored = stored[-cache.layers[layer].get_mask_sizes(count)[0] :]
        self._slots[layer] = stored
        apart = queries[:, None] - stored
        attention: Any = self.layers[layer].self_attn
        window = getattr(attention, "sliding_window", None)
        seen = ((apart >= 0) & (apart < (window or self._total + 1)))[None, None]
        if attention.config._attn_implementation != "eager":
            return seen
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)

    def _after(self, layer: int, output: Any) -> Any:
        if self._whole is None:
            return super()._after(layer, output)
        whole, self._whole = self._whole.clone(), None
        new = output[0] if isinstance(output, tuple) else output
        whole[:, self._left(whole, self._gone(layer))] = new
        whole = self._merged(layer, whole)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    def _left(self, hidden: Tensor, gone: Tensor | None) -> Tensor | None:
        """Slots of a prompt that are left, None where all are; what is generated is never removed."""
        length = hidden.shape[1]
        if gone is None or length == 1:
            return None
        removed = gone[0, self._past : self._past + length]
        if self._past and not removed.any():
            return None
        return (~pad(removed, (0, length - len(removed)))).nonzero()[:, 0]
