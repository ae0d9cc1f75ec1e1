"""Who looks at hidden states between the layers of a decoder: foreign hooks, and what transformers records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...reduction import UnsupportedError
from ..compat import active_collector
from ..families.parts import Anatomy

__all__ = ["asks_for_states", "is_watched", "short_between", "show_whole_prompt", "watched_everywhere"]

_KEEPS_ITS_MEANING = {"hidden_states", "attentions"}
"""What may be recorded in layers that run on fewer tokens."""
_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


def is_watched(module: nn.Module, ours: frozenset[int]) -> bool:
    """Whether a module has hooks of somebody else; `ours` are the numbers of the session's own."""
    # A copy: another thread may put in its hooks. transformers leaves its recorder installed after the first use;
    # whether it listens is asked elsewhere.
    hooks = [*module._forward_hooks.items(), *module._forward_pre_hooks.items()]
    return any(key not in ours and getattr(hook, "__name__", "") != "output_capturing_hook" for key, hook in hooks)


def watched_everywhere() -> bool:
    """Whether somebody has put hooks on all modules there are."""
    return bool(nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks)


def asks_for_states(config: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a call of the decoder, or its configuration, asks for what its layers compute."""
    asked = any(arguments.get(name) or getattr(config, name, False) for name in _OUTPUTS)
    return asked or bool(active_collector.get())


def short_between(anatomy: Anatomy, ours: frozenset[int]) -> frozenset[int]:
    """Layers behind which hidden states may stay short. Asked inside the decoder, where it is known what is recorded.

    Raises:
        UnsupportedError: something is recorded in the layers that has no meaning for removed tokens.
    """
    collected = active_collector.get() or {}
    strange = next((n for n in collected if not n.startswith("_") and n not in _KEEPS_ITS_MEANING), None)
    if strange is not None:
        raise UnsupportedError(
            f"output_{strange}: removed tokens have no {strange.replace('_', ' ')}, and what is computed of all "
            f"would be wrong; call the model with output_{strange}=False"
        )
    if anatomy.streams is not None or watched_everywhere() or "hidden_states" in collected:
        return frozenset()
    depth = range(anatomy.depth)
    if not torch.is_grad_enabled():
        return frozenset(depth)
    # An autograd function in somebody's hook (FSDP) takes a tensor as it is.
    watched = {i for i in depth if is_watched(anatomy.layers[i], ours)}
    return frozenset(i for i in depth if i not in watched and i + 1 not in watched)


def show_whole_prompt(output: Any, frame: Tensor) -> None:
    """transformers records what layer 0 was given; callers expect the whole prompt there."""
    states: Any = getattr(output, "hidden_states", None)
    if states and states[0] is not None and states[0].shape != frame.shape:
        output.hidden_states = (frame, *states[1:])
