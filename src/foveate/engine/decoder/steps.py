"""Passes without images over a reduced cache: steps of decoding, candidates of assisted decoding, later turns.

A step of one token whose attention has no mask needs nothing but the cache. It is told by the first layer of each
kind; the other layers have no hooks.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..compat import given_cache
from ..families.layers import positional_names
from ..families.parts import Anatomy
from ..undo import Shared, Undo
from .cache import Permit, reduced_layers
from .call import Call
from .forward_pass import ForwardPass
from .hooks import PassingHooks

__all__ = ["Steps"]


class Steps(Shared):
    """Of one model.

    Args:
        undo: takes everything out.
        anatomy: of the model.
        hooks: on all layers, for passes that need them.
        call: gives the state of the calling thread.
    """

    def __init__(self, undo: Undo, anatomy: Anatomy, hooks: PassingHooks, call: Callable[[], Call]):
        self._anatomy, self._hooks, self._call = anatomy, hooks, call
        self._granted: WeakSet[Permit] = WeakSet()
        undo.then(self._revoke)
        self._takes_positions = "position_ids" in inspect.signature(anatomy.decoder.forward).parameters
        for i in _first_of_each_kind(anatomy):
            undo.pre_hook(anatomy.layers[i], functools.partial(self._asked, i), with_kwargs=True)

    def begin(self, cache: Any, rows: int, length: int, past: int, device: torch.device) -> Tensor | None:
        """A pass of `length` tokens begins in the decoder; `past` is the logical length of its cache.

        Returns:
            (B, 1) its position, where the model's own does not hold in any layer.
        """
        permit = next((layer.permit for layer in reduced_layers(cache)), None)
        if permit is None:
            return None
        call = self._call()
        call.past, call.rows = past, rows
        beyond = permit.window is not None and past + length > permit.window
        counted = None if permit.counts is None else permit.counts.next
        blind = counted is not None and not self._takes_positions
        if length > 1 or beyond or permit.at_every_step or call.keep_hooks or blind:
            self._tell(cache, rows, length, device)
            return None
        permit.granted, call.decoding = True, permit
        self._granted.add(permit)
        return counted

    def _revoke(self) -> None:
        """A step that was interrupted (Ctrl-C) has not ended by itself."""
        for permit in self._granted:
            permit.granted = False

    def end(self) -> None:
        """The pass is over."""
        call = self._call()
        if call.decoding is not None:
            call.decoding.granted, call.decoding = False, None

    def _tell(self, cache: Any, rows: int, length: int, device: torch.device) -> ForwardPass:
        call = self._call()
        tokens = torch.ones(rows, length, dtype=torch.bool, device=device)
        call.forward_pass = ForwardPass(self._anatomy, rows, length, call.past, tokens, cache=cache)
        call.keep_hooks = call.generating
        self._hooks.put_in()
        return call.forward_pass

    def _asked(self, layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        call = self._call()
        if call.decoding is None:
            return None
        names = positional_names(module, len(args) - 1) if len(args) > 1 else ()
        if {**kwargs, **dict(zip(names, args[1:]))}.get("attention_mask") is None:
            return None
        self.end()
        hidden = args[0] if args else kwargs["hidden_states"]
        told = self._tell(given_cache(args, kwargs), call.rows, 1, hidden.device)
        return told.enter(layer, module, args, kwargs)


def _first_of_each_kind(anatomy: Anatomy) -> list[int]:
    """The first decoder layer of each kind that a decoder may hand another mask."""
    types = getattr(anatomy.text_config, "layer_types", None) or [None] * anatomy.depth
    kinds: dict[Any, int] = {}
    for i, layer in enumerate(anatomy.layers):
        if i not in anatomy.keyless:
            kinds.setdefault((type(layer), types[i], anatomy.sliding_windows[i]), i)
    return list(kinds.values())
