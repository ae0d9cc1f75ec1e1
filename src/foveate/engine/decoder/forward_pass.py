"""One forward pass of the decoder: which rows run in which layer, and what the methods decide on the way.

A layer's pre-hook gathers the active rows (hidden states, cos/sin, mask), its post-hook writes them back into the frame
by slot and asks the method at its stages. Removed slots freeze at their last value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ...ops.select import put_tokens
from ...reduction import BEFORE_LAYERS, Positions, Tap, TapSpec, UnsupportedError
from ..compat import check_arguments, given_cache
from ..families.layers import positional_names, rotates
from ..families.parts import Anatomy
from ..stopwatch import deciding
from ..trace import Trace
from .cache import LogicalLayer, logical_layer, physical_lengths
from .frame import ActiveSet, put_rows, take_rope, take_rows
from .masks import Reach, reduced_mask
from .shared import SharedKeys
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
        exclusive: tells the layers whose output nobody but us and the next layer can hold, so it may be overwritten.
            Asked inside the decoder, where it is known whether somebody collects hidden states.
        required: (B, S) bool slots that must stay whatever the method says, or None.
    """

    anatomy: Anatomy
    rows: int
    length: int
    past: int
    tokens: Tensor
    stages: Stages | None = None
    cache: DynamicCache | None = None
    exclusive: Callable[[], frozenset[int]] = frozenset
    required: Tensor | None = None

    active: ActiveSet | None = None
    first_frame: Tensor | None = None
    _memo: dict[Any, Any] = field(default_factory=dict)
    _frame: Tensor | None = None
    _mine: Tensor | None = None
    _reach: Reach | None = None
    _positions: Tensor | None = None
    _next: Tensor | None = None
    _embeddings: Any = None

    def __post_init__(self) -> None:
        self._due = {} if self.stages is None else self.stages.due
        self._shared = SharedKeys(self.anatomy.shared_keys, self.past, self.length)
        self._running: LogicalLayer | None = None
        self._keys_per_layer = [0] * self.anatomy.depth

    @property
    def prompt(self) -> int:
        """Slots of this pass that belong to the prompt."""
        return self.length if self.stages is None else self.stages.prompt

    # ------------------------------------------------------------------------------------------------- layers
    def enter(self, layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Before a decoder layer: hand it the rows that are left."""
        hidden = args[0] if args else kwargs["hidden_states"]
        given = hidden
        if layer == 0 and BEFORE_LAYERS in self._due:
            hidden = self._decide(BEFORE_LAYERS, hidden)
            if hidden is not given or self.active is not None:
                self.first_frame = hidden
        self._frame, self._reach = hidden, None
        self.cache = given_cache(args, kwargs)
        names = positional_names(module, len(args) - 1) if len(args) > 1 else ()
        changed = {**dict(zip(names, args[1:])), **kwargs}
        self._embeddings = changed.get("position_embeddings")
        whole = self._tokens_of(hidden) == self.length
        stored = self._running = self._stored(layer, self.cache)
        reach = self._reach_of(layer, stored, changed, self._tokens_of(hidden))
        if self.active is None and reach is None:
            return None if hidden is given else _with_hidden(args, kwargs, hidden)
        self._reach = reach
        if self.active is not None and (reach is None or "conv_mask" in changed):
            changed["conv_mask" if "conv_mask" in changed else "attention_mask"] = self._recurrent_mask()
        elif self.active is not None and self.anatomy.reads_padding:
            valid = self._recurrent_mask()
            changed["attention_mask"] = torch.ones_like(self.active.index, dtype=torch.bool) if valid is None else valid
        if reach is not None:
            if not self.anatomy.reads_padding:
                changed["attention_mask"] = self._mask(changed.get("attention_mask"), reach, hidden.dtype)
            if "relative_distance" in changed:
                changed["relative_distance"] = self._distances(reach)
            if changed.get("position_embeddings") is not None and whole:
                self._embeddings = self._rope(layer, changed["position_embeddings"], hidden, stored, reach)
                changed["position_embeddings"] = self._embeddings
        if self.active is not None and whole:
            hidden, changed = self._take_hidden(hidden), self._take_others(changed)
        elif not whole:
            self._frame = None  # the decoder itself has cut it to the tokens whose logits are wanted
        args = (*args[:1], *(changed.pop(name) for name in names))
        return _with_hidden(args, changed, hidden)

    def leave(self, layer: int, output: Any) -> Any:
        """After a decoder layer: lay its rows out in the frame, ask the method. None leaves the output as it is."""
        hidden = output[0] if isinstance(output, tuple) else output
        new = hidden
        if self.active is not None and self._frame is not None:
            mine = self._frame is self._mine and self._frame.device == hidden.device
            new = self._put_hidden(hidden, in_place=mine)
            if "exclusive" not in self._memo:
                self._memo["exclusive"] = self.exclusive()
            self._mine = new if layer in self._memo["exclusive"] else None
        self._frame = None
        if self._running is not None:
            self._running.running = False
        for stage in self._due.get(layer, ()):
            new = self._decide(stage, new)
            self._mine = None  # the method may have kept what it saw
        if new is hidden:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def finish(self) -> Trace | None:
        """After the decoder: the completed trace of a prefill with images, else None."""
        if self.stages is None:
            return None
        trace = self.stages.trace
        if self.active is not None and self.cache is not None:
            self._shared.remember(self.cache, trace, self.active)
        stored = physical_lengths(self.cache) if self.cache is not None else []
        trace.kv_lengths = stored if any(stored) else self._keys_per_layer
        return trace

    # --------------------------------------------------------------------------------------- what a layer is handed
    def _stored(self, layer: int, cache: DynamicCache | None) -> LogicalLayer | None:
        if cache is None or layer in self.anatomy.keyless or layer in self.anatomy.shared_keys:
            return None
        if self.active is not None:
            return logical_layer(cache, layer)
        current = cache.layers[layer] if layer < len(cache.layers) else None
        return current if isinstance(current, LogicalLayer) else None

    def _reach_of(
        self, layer: int, stored: LogicalLayer | None, given: Mapping[str, Any], queries: int
    ) -> Reach | None:
        """None where a layer has no keys, or where neither its tokens nor its keys have changed."""
        self._keys_per_layer[layer] = 0
        source = self.anatomy.shared_keys.get(layer)
        if source is not None:
            return self._shared.reach(
                layer, source, given.get("shared_kv_states"), self.active, self._rows(), queries,
                self._positions is not None, self._implementation,
            )  # fmt: skip
        if layer in self.anatomy.keyless:
            return None
        reach = None if self.active is None and stored is None else self._announce(layer, stored)
        self._keys_per_layer[layer] = self.past + self.length if reach is None else reach.keys.shape[1]
        self._shared.ran(layer, reach, self.active, stored)
        return reach

    def _recurrent_mask(self) -> Tensor | None:
        """Fillers of ragged rows stand on the left, where a recurrent layer takes them for padding and zeroes them."""
        assert self.active is not None
        if self.active.valid is not None and self.past:
            raise UnsupportedError(
                "rows of a batch that keep different numbers of tokens cannot go on from a recurrent state "
                "(linear attention, convolution): give each row a call of its own, or a budget in tokens"
            )
        return self.active.valid

    def _tokens_of(self, hidden: Tensor) -> int:
        streams = self.anatomy.streams
        return (hidden if streams is None else streams.by_token(hidden)).shape[1]

    def _take_hidden(self, hidden: Tensor) -> Tensor:
        assert self.active is not None
        streams = self.anatomy.streams
        if streams is None:
            return take_rows(hidden, self.active)
        return streams.back(take_rows(streams.by_token(hidden), self.active))

    def _put_hidden(self, hidden: Tensor, in_place: bool) -> Tensor:
        assert self.active is not None
        assert self._frame is not None
        streams = self.anatomy.streams
        if streams is None:
            return put_rows(self._frame, self.active, hidden, in_place)
        frame, rows = streams.by_token(self._frame), streams.by_token(hidden)
        return streams.back(put_rows(frame, self.active, rows, in_place and frame.is_contiguous()))

    def _put_merged(self, hidden: Tensor, slots: Tensor, values: Tensor) -> Tensor:
        streams = self.anatomy.streams
        if streams is None:  # no method merges into the last slot
            return put_tokens(hidden, slots, values, self.prompt - 1)
        return streams.back(put_tokens(streams.by_token(hidden).flatten(2), slots, values, self.prompt - 1))

    def _announce(self, layer: int, stored: LogicalLayer | None) -> Reach:
        """Slots of the queries and keys of this layer; tells its cache what is coming."""
        window = self.anatomy.sliding_windows[layer]
        rows, valid, past = self._rows()
        if stored is None:
            keys = rows if valid is None else torch.where(valid, rows, -1)
            return Reach(keys, rows, rows, valid, valid is not None, 0, self.length, window)
        key = ("keys", id(stored.kept), stored.total)
        if key not in self._memo:
            new = rows + past if valid is None else torch.where(valid, rows + past, -1)
            after = self._next if stored.next is None else stored.next + self.length
            kept = new if stored.kept is None else torch.cat([stored.kept, new], 1)
            self._memo[key] = (kept, after, stored.kept)
        kept, after, _ = self._memo[key]
        stored.announce(kept, after, self.length)
        stored.filled |= valid is not None
        queries = self._memo.setdefault(("queries", past), rows + past)
        index = rows if self.active is not None else None
        pinned = getattr(stored, "prefill_length", None) or 0
        return Reach(kept, queries, index, valid, stored.filled, past, self.length, window, pinned)

    def _rows(self) -> tuple[Tensor, Tensor | None, int]:
        if self.active is not None:
            return self.active.index, self.active.valid, self.past
        if "rows" not in self._memo:
            self._memo["rows"] = torch.arange(self.length, device=self.tokens.device).expand(self.rows, -1)
        return self._memo["rows"], None, self.past

    @property
    def _implementation(self) -> str:
        return getattr(self.anatomy.decoder.config, "_attn_implementation", None) or "eager"

    def _mask(self, mask: Any, reach: Reach, dtype: torch.dtype) -> Tensor | None:
        key = ("mask", id(mask), id(reach.keys), reach.window)
        if key not in self._memo:
            self._memo[key] = (reduced_mask(mask, reach, self._implementation, dtype), mask, reach.keys)
        return self._memo[key][0]

    def _distances(self, reach: Reach) -> Tensor:
        """Of each query to each stored key, (n, N), in tokens that are left: beside a convolution only these count."""
        stored = torch.arange(reach.keys.shape[1], device=reach.keys.device)
        return stored[-reach.queries.shape[1] :, None] - stored

    def _rope(self, layer: int, rope: Any, hidden: Tensor, stored: LogicalLayer | None, reach: Reach) -> Any:
        counted = self._positions is not None or (stored is not None and stored.next is not None)
        window = self.anatomy.sliding_windows[layer]
        if counted and window is not None and self.past + self.length > window:
            raise UnsupportedError(
                "renumbered positions do not go with an exceeded sliding window; use positions='keep'"
            )
        key = ("rope", id(rope[0] if isinstance(rope, tuple | list) else rope), id(stored.kept) if stored else None)
        if key not in self._memo:
            if counted:
                new = self.anatomy.rotary(layer, hidden, self._counted_positions(stored).to(hidden.device))
            else:
                new = self._kept_rope(rope, reach)
            self._memo[key] = (new, rope, stored.kept if stored else None)
        return self._memo[key][0]

    def _kept_rope(self, rope: Any, reach: Reach) -> Any:
        part = rope[0] if isinstance(rope, tuple | list) else rope
        if self.past and isinstance(part, Tensor) and part.shape[-2] == reach.total:
            return take_rope(rope, reach.keys.clamp_min(0), reach.total)  # an index rotates the cached keys, too
        return rope if self.active is None else take_rope(rope, self.active.index, self.length)

    def _counted_positions(self, stored: LogicalLayer | None) -> Tensor:
        """Positions (B, n) that are not the model's own: as renumbered, or going on from a layer's own length."""
        rows = self._rows()[0]
        if self._positions is not None:
            return self._positions.gather(1, rows)
        assert stored is not None
        assert stored.next is not None
        return stored.next + rows

    def _take(self, value: Any) -> Any:
        if self.active is not None and isinstance(value, Tensor) and value.shape[:2] == (self.rows, self.length):
            return take_rows(value, self.active)
        return value

    def _take_others(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        assert self.active is not None
        done = (
            "hidden_states", "attention_mask", "position_embeddings", "position_ids", "shared_kv_states",
            "relative_distance",
        )  # fmt: skip
        check_arguments(kwargs, self.rows, self.length, done)
        taken = {name: value if name in done else self._take(value) for name, value in kwargs.items()}
        if self.active.valid is not None:
            for name, padding in self.anatomy.filled_ids.items():
                if taken.get(name) is not None:
                    taken[name] = torch.where(self.active.valid, taken[name], padding)
        positions = taken.get("position_ids")
        if positions is not None and positions.dim() == 2 and "conv_mask" in taken:  # Inkling 2 scales queries by them
            taken["position_ids"] = self._take(positions.expand(self.rows, -1))
        elif positions is not None:
            # RoPE is in position_embeddings already; FlashAttention would read gaps in the ids as packed sequences.
            ids = torch.arange(self.active.size, device=self.active.index.device)
            taken["position_ids"] = self._memo.setdefault("ids", ids.expand(self.rows, -1))
        return taken

    # ------------------------------------------------------------------------------------------------- decisions
    @deciding
    def listen(self, layer: int, module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict) -> None:
        """Attention of a tapped decoder layer passes: read the rows its stage asks for."""
        if self.stages is not None:
            for stage, spec in self.stages.read_in(layer):
                wanted = _widen(self.stages.rows(spec, self._active()[:, : self.prompt]), self.length, False)
                self.stages.heard(stage, self._read(spec, wanted, module, query, key, mask, kwargs))

    def _read(
        self, spec: TapSpec, wanted: Tensor, module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict
    ) -> Tap:
        rows, valid, past = self._rows()
        reach = self._reach
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
        decision = self.stages.decide(stage, hidden, self._active()[:, : self.prompt], self._positions)
        if decision.slots is not None and decision.values is not None:
            hidden = self._put_merged(hidden, decision.slots, decision.values)
        if decision.keep is not None:
            self._remove(decision.keep, decision.positions or self.stages.reducer.positions)
        self.stages.record(stage, decision, self._active()[:, : self.prompt])
        return hidden

    def _remove(self, keep: Tensor, positions: Positions) -> None:
        keep = _widen(keep.to(self.tokens.device), self.length, True) & self._active()
        if self.required is not None:
            keep = keep | (self.required & self._active())
        prompt = self.tokens[:, : self.prompt]
        last = _widen(prompt & (prompt.flip(1).cumsum(1).flip(1) == 1), self.length, False)
        if self.stages is not None:  # a prompt that ends with its image: the answer begins at this slot
            keep = keep | (last & _widen(self.stages.visual, self.length, False) & self._active())
        count, gone = keep.sum(1), self._active() & ~keep
        # The one device sync of a stage.
        shortest, longest, total, removed, last_gone = torch.stack(
            [count.min(), count.max(), count.sum(), gone.any().long(), (gone & last).any().long()]
        ).tolist()
        if not removed:
            return  # not even padding is dropped: bitwise the unreduced model
        if last_gone:
            raise ValueError("a decision removed the last token of a row; its logits are needed")
        self.active, self._memo = ActiveSet.of(keep, shortest, longest, total), {}
        if positions != "keep":
            if self.past:
                raise UnsupportedError(f"positions={positions!r} on a continued cache; use positions='keep'")
            self._positions, self._next = (keep.cumsum(1) - 1).clamp_min(0), count[:, None]


def _with_hidden(args: tuple, kwargs: dict[str, Any], hidden: Tensor) -> tuple[tuple, dict[str, Any]]:
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def _widen(mask: Tensor, length: int, value: bool) -> Tensor:
    missing = length - mask.shape[1]
    return mask if missing == 0 else nn.functional.pad(mask, (0, missing), value=value)
