"""Layers that attend to the keys of an earlier layer (Gemma 4 E, Gemma 3n): what was removed in between stays unseen.

The earlier layer keeps its keys; of them, a later one may see those whose tokens still enter it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...reduction import UnsupportedError
from ..trace import Trace
from .cache import SEEN_BY_ALL, LogicalLayer, Permit, logical_layer
from .frame import ActiveSet
from .masks import Reach

__all__ = ["SharedKeys"]


class SharedKeys:
    """Of one forward pass.

    Args:
        shares: {layer: layer whose keys it reads}.
        past: logical length before the pass.
        length: of the pass.
    """

    def __init__(self, shares: Mapping[int, int], past: int, length: int):
        self._sources = frozenset(shares.values())
        self._past, self._length = past, length
        self._ran: dict[int, tuple[Reach | None, ActiveSet | None, Tensor | None]] = {}

    def ran(self, layer: int, reach: Reach | None, active: ActiveSet | None, stored: LogicalLayer | None) -> None:
        """Note what a layer is given, before it runs."""
        if layer in self._sources:
            self._ran[layer] = (reach, active, None if stored is None else stored.until)

    def reach(
        self,
        layer: int,
        source: int,
        states: Mapping[str, tuple[Tensor, Tensor]] | None,
        active: ActiveSet | None,
        rows: tuple[Tensor, Tensor | None, int],
        queries: int,
        counted: bool,
        implementation: str,
    ) -> Reach | None:
        """Who may look at whom in a layer that reads the keys of `source`; None if all may, as in the plain model.

        Args:
            layer: number of the layer.
            source: number of the layer whose keys it reads.
            states: keys and values by type of layer, as the decoder hands them on.
            active: slots that are still computed, None: all.
            rows: slots (B, n) of the queries, which are real, and the logical length before them.
            queries: tokens of the layer; fewer than the pass has, if the decoder cut them to those at the end.
            counted: positions were renumbered.
            implementation: of attention.

        Raises:
            UnsupportedError: the combination cannot be served.
        """
        reach, before, until = self._ran[source]
        if active is None and reach is None:
            return None
        index, valid, past = rows
        total, window = past + self._length, None
        if reach is None:
            stored = next(keys.shape[-2] for keys, _ in (states or {}).values())
            keys = torch.arange(total - stored, total, device=index.device).expand(index.shape[0], -1)
        else:
            keys, window = reach.keys, reach.window
        hidden = until is not None or active is not before
        if hidden and counted and active is not before:
            raise UnsupportedError(
                "positions cannot be renumbered between a layer and the later ones that share its keys; "
                "use positions='keep'"
            )
        if hidden and "flash" in implementation and queries > 1:
            raise UnsupportedError(
                "flash attention cannot hide removed tokens among keys that several layers share; "
                "load this model with attn_implementation='sdpa'"
            )
        seen = keys >= 0
        if active is not None and active is not before:
            now = keys - past
            seen = seen & ((now < 0) | active.keep.gather(1, now.clamp_min(0)))
        if until is not None:
            seen = seen & (pad(until, (0, keys.shape[1] - until.shape[1]), value=SEEN_BY_ALL) > layer)
        if hidden:
            keys = torch.where(seen, keys, -1)
        filled = hidden or (reach is not None and reach.filled)
        if queries < self._length:
            index = torch.arange(self._length - queries, self._length, device=index.device).expand(len(index), -1)
            return Reach(keys, index + past, None, None, filled, past, self._length, window)
        asked = index if active is not None else None
        return Reach(keys, index + past, asked, valid, filled, past, self._length, window)

    def remember(self, cache: Any, permit: Permit, trace: Trace, active: ActiveSet) -> None:
        """After the pass: write into the cache which later layer is the first that must not see a key."""
        for source, (_, before, _) in self._ran.items():
            if before is active:
                continue
            layer = logical_layer(cache, source, permit)
            kept = layer.kept
            if kept is None:
                continue
            gone = torch.full_like(trace.visual, SEEN_BY_ALL, dtype=torch.long)
            for record in trace.records:
                gone = torch.where(record.active, gone, gone.clamp_max(record.stage + 1))
            slot = kept - self._past
            known = (slot >= 0) & (slot < gone.shape[1])
            new = gone.to(kept.device).gather(1, slot.clamp(0, gone.shape[1] - 1))
            base = torch.full_like(kept, SEEN_BY_ALL) if layer.until is None else layer.until
            layer.until = torch.where(known, torch.minimum(new, base), base)
