"""Removal before layer 0 and nowhere else: the decoder is called with the shorter prompt, and no layer has a hook.

That is right only for a decoder which does nothing with the prompt but what its layers do: no features are added behind
a layer, no mask or position depends on anything but the tokens. A prefill with hooks has shown it before; until one
has, and wherever a call asks for more, the hooks do the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from ...reduction import BEFORE_LAYERS
from ..compat import given_cache, returned_cache
from ..families.parts import Anatomy
from .cache import fill_layers
from .forward_pass import ForwardPass
from .frame import take_rows
from .lane import LazyFrame
from .watchers import asks_for_states, is_watched, watched_everywhere

__all__ = ["ShortPrompt"]

_TAKEN = {"inputs_embeds", "attention_mask", "position_ids", "use_cache", "past_key_values", "cache"}
_PLAIN: WeakSet[nn.Module] = WeakSet()
"""Decoders that have shown it."""


class ShortPrompt:
    """Of one pass.

    Attributes:
        now: the pass.

    Args:
        hooks: numbers of the session's own hooks.
    """

    def __init__(self, now: ForwardPass, hooks: frozenset[int]):
        self.now, self._hooks = now, hooks
        self._frame: Tensor | None = None

    def shortened(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """What the decoder is to be called with; None: leave it to the hooks."""
        now, embeds = self.now, kwargs.get("inputs_embeds")
        if args or embeds is None or not self._fits(kwargs):
            return None
        self._frame = now.decide_before(embeds)
        if now.active is None:
            return {**kwargs, "inputs_embeds": self._frame}
        active, mask, positions = now.active, kwargs.get("attention_mask"), kwargs.get("position_ids")
        index = active.index
        if now.inputs.positions is not None:
            positions = now.inputs.positions.gather(1, index)
        elif positions is None:
            positions = index
        else:
            positions = positions.expand(*positions.shape[:-2], *index.shape[:1], -1)
            positions = positions.gather(-1, index.to(positions.device).expand(*positions.shape[:-1], -1))
        if mask is not None:
            mask = mask.gather(1, index.to(mask.device))
        if active.valid is not None:
            mask = active.valid.long() if mask is None else mask * active.valid.to(mask)
        elif mask is None and given_cache((), kwargs) is None:
            mask = torch.ones_like(index)  # else gaps in the positions would be taken for packed samples
        rows = take_rows(self._frame, active)
        return {**kwargs, "inputs_embeds": rows, "attention_mask": mask, "position_ids": positions}

    def _fits(self, kwargs: Mapping[str, Any]) -> bool:
        now, parts = self.now, self.now.anatomy
        mask, cache = kwargs.get("attention_mask"), given_cache((), kwargs)
        others = (value for name, value in kwargs.items() if name not in _TAKEN)
        return (
            parts.decoder in _PLAIN
            and _is_ordinary(now)
            and now.stages is not None
            and tuple(now.stages.due) == (BEFORE_LAYERS,)
            and not now.past
            and (mask is None or (isinstance(mask, Tensor) and mask.shape == (now.rows, now.length)))
            and (cache is None or (type(cache) is DynamicCache and all(type(x) is DynamicLayer for x in cache.layers)))
            and all(value is None or isinstance(value, bool | int | float | str) for value in others)
            and kwargs.get("return_dict") is not False
            and not asks_for_states(parts.text_config, kwargs)
            and not watched_everywhere()
            and not any(is_watched(module, self._hooks) for module in _inside(parts))
        )

    def lengthened(self, output: Any) -> Any:
        """What the decoder returned, for the whole prompt."""
        now, frame = self.now, self._frame
        active = now.active
        if active is None or frame is None:
            return output
        now.inputs.keys_per_layer = [active.size] * now.anatomy.depth
        now.cache = cache = returned_cache(output)
        if cache is not None:
            permit, new = now.inputs.permit(cache), active.index
            kept = new if active.valid is None else torch.where(active.valid, new, -1)
            fill_layers(cache, permit, kept, now.length, now.inputs.next, active.valid is not None)
        norm = now.anatomy.decoder.norm
        output["last_hidden_state"] = LazyFrame(output.last_hidden_state, active, lambda: norm.forward(frame))
        return output


def learn(now: ForwardPass, output: Any) -> None:
    """After a prefill with hooks: note a decoder that would have done the same on the shorter prompt."""
    norm = getattr(now.anatomy.decoder, "norm", None)
    short = isinstance(getattr(output, "last_hidden_state", None), LazyFrame)
    if now.uniform and short and isinstance(norm, nn.Module) and _is_ordinary(now):
        _PLAIN.add(now.anatomy.decoder)


def _is_ordinary(now: ForwardPass) -> bool:
    """Whether every layer attends to all tokens before its own, and nothing else. Configurations may change."""
    parts = now.anatomy
    types = set(getattr(parts.text_config, "layer_types", None) or ["full_attention"])
    special = parts.keyless or parts.shared_keys or parts.streams or parts.reads_padding or parts.keeps_inputs
    windows = any(parts.sliding_windows)
    return (
        not special and not windows and types == {"full_attention"} and now.inputs.implementation in ("sdpa", "eager")
    )


def _inside(parts: Anatomy) -> Iterator[nn.Module]:
    """Modules that are handed the prompt or what is made of it."""
    yield parts.decoder
    for module in parts.decoder.children():
        yield from module if isinstance(module, nn.ModuleList) else (module,)
