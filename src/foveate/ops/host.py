"""Between device and host: many tensors in one copy, for which the host waits once; and a way back without waiting.

Greedy choices depend on each other, one by one. On a device each would be a handful of kernels; on the host it is a
microsecond or two, so that all of them cost one wait and one copy of a bounded block of numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["BLOCK", "host_copies", "to_device", "to_host"]

BLOCK = 1024
"""Tokens of a block: at most BLOCK x BLOCK numbers of a sample are handed over at a time."""

_COPIES: Any = WeakTensorKeyDictionary()
_BLOCKING = ("mps", "xpu")
"""Devices on which a copy from ordinary memory must be waited for."""


def to_host(*tensors: Tensor) -> list[np.ndarray]:
    """The tensors of one device as arrays, after one copy. On a CPU they share memory: not to be written to."""
    tensors = tuple(tensor.detach() for tensor in tensors)
    if tensors[0].device.type == "cpu":
        return [_array(tensor) for tensor in tensors]
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())  # so that all are aligned
    flat = torch.cat([tensors[i].contiguous().view(-1).view(torch.uint8) for i in order]).cpu()
    parts = flat.split([tensors[i].numel() * tensors[i].element_size() for i in order])
    arrays = {i: part.view(tensors[i].dtype).view(tensors[i].shape).numpy() for i, part in zip(order, parts)}
    return [arrays[i] for i in range(len(tensors))]


def _array(tensor: Tensor) -> np.ndarray:
    try:
        return tensor.numpy()
    except RuntimeError:  # inside torch.func, where a tensor has no memory of its own
        return np.array(tensor.tolist(), dtype=str(tensor.dtype).removeprefix("torch."))


def to_device(values: Sequence[Any] | np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Numbers of the host on a device; the host does not wait for what the device is doing."""
    values = torch.as_tensor(values)
    return values if device.type == "cpu" else values.to(device, non_blocking=device.type not in _BLOCKING)


def host_copies(*tensors: Tensor) -> list[Tensor]:
    """Tensors on the CPU, after one copy, which is made once as long as the first of them lives and none changes."""
    away = [tensor for tensor in tensors if tensor.device.type != "cpu"]
    if not away:
        return list(tensors)
    versions = [None if tensor.is_inference() else tensor._version for tensor in away]
    known = _COPIES.get(away[0])
    if known is None or known[1] != versions or any(a is not b for a, b in itertools.zip_longest(known[0], away[1:])):
        known = away[1:], versions, [torch.from_numpy(part) for part in to_host(*away)]
        _COPIES[away[0]] = known
    copies = iter(known[2])
    return [tensor if tensor.device.type == "cpu" else next(copies) for tensor in tensors]
