"""Where the time of an answer goes: vision, deciding, the rest of the prefill, decoding.

Wall-clock: CUDA events on a GPU, `perf_counter` on a CPU; there also the process's CPU time, which whoever shares the
machine disturbs less. One call of `generate` gives all of it: hooks on the model tell where the prefill ends, a wrapper
around `get_*_features` what the images cost, and the engine's marks (`engine.stopwatch`) what deciding costs.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..engine.apply import apply
from ..engine.compat import returned_cache
from ..engine.families.parts import Anatomy, resolve
from ..engine.stopwatch import watched
from ..engine.trace import Trace
from ..ops.logits import has_softmax
from ..reduction import Reducer, UnsupportedError

__all__ = ["Run", "Timing", "timed"]

_ENCODERS = ("get_image_features", "get_video_features")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one answer of a batch.

    Attributes:
        vision: tower and connector, without what was done there in order to decide.
        reduce: decisions and taps, wherever they happen before the first token.
        decoder: the rest of the prefill: layers, head, and the preparations of `generate`.
        prefill: all of it, from the call to the first token: vision + reduce + decoder.
        decode: per further token of the batch; 0 if there was none.
        total: of the whole answer.
        prefill_cpu, total_cpu: CPU time of the process, all threads; equal to wall-clock on one undisturbed thread.
    """

    vision: float
    reduce: float
    decoder: float
    prefill: float
    decode: float
    total: float
    prefill_cpu: float
    total_cpu: float


@dataclass(frozen=True)
class Run:
    """One timed answer, and what the engine wrote down about its prefill."""

    timing: Timing
    trace: Trace | None
    """None for the unreduced model."""
    cache_bytes: int
    """Keys and values at the end of the answer, as stored."""
    sound: bool = True
    """Whether all logits were numbers, as far as that was checked."""


class _Watch:
    """Points in time on one device, and nested spans between them."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.spans: list[tuple[str, int | None, Any, Any]] = []
        """What, number of the enclosing span, start, end."""
        self._open: list[int] = []

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds; on a GPU only after it has been waited for."""
        return start.elapsed_time(end) if self.cuda else 1000 * (end - start)

    @contextlib.contextmanager
    def span(self, what: str) -> Iterator[None]:
        number, parent = len(self.spans), self._open[-1] if self._open else None
        start = self.now()
        self.spans.append((what, parent, start, start))
        self._open.append(number)
        try:
            yield
        finally:
            self._open.pop()
            self.spans[number] = (what, parent, start, self.now())

    def spent(self, what: str, stop: int) -> float:
        """Milliseconds in the first `stop` spans called `what`, without what other spans took inside them."""
        total = 0.0
        for name, parent, start, end in self.spans[:stop]:
            outer = None if parent is None else self.spans[parent][0]
            total += (name == what) * self.between(start, end) - (outer == what) * self.between(start, end)
        return total


class _Marks:
    """Hooks that note when the first forward pass of the model ended, and how long its images took."""

    def __init__(self, anatomy: Anatomy, watch: _Watch):
        self.anatomy, self.watch = anatomy, watch
        self.first: Any = None
        self.first_cpu = 0.0
        self.spans = 0

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        handle = self.anatomy.model.register_forward_hook(self._done)
        before = {name: self.anatomy.base.__dict__.get(name) for name in _ENCODERS}
        for name in _ENCODERS:
            encode = getattr(self.anatomy.base, name, None)
            if encode is not None:
                # functools.wraps keeps the signature, which generate() inspects to find out what to pass.
                self.anatomy.base.__dict__[name] = functools.wraps(encode)(self._timed(encode))
        try:
            yield
        finally:
            handle.remove()
            for name, was in before.items():
                self.anatomy.base.__dict__.pop(name, None)
                if was is not None:
                    self.anatomy.base.__dict__[name] = was

    def _timed(self, encode: Callable) -> Callable:
        def encoded(*args: Any, **kwargs: Any) -> Any:
            with self.watch.span("vision"):
                return encode(*args, **kwargs)

        return encoded

    def _done(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.first is None:
            self.first, self.first_cpu = self.watch.now(), time.process_time()
            self.spans = len(self.watch.spans)


@torch.inference_mode()
def timed(
    model: Any, inputs: Mapping[str, Any], reducer: Reducer | None, new_tokens: int = 16, check: bool = False
) -> Run:
    """Answer once with exactly `new_tokens` tokens (greedy), and say where the time went.

    Args:
        model: a vision-language model; not patched afterwards.
        inputs: what `generate` is called with.
        reducer: the method, None for the unreduced model.
        new_tokens: tokens of the answer, at least 1.
        check: also look for NaN and infinite logits, which takes some time of the answer.

    Raises:
        UnsupportedError: whatever `apply` raises; another device than a CPU or CUDA.
    """
    anatomy = resolve(model)
    device = next(anatomy.model.parameters()).device
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"device {device}: only a CPU and CUDA can be timed")
    watch = _Watch(device)
    marks = _Marks(anatomy, watch)
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "num_beams": 1}
    options |= {"do_sample": False, "use_cache": True, "output_logits": check}
    if getattr(model.generation_config, "pad_token_id", None) is None:
        options["pad_token_id"] = 0
    with apply(model, reducer) if reducer is not None else nullcontext() as session, marks.installed():
        collecting = gc.isenabled()
        gc.disable()
        try:
            _wait(watch)
            start, start_cpu = watch.now(), time.process_time()
            with watched(lambda: watch.span("reduce")):
                output = model.generate(**inputs, **options, return_dict_in_generate=True)
            end, end_cpu = watch.now(), time.process_time()
            _wait(watch)
        finally:
            if collecting:
                gc.enable()
        trace = session.trace if session is not None else None
    prefill, total = watch.between(start, marks.first), watch.between(start, end)
    vision, reduce = watch.spent("vision", marks.spans), watch.spent("reduce", marks.spans)
    timing = Timing(
        vision=vision,
        reduce=reduce,
        decoder=prefill - vision - reduce,
        prefill=prefill,
        decode=(total - prefill) / (new_tokens - 1) if new_tokens > 1 else 0.0,
        total=total,
        prefill_cpu=1000 * (marks.first_cpu - start_cpu),
        total_cpu=1000 * (end_cpu - start_cpu),
    )
    layers = getattr(returned_cache(output), "layers", ())
    sound = all(bool(has_softmax(logits).all()) for logits in output.logits or ())
    return Run(timing, trace, sum(layer.keys.nbytes + layer.values.nbytes for layer in layers), sound)


def _wait(watch: _Watch) -> None:
    if watch.cuda:
        torch.cuda.synchronize()
