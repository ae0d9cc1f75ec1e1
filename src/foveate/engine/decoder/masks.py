"""The attention mask of a reduced layer, gathered out of the mask that transformers built for all tokens.

Nothing is rebuilt, so padding, sliding windows, bidirectional image blocks and prefix masks are right by construction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...reduction import UnsupportedError

__all__ = ["Reach", "reduced_mask"]


@dataclass(frozen=True)
class Reach:
    """Who may look at whom in one layer of one pass.

    Attributes:
        keys: (B, N) logical slot of each key, -1 for fillers.
        queries: (B, n) logical slot of each query.
        rows: (B, n) row of the frame of each query, None if all of the frame runs.
        valid: (B, n) False for filler queries, None if there are none.
        filled: whether any key may be a filler.
        past: logical length before this pass.
        length: logical length of this pass.
        window: sliding window of the layer.
        pinned: slots at the start that never leave the cache or a mask, whatever slides behind them.
    """

    keys: Tensor
    queries: Tensor
    rows: Tensor | None
    valid: Tensor | None
    filled: bool
    past: int
    length: int
    window: int | None
    pinned: int = 0

    def to(self, device: torch.device) -> Reach:
        """The same, with its tensors on a device."""
        if self.keys.device == device:
            return self
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    @property
    def total(self) -> int:
        """Logical length after this pass."""
        return self.past + self.length


def reduced_mask(mask: Any, reach: Reach, implementation: str, dtype: torch.dtype) -> Tensor | None:
    """The mask for the queries and keys that are left.

    Args:
        mask: what transformers handed the layer: None, (B, T) for flash attention, or (B or 1, H or 1, S, T).
        reach: who is left.
        implementation: attention implementation of the decoder.
        dtype: of the hidden states, for additive masks.

    Raises:
        UnsupportedError: flex attention, or flash attention beyond a sliding window.
    """
    flash = "flash" in implementation
    if flash and reach.window is not None and reach.total > reach.window:
        raise UnsupportedError(
            "flash attention counts a sliding window in stored tokens, not in positions; "
            "load this model with attn_implementation='sdpa'"
        )
    if mask is None:
        return _from_nothing(reach, implementation, dtype)
    if not isinstance(mask, Tensor):
        raise UnsupportedError(f"an attention mask of type {type(mask).__name__} cannot be reduced; use sdpa or eager")
    batch = reach.keys.shape[0]
    # A mask may be shorter than the logical length: sliding caches leave its oldest columns out.
    column = reach.keys - (reach.total - mask.shape[-1])
    if reach.pinned:
        column = torch.where(reach.keys < reach.pinned, reach.keys, column)
    seen = (reach.keys >= 0) & (column >= 0)
    column = column.clamp_min(0)
    if mask.dim() == 2:
        return mask.expand(batch, -1).gather(1, column).bool() & seen
    mask = mask.expand(batch, *mask.shape[1:])
    if reach.rows is not None:
        mask = _gather_rows(mask, reach.rows)
    mask = mask.gather(3, column[:, None, None].expand(*mask.shape[:3], column.shape[1]))
    if mask.dtype == torch.bool:
        return _finish(mask & seen[:, None, None], reach, implementation, dtype)
    mask = mask.masked_fill(~seen[:, None, None], torch.finfo(mask.dtype).min)
    return mask if reach.valid is None else mask.masked_fill(~reach.valid[:, None, :, None], 0.0)


def _gather_rows(mask: Tensor, rows: Tensor) -> Tensor:
    index = rows[:, None, :, None].expand(rows.shape[0], mask.shape[1], rows.shape[1], mask.shape[3])
    return mask.gather(2, index)


def _from_nothing(reach: Reach, implementation: str, dtype: torch.dtype) -> Tensor | None:
    out_of_window = reach.window is not None and reach.total > reach.window
    plain = reach.length == 1 or reach.past == 0
    if plain and not reach.filled and not out_of_window:
        return None  # "causal" and "all" stay right: the order of the tokens is preserved
    if "flash" in implementation:
        return reach.keys >= 0 if reach.filled else None  # it aligns causally by stored order itself
    seen = (reach.keys[:, None] >= 0) & (reach.keys[:, None] <= reach.queries[..., None])
    if reach.window is not None:
        seen = seen & (reach.queries[..., None] - reach.keys[:, None] < reach.window)
    return _finish(seen[:, None], reach, implementation, dtype)


def _finish(seen: Tensor, reach: Reach, implementation: str, dtype: torch.dtype) -> Tensor:
    if reach.valid is not None:
        seen = seen | ~reach.valid[:, None, :, None]  # a filler query that sees nothing would be NaN
    if implementation != "eager":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
