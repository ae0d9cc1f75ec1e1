"""One forward pass of the decoder: which rows run in which layer, and what the methods decide on the way.

A layer's pre-hook takes the active rows, its post-hook hands them on as a lazy frame, and lays the frame out where the
method is asked. Removed slots freeze at their last value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ...ops.host import to_host
from ...ops.select import put_tokens
from ...reduction import BEFORE_LAYERS, Positions, Tap, TapSpec
from ..compat import given_cache
from ..families.layers import positional_names, rotates
from ..families.parts import Anatomy
from ..stopwatch import deciding
from ..trace import Trace
from .cache import LogicalLayer, physical_lengths, reduced_layers
from .frame import ActiveSet, put_rows, take_rows
from .lane import LazyFrame, laid_out, short_rows
from .layer_inputs import Handed, LayerInputs
from .masks import Reach
from .stages import Stages
from .taps import counted_from_first, read_rows

__all__ = ["ForwardPass"]


@dataclass
class ForwardPass:
    """State of one pass of `B` rows and `S` slots; it lives from the decoder's pre-hook to its post-hook.

    Attributes:
        tokens: (B, S) bool, not padding.
        past: logical length of the cache before this pass.
        stages: of a prefill with images, else None. Its prompt may be shorter than S: what follows it (candidates of
            assisted decoding, tokens generated without a cache) is never removed.
        lane: tells the layers whose output may be handed on as a lazy frame. Asked inside the decoder, where it is
            known whether somebody collects hidden states.
        required: (B, S) bool slots that must stay whatever the method says, or None.
        embeds: (B, S, D) that the decoder was given, or None.
        counted: it was given positions, too.
        again: inside `generate`, where without a cache every token is a prefill of its own.
        uniform: what was given is what entered layer 0, and all layers were handed the same with nobody between them.
    """

    anatomy: Anatomy
    rows: int
    length: int
    past: int
    tokens: Tensor
    stages: Stages | None = None
    cache: DynamicCache | None = None
    lane: Callable[[], frozenset[int]] = frozenset
    required: Tensor | None = None
    embeds: Tensor | None = None
    counted: bool = False
    again: bool = False

    uniform: bool = False
    first_frame: Tensor | None = None
    _frame: Tensor | None = None
    _reach: Reach | None = None
    _embeddings: Any = None
    _running: LogicalLayer | None = None
    _lane: frozenset[int] | None = None
    _handed: Handed | None = None
    _inside: int | None = None
    inputs: LayerInputs = field(init=False)

    def __post_init__(self) -> None:
        self._due = {} if self.stages is None else self.stages.due
        self.inputs = LayerInputs(self.anatomy, self.rows, self.length, self.past, self.tokens.device, tuple(self._due))

    @property
    def active(self) -> ActiveSet | None:
        """The slots that are still computed, None: all."""
        return self.inputs.active

    @property
    def prompt(self) -> int:
        """Slots of this pass that belong to the prompt."""
        return self.length if self.stages is None else self.stages.prompt

    # ------------------------------------------------------------------------------------------------- layers
    def enter(self, layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Before a decoder layer: hand it the rows that are left."""
        if layer == self._inside:
            return None  # told by the hook that asks for a mask, while hooks of another thread are in
        self._inside = layer
        hidden = given = args[0] if args else kwargs["hidden_states"]
        self.cache = given_cache(args, kwargs)
        if layer == 0 and BEFORE_LAYERS in self._due:
            hidden = self._decide(BEFORE_LAYERS, hidden)
            if hidden is not given or self.active is not None:
                self.first_frame = hidden
        if layer == 0:
            self.inputs.begin(self.cache)
        if self.active is None and self.inputs.plain and len(args) == 1:
            self._reach, self._embeddings = None, kwargs.get("position_embeddings")
            return None if hidden is given else ((hidden,), kwargs)
        rows = short_rows(hidden, self.active)
        if rows is None:
            hidden = laid_out(hidden)
        self._frame = hidden if rows is None else hidden.base
        names: tuple[str, ...] = ()
        others = kwargs
        if len(args) != 1:
            names = positional_names(module, len(args) - 1) if args else ()
            others = {**dict(zip(names, args[1:])), **kwargs}
            others.pop("hidden_states", None)
        tokens = self.length if rows is not None else self._tokens_of(hidden)
        handed = self.inputs.of(layer, others, self.cache, hidden if rows is None else rows, tokens)
        if layer == 0:
            self.uniform, self._handed = self._plain_start(given, others.get("position_ids")), handed
        else:
            self.uniform = self.uniform and rows is not None and handed is self._handed
        self._reach, self._embeddings = handed.reach, handed.rope
        self._running = self.inputs.counting
        if self._running is not None:
            self._running.running = True
        if handed.arguments is None:
            return None if hidden is given else _with_hidden(args, kwargs, hidden)
        if tokens != self.length:
            self._frame = None  # the decoder itself has cut it to the tokens whose logits are wanted
        elif self.active is not None:
            hidden = self._take_hidden(hidden) if rows is None else rows
        changed = dict(handed.arguments)
        if not args:
            return (), {**changed, "hidden_states": hidden}
        return (hidden, *(changed.pop(name) for name in names)), changed

    def _plain_start(self, hidden: Tensor, positions: Tensor | None) -> bool:
        if hidden is not self.embeds or tuple(self._due) != (BEFORE_LAYERS,) or self.active is None:
            return False
        if self.counted:
            return True
        # Asked once for a decoder: does it number the prompt from 0 where nobody says otherwise?
        return positions is not None and torch.equal(
            positions[0], torch.arange(self.length, device=positions.device)
        )  # fmt: skip

    def decide_before(self, hidden: Tensor) -> Tensor:
        """The stage before layer 0, where the decoder itself is about to be called with `hidden`."""
        return self._decide(BEFORE_LAYERS, hidden)

    def leave(self, layer: int, output: Any) -> Any:
        """After a decoder layer: put its rows in the frame, ask the method. None leaves the output as it is."""
        self._inside = None
        hidden = output[0] if isinstance(output, tuple) else output
        new, due = hidden, self._due.get(layer, ())
        if self.active is not None and self._frame is not None:
            if self._lane is None:
                self._lane = self.lane()
            if layer in self._lane and not due:
                new = LazyFrame(hidden, self.active, self._frame)
            else:
                new = self._put_hidden(hidden)
        self._frame = None
        if self._running is not None:
            self._running.running, self._running = False, None
        for stage in due:
            new = self._decide(stage, new)
        if new is hidden:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def give_up(self) -> None:
        """Something failed in the decoder: layers of the cache that were told of tokens will not get them."""
        for layer in reduced_layers(self.cache):
            layer.announced = None

    def finish(self) -> Trace | None:
        """After the decoder: the completed trace of a prefill with images, else None."""
        if self.stages is None:
            return None
        inputs = self.inputs
        if self.active is not None and self.cache is not None:
            permit = inputs.permit(self.cache)
            inputs.shared.remember(self.cache, permit, self.stages.trace, self.active)
            permit.settle(self.cache)
        stored = physical_lengths(self.cache) if self.cache is not None else []
        self.stages.trace.kv_lengths = stored if any(stored) else inputs.keys_per_layer
        return self.stages.trace

    def _tokens_of(self, hidden: Tensor) -> int:
        streams = self.anatomy.streams
        return (hidden if streams is None else streams.by_token(hidden)).shape[1]

    def _take_hidden(self, hidden: Tensor) -> Tensor:
        assert self.active is not None
        streams = self.anatomy.streams
        if streams is None:
            return take_rows(hidden, self.active)
        return streams.back(take_rows(streams.by_token(hidden), self.active))

    def _put_hidden(self, hidden: Tensor) -> Tensor:
        assert self.active is not None
        assert self._frame is not None
        streams = self.anatomy.streams
        if streams is None:
            return put_rows(self._frame, self.active, hidden)
        return streams.back(put_rows(streams.by_token(self._frame), self.active, streams.by_token(hidden)))

    def _put_merged(self, hidden: Tensor, slots: Tensor, values: Tensor) -> Tensor:
        streams = self.anatomy.streams
        if streams is None:  # no method merges into the last slot
            return put_tokens(hidden, slots, values, self.prompt - 1)
        return streams.back(put_tokens(streams.by_token(hidden).flatten(2), slots, values, self.prompt - 1))

    # ------------------------------------------------------------------------------------------------- decisions
    @deciding
    def listen(self, layer: int, module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict) -> None:
        """Attention of a tapped decoder layer passes: read the rows its stage asks for."""
        if self.stages is not None:
            for stage, spec in self.stages.read_in(layer):
                wanted = _widen(self.stages.rows(spec, self._active()[:, : self.prompt]), self.length)
                self.stages.heard(stage, self._read(spec, wanted, module, query, key, mask, kwargs))

    def _read(
        self, spec: TapSpec, wanted: Tensor, module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict
    ) -> Tap:
        (rows, valid), past, reach = self.inputs.slots(), self.past, self._reach
        if reach is None:
            total = past + self.length
            keys = torch.arange(total - key.shape[2], total, device=rows.device).expand(self.rows, -1)
            reach = Reach(keys, rows + past, None, valid, False, past, self.length, None)
        tap = read_rows(spec, wanted, rows, reach, query, key, mask, kwargs)
        if spec.keep_qk and not past and not self.anatomy.mrope and rotates(module):
            there = self.tokens.gather(1, rows) if valid is None else self.tokens.gather(1, rows) & valid
            counted_from_first(module, tap, self._embeddings, there.int().argmax(1))
        return tap

    def _active(self) -> Tensor:
        return self.tokens if self.active is None else self.active.keep

    @deciding
    def _decide(self, stage: int, hidden: Tensor) -> Tensor:
        """Ask the method, carry out what it says, write it down. Returns the frame, a new one if tokens merged."""
        assert self.stages is not None
        decision = self.stages.decide(stage, hidden, self._active()[:, : self.prompt], self.inputs.positions)
        if decision.slots is not None and decision.values is not None:
            hidden = self._put_merged(hidden, decision.slots, decision.values)
        if decision.keep is not None:
            self._remove(decision.keep, decision.positions or self.stages.reducer.positions)
        self.stages.record(stage, decision, self._active()[:, : self.prompt])
        if stage == max(self.stages.reducer.stages) and (self.cache is not None or not self.again):
            self.stages.release()
        return hidden

    def _remove(self, keep: Tensor, positions: Positions) -> None:
        device, prompt = self.tokens.device, self.prompt
        masks = [keep.to(device), self.tokens[:, :prompt], self._active()]
        masks += [] if self.stages is None else [self.stages.visual]
        masks += [] if self.required is None else [self.required]
        # The one device sync of a stage; what follows from it is found out on the host.
        asked, tokens, active, *others = to_host(*masks)
        stays = active.copy()
        stays[:, :prompt] &= asked
        if self.required is not None:
            stays |= others.pop() & active
        rows = np.arange(len(tokens))
        last = prompt - 1 - tokens[:, ::-1].argmax(1)
        if others:  # a prompt that ends with its image: the answer begins at this slot
            stays[rows, last] |= others[0][rows, last] & active[rows, last]
        gone = active & ~stays
        if not gone.any():
            return  # not even padding is dropped: bitwise the unreduced model
        if (gone[rows, last] & tokens[rows, last]).any():
            raise ValueError("a decision removed the last token of a row; its logits are needed")
        self.inputs.shorten(ActiveSet.of(stays, device))
        if positions != "keep":
            self.inputs.renumber()


def _with_hidden(args: tuple, kwargs: dict[str, Any], hidden: Tensor) -> tuple[tuple, dict[str, Any]]:
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def _widen(mask: Tensor, length: int) -> Tensor:
    missing = length - mask.shape[1]
    return mask if missing == 0 else nn.functional.pad(mask, (0, missing), value=False)
