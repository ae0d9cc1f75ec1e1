"""What the page does when it is asked something: load, answer twice, time, and give the model back as it was.

Lives here: `Runner`, which owns the one loaded model and lets one question at a time near it. No Gradio in this file.
"""

from __future__ import annotations

import hashlib
import logging
import math
import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..engine.apply import apply
from ..engine.trace import Trace
from ..evaluate.answer import VLM, ModelError, load
from ..evaluate.data import DataError, Sample, open_image
from ..evaluate.grid import COMPANIONS, build_reducer
from ..measure import Geometry, exact_flops, kv_bytes, prefill_flops
from ..recipe import Recipe
from ..reduction import BudgetError, OptionError, Reducer, UnsupportedError
from ..view.seen import as_seen
from .answer import Job, Stopped, Times, generate, time_both
from .options import LONGEST_TEXT, offered

__all__ = ["AskError", "Bill", "Progress", "Question", "Runner", "Stopped", "explain", "read_image"]

_log = logging.getLogger(__name__)

_REMEMBERED = 64
"""Answers of the full model that are kept for the next question about the same picture."""


class AskError(ValueError):
    """Something on the page cannot be used; the message says what, in one line."""


@dataclass(frozen=True)
class Question:
    """What the page holds when one presses Ask.

    Attributes:
        model: as for `evaluate.answer.load`.
        image: a file.
        method, keep, options: as for `foveate.build`; `keep` is a fraction.
        longest: longest answer, in tokens.
    """

    model: str
    image: str | Path | None
    text: str
    method: str
    keep: float
    options: Mapping[str, Any] = field(default_factory=dict)
    longest: int = 64


@dataclass(frozen=True)
class Bill:
    """What one prefill and one more token cost.

    Attributes:
        entering, after: visual tokens that enter a layer, and those left after it; means over the layers.
        decoder_flops, total_flops: of the prefill, the second with vision tower and connector; NaN where it is not
            known (mixture of experts).
        kv_mb: keys and values after the prefill, 10^6 bytes; NaN likewise.
        prefill_ms: vision tower included, median.  decode_ms: per generated token, median.
    """

    entering: float
    after: float
    decoder_flops: float
    total_flops: float
    kv_mb: float
    prefill_ms: float | None = None
    decode_ms: float | None = None


@dataclass(frozen=True)
class Progress:
    """How far a question has come; each one handed out holds all that is known by then.

    Attributes:
        status: what is going on, "" when all is done.
        image: as the model saw it.
        full_text, text: the answers of the full and the reduced model so far.
        writing: which of them is being written: "full", "reduced" or "".
        trace: of the reduced prefill.
        full_bill, bill: None until known.
        rounds: how often each was timed.
    """

    question: Question
    status: str
    image: Image.Image
    full_text: str = ""
    text: str = ""
    writing: str = ""
    trace: Trace | None = None
    full_bill: Bill | None = None
    bill: Bill | None = None
    rounds: int = 0


# ----------------------------------------------------------------------------------------------------- bad input
def read_image(path: str | Path | None) -> Image.Image:
    """An upright RGB image. Raises `AskError`, naming the file as its owner knows it."""
    if path is None:
        raise AskError("Choose an image first.")
    try:
        return open_image(path)
    except DataError as error:
        reason = str(error).removeprefix(f"image {path}: ")
        raise AskError(f"{Path(path).name}: {reason}.") from error


def explain(error: BaseException) -> str:
    """One line for the page."""
    known = (AskError, BudgetError, DataError, ModelError, OptionError, UnsupportedError)
    text = " ".join(str(error).split())
    if isinstance(error, known):
        return text
    _log.error("a question failed", exc_info=error)
    return f"This did not work: {text[:200] or type(error).__name__}"


# -------------------------------------------------------------------------------------------------- one model, one turn
class Runner:
    """The loaded model and the queue before it.

    Whoever touches the model holds the lock, in a thread that sees to the end of what it began: a session is removed
    also when nobody reads the answer any more.

    Args:
        models: all that may be loaded, as for `evaluate.answer.load`.
        companions: all that the options `clip` and `siglip` of a question may name.
    """

    def __init__(self, models: Sequence[str], companions: Sequence[str] = ()) -> None:
        self.models, self.companions = tuple(models), tuple(companions)
        self._lock = threading.Lock()
        self._vlm: VLM | None = None
        self._jobs: dict[str, Job] = {}
        self._registering = threading.Lock()
        self._full: dict[tuple[Any, ...], str] = {}

    @contextmanager
    def model(self, name: str) -> Iterator[VLM]:
        """The model, to oneself. A failed load leaves the one before in place. Raises `ModelError`."""
        with self._lock:
            yield self._load(name)

    def stop(self, owner: str) -> None:
        """End what `owner` asked for last, at the next token."""
        if owner in self._jobs:
            self._jobs[owner].stop.set()

    def forget(self, owner: str) -> None:
        """`owner` has gone."""
        self.stop(owner)
        self._jobs.pop(owner, None)

    def ask(
        self, question: Question, owner: str = "", stamp: float = math.inf, patience: float = 0.0
    ) -> Iterator[Progress]:
        """Answer with and without reduction, then time both; a newer question of the same owner ends an older one.

        Args:
            owner: whose question it is (a browser tab).
            stamp: when it was asked: questions may arrive in another order than they were asked in.
            patience: seconds to wait for a newer question before anything is done.

        Raises:
            AskError, ModelError, BudgetError, OptionError, UnsupportedError: bad input, before or during the run.
            Stopped: by `stop`. A question that a newer one replaces just ends.
        """
        job = Job(stamp)
        with self._registering:
            if owner in self._jobs and stamp < self._jobs[owner].stamp:
                return
            self.stop(owner)
            self._jobs[owner] = job
        threading.Thread(target=self._work, args=(question, job, patience), daemon=True).start()
        try:
            while (event := job.events.get()) is not None and not job.stop.is_set():
                if isinstance(event, BaseException):
                    raise event
                yield event
            if job.stop.is_set() and self._jobs.get(owner) is job:
                raise Stopped
        finally:  # also when the reader has gone
            job.stop.set()

    def _work(self, question: Question, job: Job, patience: float) -> None:
        try:
            if not job.stop.wait(patience):
                self._answer(question, job)
        except Stopped:
            pass
        except BaseException as error:
            job.emit(error)
        job.emit(None)

    def _answer(self, question: Question, job: Job) -> None:
        image = read_image(question.image)
        if not question.text.strip():
            raise AskError("Type a question first.")
        self._permit(question)
        now = Progress(question, "Waiting for the model", image)
        job.emit(now)
        with self._turn(job):
            vlm = self._load(question.model)
            reducer = build_reducer(Recipe(question.method, question.options, question.keep), vlm)
            assert reducer is not None  # "full" is no method on offer
            inputs = vlm.inputs([Sample(image, question.text, "", "", "")])
            now = replace(now, image=as_seen(image, vlm.processor))
            now = replace(now, full_text=self._answer_full(vlm, inputs, now, job))
            now = self._answer_reduced(vlm, inputs, reducer, now, job)
            job.emit(replace(now, status="Timing both, in turns"))
            for times in time_both(vlm, inputs, reducer, job):
                now = _timed(now, *times)
            job.emit(now)

    @contextmanager
    def _turn(self, job: Job) -> Iterator[None]:
        while not self._lock.acquire(timeout=0.1):
            job.check()
        try:
            job.check()
            yield
        finally:
            self._lock.release()

    def _permit(self, question: Question) -> None:
        """What a visitor may ask for: nothing is imported, loaded or fetched because a request names it."""
        if len(question.text) > LONGEST_TEXT:
            raise AskError(f"The question is too long: at most {LONGEST_TEXT} characters.")
        offered(question.method)
        for name in COMPANIONS:
            if (wanted := question.options.get(name)) is not None and wanted not in self.companions:
                known = ", ".join(self.companions) or "none"
                raise AskError(f"{name}={str(wanted)[:60]!r} is not on offer here; companions on offer: {known}.")

    def _load(self, name: str) -> VLM:
        """The model, loaded if it is another than the one before. Raises `ModelError`."""
        if name not in self.models:
            raise ModelError(f"model {name[:60]!r}: not on offer here; on offer: {', '.join(self.models)}")
        if self._vlm is None or self._vlm.name != name:
            self._vlm = load(name)
            self._full.clear()
        return self._vlm

    def _answer_full(self, vlm: VLM, inputs: dict, now: Progress, job: Job) -> str:
        pixels = hashlib.sha256(now.image.tobytes()).hexdigest()
        key = (now.image.size, pixels, now.question.text, now.question.longest)
        if key not in self._full:
            saying = replace(now, status="The full model answers", writing="full")
            job.emit(saying)
            text = generate(
                vlm, inputs, job, now.question.longest, lambda text: job.emit(replace(saying, full_text=text))
            ).text
            if len(self._full) >= _REMEMBERED:
                del self._full[next(iter(self._full))]
            self._full[key] = text
        return self._full[key]

    def _answer_reduced(self, vlm: VLM, inputs: dict, reducer: Reducer, now: Progress, job: Job) -> Progress:
        saying = replace(now, status=f"The model with {now.question.method} answers", writing="reduced")
        job.emit(saying)
        with apply(vlm.model, reducer) as session:
            text = generate(
                vlm, inputs, job, now.question.longest, lambda text: job.emit(replace(saying, text=text))
            ).text
        trace = session.trace
        if trace is None:
            raise AskError(f"{vlm.name}: the prompt holds no visual token, so there is nothing to reduce.")
        unreduced = Trace(trace.n_layers, trace.visual, trace.tokens)
        return replace(
            now,
            status="",
            text=text,
            trace=trace,
            bill=_bill(vlm, inputs, trace),
            full_bill=_bill(vlm, inputs, unreduced),
        )


# ---------------------------------------------------------------------------------------------------------- the bill
def _bill(vlm: VLM, inputs: dict, trace: Trace) -> Bill:
    tokens = float(trace.mean_visual_tokens.mean()), float(trace.mean_visual_tokens_after.mean())
    try:
        geometry = Geometry.from_config(vlm.model.config, visual_tokens=0, text_tokens=0)
    except ValueError:  # a mixture of experts: what it costs depends on its router
        return Bill(*tokens, math.nan, math.nan, math.nan)
    try:
        total = float(prefill_flops(vlm.model, trace, inputs).total)
    except UnsupportedError:  # a tower of another kind
        total = math.nan
    stored = kv_bytes(geometry, trace, next(vlm.model.parameters()).element_size())
    return Bill(*tokens, exact_flops(geometry, trace), total, stored / 1e6)


def _timed(now: Progress, prefill: Times, decode: Times) -> Progress:
    full, reduced = (
        replace(bill, prefill_ms=1000 * statistics.median(p), decode_ms=1000 * statistics.median(d) if d else None)
        for bill, p, d in zip((now.full_bill, now.bill), prefill, decode, strict=True)
        if bill is not None
    )
    return replace(now, full_bill=full, bill=reduced, rounds=len(prefill[0]))
