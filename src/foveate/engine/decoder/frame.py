"""The full frame: a hidden state of the prompt's whole length, of which a layer runs only the active rows.

Rows are copied whole (`index_select`, `index_copy`): several times cheaper than gather and scatter with an index
expanded over the hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ops.host import to_device
from ...reduction import UnsupportedError

__all__ = ["ActiveSet", "put_rows", "take_rope", "take_rows"]


@dataclass(frozen=True)
class ActiveSet:
    """The slots of a frame (B, S, D) that are still computed; rows of a ragged batch are right-aligned.

    Attributes:
        keep: (B, S) bool.
        index: (B, n) slot of each row that runs; a filler points at an inactive slot of its own row.
        valid: (B, n) bool, False for fillers; None if there are none.
        real: (tokens,) long, places in (B * n) that are no fillers; None if all are real.
        tail: slots at the end of the frame that are computed in every row.
    """

    keep: Tensor
    index: Tensor
    valid: Tensor | None
    real: Tensor | None
    tail: int = 0
    _on: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, keep: np.ndarray, device: torch.device) -> ActiveSet:
        """From a mask (B, S) on the host: a dozen kernels would find out the same."""
        counts = [np.count_nonzero(row) for row in keep]
        longest, gaps = max(counts), (~keep).any(axis=0).nonzero()[0]
        tail = keep.shape[1] - int(gaps[-1]) - 1 if len(gaps) else keep.shape[1]
        on_device = to_device(keep, device)
        if min(counts) == longest:
            index = keep.nonzero()[1].reshape(len(keep), longest)
            return cls(on_device, to_device(index, device), None, None, tail)
        index = keep.argsort(axis=1, kind="stable")[:, keep.shape[1] - longest :]
        valid = np.take_along_axis(keep, index, 1)
        real = valid.reshape(-1).nonzero()[0]
        return cls(on_device, to_device(index, device), to_device(valid, device), to_device(real, device), tail)

    @property
    def size(self) -> int:
        """Rows that run per sample, fillers included."""
        return self.index.shape[1]

    def flat(self, device: torch.device) -> Tensor:
        """(B * n,) rows of the frame seen as (B * S, D)."""
        if device not in self._on:
            batch, length = self.keep.shape
            offset = torch.arange(0, batch * length, length, device=self.index.device)[:, None]
            self._on[device] = (self.index + offset).reshape(-1).to(device)
        return self._on[device]


def take_rows(frame: Tensor, active: ActiveSet) -> Tensor:
    """(B, S, ...) -> (B, n, ...)."""
    rows = frame.flatten(0, 1).index_select(0, active.flat(frame.device))
    return rows.view(*active.index.shape, *frame.shape[2:])


def put_rows(frame: Tensor, active: ActiveSet, rows: Tensor) -> Tensor:
    """A frame (B, S, ...) with rows (B, n, ...) in their places, a new tensor."""
    index, rows = active.flat(rows.device), rows.flatten(0, 1)
    if active.real is not None:  # removed slots stay as they were
        real = active.real.to(rows.device)
        index, rows = index[real], rows.index_select(0, real)
    frame = frame.to(rows.device)
    return frame.flatten(0, 1).index_copy(0, index, rows).view(frame.shape)


def take_rope(rope: Any, index: Tensor, length: int) -> Any:
    """cos/sin of the active rows, in whatever shape the family hands them to its layers.

    Args:
        rope: a tensor or a tuple of tensors, (B or 1, S, d).
        index: (B, n) slots.
        length: S.
    """
    if isinstance(rope, tuple | list):
        return type(rope)(take_rope(part, index, length) for part in rope)
    if not isinstance(rope, Tensor):
        return rope
    index = index.to(rope.device)
    batch, n = index.shape
    if rope.dim() == 3 and rope.shape[1] == length:
        if rope.shape[0] == 1:
            return rope[0].index_select(0, index.reshape(-1)).view(batch, n, -1)
        return rope.gather(1, index[..., None].expand(batch, n, rope.shape[-1]))
    raise UnsupportedError(f"position embeddings of shape {tuple(rope.shape)} cannot be reduced")
