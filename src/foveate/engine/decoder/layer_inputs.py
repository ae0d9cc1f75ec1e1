"""What a decoder layer is handed in place of what its decoder hands it: fewer rows, and the mask, rotation and ids of
these.

All of it depends on which slots run, on what the layer's cache holds and on what the decoder hands over, not on the
layer: it is made once and looked up by the next layers of the same kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...reduction import UnsupportedError
from ..compat import check_arguments
from ..families.parts import Anatomy
from .cache import LogicalLayer, Permit, logical_layer, reduced_layers
from .frame import ActiveSet, take_rope, take_rows
from .masks import Reach, reduced_mask
from .shared import SharedKeys

__all__ = ["Handed", "LayerInputs"]

_MADE_HERE = (
    "hidden_states", "attention_mask", "position_embeddings", "position_ids", "shared_kv_states", "relative_distance",
)  # fmt: skip


@dataclass(frozen=True)
class Handed:
    """Arguments of one layer.

    Attributes:
        arguments: by name, without the hidden states; None: those that the decoder gave.
        reach: who may look at whom; None: as in the plain model.
        rope: the position embeddings.
        given: what it was made of, held so that its place in memory is not taken by something else.
    """

    arguments: dict[str, Any] | None
    reach: Reach | None
    rope: Any
    given: tuple[Any, ...] = ()


class LayerInputs:
    """Of one pass of `B` rows and `S` slots.

    Args:
        anatomy: of the model.
        rows: B.
        length: S.
        past: logical length of the cache before this pass.
        device: where masks of slots live.
        stages: layers after which slots may go.

    Attributes:
        active: the slots that are still computed, None: all.
        keys_per_layer: keys that each layer attends to.
        plain: as long as all slots are active, every layer is called as in the plain model.
        counting: the cache layer of the decoder layer that was asked for last, if that numbers its tokens itself.
    """

    def __init__(
        self, anatomy: Anatomy, rows: int, length: int, past: int, device: torch.device, stages: tuple[int, ...] = ()
    ):
        self.anatomy, self.rows, self.length, self.past, self._device = anatomy, rows, length, past, device
        self._stages = stages
        self.active: ActiveSet | None = None
        self.plain = False
        without = (*anatomy.keyless, *anatomy.shared_keys)
        self.keys_per_layer = [0 if i in without else past + length for i in range(anatomy.depth)]
        self.shared = SharedKeys(anatomy.shared_keys, past, length)
        self._permit: Permit | None = None
        self.counting: LogicalLayer | None = None
        self._memo: dict[Any, Any] = {}
        self._ready: dict[int, tuple[tuple, Handed]] = {}
        self._positions: Tensor | None = None
        self._next: Tensor | None = None

    def begin(self, cache: Any) -> None:
        """The first layer is called, with this cache."""
        self.plain = not self.anatomy.shared_keys and not any(reduced_layers(cache))

    def shorten(self, active: ActiveSet) -> None:
        """From the next layer on, only these slots."""
        self.active, self._memo, self._ready = active, {}, {}

    def renumber(self) -> None:
        """From the next layer on, the slots that are left are numbered anew."""
        assert self.active is not None
        if self.past:
            raise UnsupportedError("positions='renumber' on a continued cache; use positions='keep'")
        numbers = self.active.keep.cumsum(1)
        self._positions, self._next = (numbers - 1).clamp_min(0), numbers[:, -1:]

    @property
    def positions(self) -> Tensor | None:
        """(B, S) for RoPE where they were renumbered."""
        return self._positions

    @property
    def next(self) -> Tensor | None:
        """(B, 1) position of the token that follows this pass where positions were renumbered."""
        return self._next

    def slots(self) -> tuple[Tensor, Tensor | None]:
        """(B, n) slots that run, and which of them are no fillers, None: all."""
        if self.active is not None:
            return self.active.index, self.active.valid
        if "rows" not in self._memo:
            self._memo["rows"] = torch.arange(self.length, device=self._device).expand(self.rows, -1)
        return self._memo["rows"], None

    def permit(self, cache: Any) -> Permit:
        """What the reduced layers of a cache share."""
        if self._permit is None:
            self._permit = next((layer.permit for layer in reduced_layers(cache)), None) or Permit()
        return self._permit

    # ------------------------------------------------------------------------------------------------- one layer
    def of(self, layer: int, given: dict[str, Any], cache: Any, hidden: Tensor, tokens: int) -> Handed:
        """What a layer is to be called with.

        Args:
            layer: number of the layer.
            given: what its decoder hands it, by name, without the hidden states.
            cache: the KV cache among them.
            hidden: (B, S, D) or its rows, for device and type.
            tokens: S; fewer where the decoder itself has cut it to the tokens whose logits are wanted.
        """
        ids = (tokens, *map(id, given.values()))
        ready = self._ready.pop(layer, None)
        if ready is not None and ready[0] == ids:
            self.counting = None
            return ready[1]
        stored = self._stored(layer, cache)
        kind = (self.anatomy.layer_kinds[layer], type(stored))
        key = (None if stored is None else stored.state, ids)
        made = self._memo.get(kind)
        if made is None or made[0] != key:
            made = self._memo[kind] = (key, self._made(layer, stored, given, hidden, tokens))
        handed: Handed = made[1]
        self._note(layer, handed.reach, stored)
        self.counting = stored if stored is not None and type(stored) is not LogicalLayer else None
        if self.counting is None:
            self._prepare(layer, cache, stored, ids, handed)
        return handed

    def _note(self, layer: int, reach: Reach | None, stored: LogicalLayer | None) -> None:
        if layer not in self.anatomy.keyless and layer not in self.anatomy.shared_keys:
            self.keys_per_layer[layer] = self.past + self.length if reach is None else reach.keys.shape[1]
            self.shared.ran(layer, reach, self.active, stored)
        if stored is not None and reach is not None:
            stored.announce(reach.keys, self._after(stored), self.length)
            stored.filled |= reach.valid is not None

    def _prepare(self, layer: int, cache: Any, stored: LogicalLayer | None, ids: tuple, handed: Handed) -> None:
        """Layers that are like this one, all at once: much cheaper than one by one, between two kernels."""
        kinds = self.anatomy.layer_kinds
        until = min((stage for stage in self._stages if stage >= layer), default=self.anatomy.depth - 1)
        state = None if stored is None else stored.state
        for other in range(layer + 1, until + 1):
            if kinds[other] != kinds[layer] or other in self._ready:
                continue
            theirs = self._stored(other, cache)
            if type(theirs) is type(stored) and (theirs is None or theirs.state == state):
                self._note(other, handed.reach, theirs)
                self._ready[other] = (ids, handed)

    def _made(
        self, layer: int, stored: LogicalLayer | None, given: dict[str, Any], hidden: Tensor, tokens: int
    ) -> Handed:
        reach = self._reach(layer, stored, given, tokens)
        held = (*given.values(), None if stored is None else stored.slots())
        if self.active is None and reach is None:
            return Handed(None, None, given.get("position_embeddings"), held)
        changed, rope = dict(given), given.get("position_embeddings")
        if self.active is not None and (reach is None or "conv_mask" in changed):
            changed["conv_mask" if "conv_mask" in changed else "attention_mask"] = self._recurrent_mask()
        elif self.active is not None and self.anatomy.reads_padding:
            valid = self._recurrent_mask()
            changed["attention_mask"] = torch.ones_like(self.active.index, dtype=torch.bool) if valid is None else valid
        if reach is not None:
            if not self.anatomy.reads_padding:
                changed["attention_mask"] = self._mask(changed.get("attention_mask"), reach, hidden.dtype)
            if "relative_distance" in changed:
                changed["relative_distance"] = _distances(reach)
            if rope is not None and tokens == self.length:
                changed["position_embeddings"] = rope = self._rope(layer, rope, hidden, stored, reach)
        if self.active is not None and tokens == self.length:
            changed = self._take_others(changed)
        return Handed(changed, reach, rope, held)

    def _stored(self, layer: int, cache: Any) -> LogicalLayer | None:
        if cache is None or layer in self.anatomy.keyless or layer in self.anatomy.shared_keys:
            return None
        if self.active is not None:
            return logical_layer(cache, layer, self.permit(cache))
        current = cache.layers[layer] if layer < len(cache.layers) else None
        return current if isinstance(current, LogicalLayer) else None

    # ------------------------------------------------------------------------------------------------- keys, masks
    def _reach(self, layer: int, stored: LogicalLayer | None, given: Mapping[str, Any], queries: int) -> Reach | None:
        """None where a layer has no keys, or where neither its tokens nor its keys have changed."""
        source = self.anatomy.shared_keys.get(layer)
        if source is not None:
            return self.shared.reach(
                layer, source, given.get("shared_kv_states"), self.active, (*self.slots(), self.past), queries,
                self._positions is not None, self.implementation,
            )  # fmt: skip
        if layer in self.anatomy.keyless or (self.active is None and stored is None):
            return None
        window = self.anatomy.sliding_windows[layer]
        rows, valid = self.slots()
        if stored is None:
            keys = rows if valid is None else torch.where(valid, rows, -1)
            return Reach(keys, rows, rows, valid, valid is not None, 0, self.length, window)
        kept = self._keys(stored)
        index = rows if self.active is not None else None
        pinned = getattr(stored, "prefill_length", None) or 0
        filled = stored.filled or valid is not None
        return Reach(kept, rows + self.past, index, valid, filled, self.past, self.length, window, pinned)

    def _keys(self, stored: LogicalLayer) -> Tensor:
        """(B, N) slots of the keys when those of this pass have come; one tensor for layers that hold the same."""
        key = ("keys", *stored.state)
        if key not in self._memo:
            rows, valid = self.slots()
            new = rows + self.past if valid is None else torch.where(valid, rows + self.past, -1)
            before = stored.slots()
            self._memo[key] = (new if before is None else torch.cat([before, new], 1), before)
        return self._memo[key][0]

    def _after(self, stored: LogicalLayer) -> Tensor | None:
        """(B, 1) position of the token that follows this pass in a layer, None where the model's own holds."""
        if stored.next is None:
            return self._next
        key = ("after", *stored.state)
        if key not in self._memo:
            self._memo[key] = (stored.next + self.length, stored.slots())
        return self._memo[key][0]

    @property
    def implementation(self) -> str:
        """Of attention in this decoder."""
        return getattr(self.anatomy.decoder.config, "_attn_implementation", None) or "eager"

    def _mask(self, mask: Any, reach: Reach, dtype: torch.dtype) -> Tensor | None:
        key = ("mask", id(mask), id(reach.keys), reach.window)
        if key not in self._memo:
            self._memo[key] = (reduced_mask(mask, reach, self.implementation, dtype), mask, reach.keys)
        return self._memo[key][0]

    def _recurrent_mask(self) -> Tensor | None:
        """Fillers of ragged rows stand on the left, where a recurrent layer takes them for padding and zeroes them."""
        assert self.active is not None
        if self.active.valid is not None and self.past:
            raise UnsupportedError(
                "rows of a batch that keep different numbers of tokens cannot go on from a recurrent state "
                "(linear attention, convolution): give each row a call of its own, or a budget in tokens"
            )
        return self.active.valid

    # --------------------------------------------------------------------------------------------------- positions
    def _rope(self, layer: int, rope: Any, hidden: Tensor, stored: LogicalLayer | None, reach: Reach) -> Any:
        counted = self._positions is not None or (stored is not None and stored.next is not None)
        window = self.anatomy.sliding_windows[layer]
        if counted and window is not None and self.past + self.length > window:
            raise UnsupportedError(
                "renumbered positions do not go with an exceeded sliding window; use positions='keep'"
            )
        key = ("rope", id(rope[0] if isinstance(rope, tuple | list) else rope), stored.state if stored else None)
        if key not in self._memo:
            if counted:
                new = self.anatomy.rotary(layer, hidden, self._counted_positions(stored).to(hidden.device))
            else:
                new = self._kept_rope(rope, reach)
            self._memo[key] = (new, rope, stored.slots() if stored else None)
        return self._memo[key][0]

    def _kept_rope(self, rope: Any, reach: Reach) -> Any:
        part = rope[0] if isinstance(rope, tuple | list) else rope
        if self.past and isinstance(part, Tensor) and part.shape[-2] == reach.total:
            return take_rope(rope, reach.keys.clamp_min(0), reach.total)  # an index rotates the cached keys, too
        return rope if self.active is None else take_rope(rope, self.active.index, self.length)

    def _counted_positions(self, stored: LogicalLayer | None) -> Tensor:
        """Positions (B, n) that are not the model's own: as renumbered, or going on from a layer's own length."""
        rows = self.slots()[0]
        if self._positions is not None:
            return self._positions.gather(1, rows)
        assert stored is not None
        assert stored.next is not None
        return stored.next + rows

    # ------------------------------------------------------------------------------------------------- all the rest
    def _take(self, value: Any) -> Any:
        if self.active is not None and isinstance(value, Tensor) and value.shape[:2] == (self.rows, self.length):
            return take_rows(value, self.active)
        return value

    def _take_others(self, given: dict[str, Any]) -> dict[str, Any]:
        assert self.active is not None
        check_arguments(given, self.rows, self.length, _MADE_HERE)
        taken = {name: value if name in _MADE_HERE else self._take(value) for name, value in given.items()}
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
            taken["position_ids"] = ids.expand(self.rows, -1)
        return taken


def _distances(reach: Reach) -> Tensor:
    """Of each query to each stored key, (n, N), in tokens that are left: beside a convolution only these count."""
    stored = torch.arange(reach.keys.shape[1], device=reach.keys.device)
    return stored[-reach.queries.shape[1] :, None] - stored
