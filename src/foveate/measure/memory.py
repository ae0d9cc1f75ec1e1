"""Peak memory of a piece of work: the CUDA allocator on a GPU, resident memory (RSS) of the process on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Peak", "free_bytes", "peak_memory"]

_STATUS, _REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


@dataclass
class Peak:
    """Bytes, complete once the block is left.

    Attributes:
        before: in use when the block was entered.
        peak: most that was in use inside it, `before` included; None where the system does not tell.
    """

    before: int = 0
    peak: int | None = None

    @property
    def added(self) -> int | None:
        """What the work needed on top of what was there."""
        return None if self.peak is None else max(self.peak - self.before, 0)


@contextlib.contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[Peak]:
    """Measure the block: `with peak_memory() as found: ...`, then `found.peak`.

    On a CPU the kernel's own high-water mark of the process is reset (Linux: `/proc/self/clear_refs`) and read, so that
    short peaks count as well; memory that earlier work has freed, but the C library kept, is given back first.
    """
    device, found = torch.device(device), Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        found.before = torch.cuda.memory_allocated(device)
        yield found
        torch.cuda.synchronize(device)
        found.peak = torch.cuda.max_memory_allocated(device)
        return
    _trim()
    told = _reset()
    found.before = _status("VmRSS")
    yield found
    found.peak = _status("VmHWM") if told else None


def free_bytes(device: torch.device | str = "cpu") -> int | None:
    """Memory that can still be taken; None where the system does not tell."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return None


def _trim() -> None:
    with contextlib.suppress(OSError, AttributeError):  # only the GNU C library has it
        ctypes.CDLL(None).malloc_trim(0)


def _reset() -> bool:
    try:
        _REFS.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    """Bytes of an entry of the process's status, 0 where there is none."""
    with contextlib.suppress(OSError, StopIteration):
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name + ":")).split()[1])
    return 0
