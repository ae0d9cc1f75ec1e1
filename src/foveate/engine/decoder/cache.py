"""A KV-cache layer that stores few tokens but reports the logical length.

Every mask builder of transformers and every length test of `generate()` asks the cache for its length. With the logical
one, nothing outside the decoder layers can tell that tokens are missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

from ...reduction import UnsupportedError
from ..families.layers import KEYLESS, REFERENCE

__all__ = [
    "SEEN_BY_ALL",
    "LogicalLayer",
    "Permit",
    "check_cache",
    "fill_layers",
    "logical_layer",
    "physical_lengths",
    "reduced_layers",
]

SEEN_BY_ALL = 10**6
"""`LogicalLayer.until` of a key that no layer loses."""


@dataclass(eq=False)
class Permit:
    """What the reduced layers of one cache share.

    Attributes:
        granted: a pass of the session that filled the cache runs, so that tokens may be added.
        counts: a layer whose `next` holds in all layers.
        at_every_step: a step of decoding has to tell each layer what it sees: fillers, positions of its own.
        window: the narrowest sliding window of a reduced layer; beyond it a step has to, too.
    """

    granted: bool = False
    counts: LogicalLayer | None = None
    at_every_step: bool = False
    window: int | None = None

    def settle(self, cache: Any) -> None:
        """After a pass that has told each layer of a cache."""
        layers = list(reduced_layers(cache))
        others = any(isinstance(layer, DynamicLayer) and not isinstance(layer, LogicalLayer) for layer in cache.layers)
        self.counts = None if others or len({id(layer._next) for layer in layers}) > 1 else layers[0]
        self.at_every_step = any(
            isinstance(layer, _Counting | _Reference)
            or layer.filled
            or layer.until is not None
            or (layer._next is not None and self.counts is None)
            for layer in layers
        )
        self.window = min((w for w in (layer.sliding_window for layer in layers) if w is not None), default=None)


class LogicalLayer(DynamicLayer):
    """Stores the keys of the tokens that stayed; `n` stored of `total` logical ones.

    Attributes:
        filled: whether any stored key may be a filler.
        running: whether its decoder layer runs right now.
        until: (B, n) first decoder layer that must not see a stored key, where later layers share the keys of this
            one and tokens were removed in between; None: all see all.
        permit: of the cache.
        announced: `kept` and `next` as they will be after the pass, and the logical length that it adds.
    """

    is_croppable = True

    def __init__(self, sliding_window: int | None = None, permit: Permit | None = None):
        super().__init__()
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.permit = permit or Permit()
        self.filled = self.running = self.record_past = False
        self.until: Tensor | None = None
        self.announced: tuple[Tensor, Tensor | None, int] | None = None
        self._kept: Tensor | None = None
        self._next: Tensor | None = None
        self._total = self._stored = self._dropped = 0
        """When `_kept` was made, the logical length and the stored keys; and how many keys left at the start since."""

    def announce(self, kept: Tensor, next_position: Tensor | None, length: int) -> None:
        """Called before the layer runs: `kept` and `next` as they will be afterwards, and the logical length added."""
        self.announced = (kept, next_position, length)

    def _hold(self, kept: Tensor | None, total: int, next_position: Tensor | None) -> None:
        self._kept, self._total, self._next = kept, total, next_position
        self._stored, self._dropped = self.physical_length(), 0

    def fill(self, kept: Tensor, total: int, next_position: Tensor | None, filled: bool) -> None:
        """What is stored already are these slots (B, n)."""
        self._hold(kept, total, next_position)
        self.filled = filled

    @property
    def _added(self) -> int:
        # Not counted while decoding: compiled layers would be compiled again for each number.
        return self.physical_length() + self._dropped - self._stored

    @property
    def total(self) -> int:
        """Logical length, removed tokens included."""
        return self._total + self._added

    @property
    def state(self) -> tuple[int, int, int, int]:
        """The same for layers that hold the same slots."""
        return id(self._kept), self._added, self._dropped, self._total

    def slots(self) -> Tensor | None:
        """(B, n) logical slot of each stored key, -1 for a filler of a ragged batch; None: nothing is stored."""
        kept, added = self._kept, self._added
        if kept is None or not (added or self._dropped):
            return kept
        new = torch.arange(self._total, self._total + added, device=kept.device)
        return torch.cat([kept, new.expand(kept.shape[0], -1)], 1)[:, self._dropped :]

    @property
    def kept(self) -> Tensor | None:
        """`slots()`, made once."""
        self._hold(self.slots(), self.total, self.next)
        return self._kept

    @property
    def next(self) -> Tensor | None:
        """(B, 1) position of the next token in this layer, None where the model's own positions hold."""
        return self._next if self._next is None or not self._added else self._next + self._added

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.announced is None and not self.permit.granted:
            raise RuntimeError(
                "this KV cache holds reduced prompts: use it only while the reduction that filled it is applied"
            )
        before = self.total if self.announced is not None else 0
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.announced is not None:
            (kept, after, length), self.announced = self.announced, None
            self._hold(kept, before + length, after)
        if self.until is not None:
            self.until = pad(self.until, (0, self.physical_length() - self.until.shape[1]), value=SEEN_BY_ALL)
        if not self.record_past:
            self._evict()
        return keys, values

    def _evict(self) -> None:
        # In stored order the window is never shorter than in logical order: what leaves is out of the window for sure.
        if self.sliding_window is None or self.keys is None or self.values is None:
            return
        first = self.keys.shape[-2] - (self.sliding_window - 1)
        if first > 0:
            self.keys, self.values = self.keys[:, :, first:], self.values[:, :, first:]
            self._dropped += first
            self.until = None if self.until is None else self.until[:, first:]

    def activate_past_recording(self) -> None:
        self.record_past = True

    def get_seq_length(self) -> int:
        return self.total

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.total + query_length, 0

    def physical_length(self) -> int:
        """Keys stored per row, fillers included."""
        return 0 if self.keys is None else self.keys.shape[-2]

    def crop(self, tokens_to_remove: int) -> None:
        kept = self.kept
        if kept is None:
            return
        # A positive number is the length to be left: all that transformers before 5.15 asked for.
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.total - tokens_to_remove)
        if not removed:
            super().crop(0)
        else:
            gone = (kept >= self.total - removed).sum(1)
            stored = int(gone.max())
            if int(gone.min()) != stored or bool((kept[:, kept.shape[1] - stored :] < 0).any()):
                raise UnsupportedError("the cache cannot be cropped into a reduced prompt")
            total, after = self.total - removed, None if self._next is None else self._next - removed
            if stored:
                super().crop(-stored)
                kept = kept[:, : kept.shape[1] - stored]
                self.until = None if self.until is None else self.until[:, : kept.shape[1]]
            self._hold(kept, total, after)
        self._evict()

    def reset(self) -> None:
        super().reset()
        self._hold(None, 0, None)
        self.filled, self.announced, self.until = False, None, None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rows(lambda t: t[indices])

    def _rows(self, change) -> None:
        self._kept = None if self._kept is None else change(self._kept)
        self._next = None if self._next is None else change(self._next)
        self.until = None if self.until is None else change(self.until)


class _Counting(LogicalLayer):
    """Of a decoder layer that numbers its tokens itself: while it runs, it is told of those that are stored."""

    def get_seq_length(self) -> int:
        return self.physical_length() if self.running else self.total

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


class _Indexed(_Counting, DynamicIndexedLayer):
    """With the keys of an index, which chooses among the stored ones."""


class _Hybrid(_Counting, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """With the states of convolutions."""

    is_croppable = LinearAttentionAndFullAttentionLayer.is_croppable


class _Reference(LogicalLayer):
    """A sliding window over what follows the first pass, of which nothing leaves the window (Unlimited-OCR)."""

    def __init__(self, sliding_window: int | None = None, permit: Permit | None = None):
        super().__init__(sliding_window, permit)
        self._layer_type = REFERENCE  # of the instance: transformers registers a class that has one
        self.prefill_length: int | None = None
        self.prompt = 0
        """Stored keys of the first pass, which come first."""

    def set_prefill_length(self, prefill_length: int) -> None:
        self.prefill_length = prefill_length

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.prefill_length is None:
            self.prefill_length = self.total
        if self.total <= self.prefill_length:
            assert self.kept is not None
            self.prompt = self.kept.shape[1]
        return keys, values

    def _evict(self) -> None:
        if self.prefill_length is None or self.kept is None or self.keys is None or self.values is None:
            return
        assert self.sliding_window is not None
        stored, window = self.kept.shape[1], self.sliding_window - 1
        if self.total > self.prefill_length and stored - self.prompt > window:
            total, after = self.total, self.next
            self.keys, self.values, kept = (
                torch.cat([part.narrow(axis, 0, self.prompt), part.narrow(axis, stored - window, window)], axis)
                for part, axis in ((self.keys, 2), (self.values, 2), (self.kept, 1))
            )
            self._hold(kept, total, after)

    def reset(self) -> None:
        super().reset()
        self.prefill_length, self.prompt = None, 0


_KINDS: dict[type, type[LogicalLayer]] = {
    DynamicLayer: LogicalLayer,
    DynamicSlidingWindowLayer: LogicalLayer,
    DynamicIndexedLayer: _Indexed,
    LinearAttentionAndFullAttentionLayer: _Hybrid,
    LinearAttentionAndSlidingWindowAttentionLayer: _Hybrid,
}
"""What takes the place of a layer of transformers' cache."""


def _kind_for(kind: type) -> type[LogicalLayer] | None:
    if issubclass(kind, LogicalLayer):
        return kind
    return _Reference if getattr(kind, "_layer_type", None) == REFERENCE else _KINDS.get(kind)


def check_cache(cache: Cache | None) -> None:
    """Refuse caches that cannot hold a different length per layer. Raises `UnsupportedError`."""
    if cache is None:
        return
    if not isinstance(cache, DynamicCache):
        raise UnsupportedError(
            f"{type(cache).__name__} holds one length for all layers; use the default dynamic cache "
            "(no cache_implementation=)"
        )
    for layer in cache.layers:
        kind = type(layer)
        if _kind_for(kind) is None and kind.__name__ not in KEYLESS:
            raise UnsupportedError(f"a cache of {kind.__name__} cannot hold reduced prompts; use the dynamic cache")


def reduced_layers(cache: Any) -> Iterator[LogicalLayer]:
    """The layers of a cache that hold reduced prompts."""
    return (layer for layer in getattr(cache, "layers", ()) if isinstance(layer, LogicalLayer))


def logical_layer(cache: DynamicCache, layer: int, permit: Permit) -> LogicalLayer:
    """The `LogicalLayer` at `layer`, put in place of a plain or sliding one; what that one holds is adopted."""
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= layer:
        cache.layers.append(cache.layer_class_to_replicate())
    current = cache.layers[layer]
    if isinstance(current, LogicalLayer):
        return current
    assert isinstance(current, DynamicLayer)
    total, new = current.get_seq_length(), _put_in_place(cache, layer, permit)
    first = 0
    if isinstance(new, _Reference):  # transformers keeps the prompt by itself
        before = vars(new).pop("prefill_keys", None), vars(new).pop("prefill_values", None)
        if new.keys is not None and new.values is not None and before[0] is not None and before[1] is not None:
            new.prompt = first = before[0].shape[-2]
            new.keys, new.values = torch.cat([before[0], new.keys], -2), torch.cat([before[1], new.values], -2)
    if total and new.keys is not None:
        rows, stored, device = new.keys.shape[0], new.keys.shape[-2], new.keys.device
        slots = [torch.arange(first, device=device), torch.arange(total - stored + first, total, device=device)]
        new.fill(torch.cat(slots).expand(rows, stored), total, None, False)
    return new


def fill_layers(
    cache: DynamicCache, permit: Permit, slots: Tensor, total: int, next_position: Tensor | None, filled: bool
) -> None:
    """What the plain layers of a cache hold are the keys of these slots (B, n), of `total` logical ones."""
    for layer in range(len(cache.layers)):
        _put_in_place(cache, layer, permit).fill(slots, total, next_position, filled)


def _put_in_place(cache: DynamicCache, layer: int, permit: Permit) -> LogicalLayer:
    current = cache.layers[layer]
    kind = _kind_for(type(current))
    assert kind is not None  # check_cache has seen to it
    new = kind(getattr(current, "sliding_window", None), permit)
    vars(new).update(vars(current))
    cache.layers[layer] = new
    return new


def physical_lengths(cache: Cache) -> list[int]:
    """Keys really stored per layer."""
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    return [0 if stored is None or stored.dim() < 2 else stored.shape[-2] for stored in keys]
