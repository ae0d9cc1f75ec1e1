"""One question on its way: generation that streams and can be stopped, and both models timed in turns."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from transformers import StoppingCriteria, TextStreamer

from ..engine.apply import apply
from ..evaluate.answer import VLM, prefill_seconds
from ..reduction import Reducer

__all__ = ["Job", "Stopped", "Times", "generate", "time_both"]

_TIMED_TOKENS = 9
_ROUNDS = (3, 15)  # least and most
_ENOUGH = (1.5, 8.0)
"""Seconds after which no round is begun, given `_ROUNDS[0]` of them, and in any case: a large model is timed once."""


class Stopped(Exception):
    """Nobody waits for this any more."""


class Job:
    """One question on its way: what its reader is told, and whether there still is one."""

    def __init__(self, stamp: float):
        self.stamp = stamp
        self.stop = threading.Event()
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.emit = self.events.put

    def check(self) -> None:
        if self.stop.is_set():
            raise Stopped


class _Stream(TextStreamer):
    """Hands on the text so far, and remembers when each token came."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._say, self._text = say, ""
        self.times: list[float] = []

    @property
    def text(self) -> str:
        return self._text.strip()

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._text += text
        self._say(self.text)


class _StopWhen(StoppingCriteria):
    def __init__(self, stop: threading.Event):
        self.stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.stop.is_set(), dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def generate(vlm: VLM, inputs: dict, job: Job, longest: int, say: Callable[[str], None], shortest: int = 0) -> _Stream:
    """A greedy answer; raises `Stopped` if nobody waits for it any more."""
    stream = _Stream(vlm.tokenizer, say)
    vlm.model.generate(  # type: ignore[operator]
        **inputs,
        max_new_tokens=longest,
        min_new_tokens=shortest,
        do_sample=False,
        pad_token_id=vlm.tokenizer.pad_token_id,
        streamer=stream,
        stopping_criteria=[_StopWhen(job.stop)],
    )
    job.check()
    return stream


Times = tuple[list[float], list[float]]
"""Seconds of the full and of the reduced model, one each per round."""


def time_both(vlm: VLM, inputs: dict, reducer: Reducer, job: Job) -> Iterator[tuple[Times, Times]]:
    """Prefills and decoding steps, full and reduced in turns; yields all times so far after each round.

    Both were warmed up by answering. The order is reversed every other round.
    """
    prefill: Times = ([], [])
    decode: Times = ([], [])
    start = time.perf_counter()
    for turn in range(_ROUNDS[1]):
        for side in (0, 1)[:: -1 if turn % 2 else 1]:
            session: AbstractContextManager = apply(vlm.model, reducer) if side else nullcontext()
            with session:
                prefill[side].append(prefill_seconds(vlm, inputs))
                times = generate(vlm, inputs, job, _TIMED_TOKENS, lambda text: None, _TIMED_TOKENS).times
            # The streamer is given the prompt, then each token: the first of them took the prefill.
            decode[side].extend(later - sooner for sooner, later in pairwise(times[1:]))
        yield prefill, decode
        if time.perf_counter() - start > _ENOUGH[turn + 1 < _ROUNDS[0]]:
            return
