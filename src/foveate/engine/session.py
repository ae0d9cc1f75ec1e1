"""What every session has in common: how it goes out, which thread is in which call, and whose trace is whose."""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from torch import nn

from ..reduction import UnsupportedError
from .undo import Shared, Undo

__all__ = ["Session"]

_MARK = "_foveate_session"


class Session(Shared):
    """One method at work in one model, whatever kind of model that is. Made by `foveate.apply`; a context manager.

    Threads may call the model at the same time. Each has its own state and its own trace, and leaving the session
    waits for calls that are running in other threads.

    Attributes:
        reducer: the method, bound to this model.
    """

    reducer: Any

    def __init__(self, root: nn.Module):
        """Mark `root` as having a session. Raises `UnsupportedError` if it has one already."""
        if _MARK in root.__dict__:
            raise UnsupportedError("a session is applied to this model already; remove it first, or use foveate.Chain")
        self._undo = Undo()
        self._local = threading.local()
        self._running: dict[int, set[str]] = {}
        self._free = threading.Condition()
        self._authors, self._only, self._closed = 0, None, False
        self._undo.set(root, _MARK, self)
        self._undo.then(_forget_compiled_code)
        _forget_compiled_code()

    # -------------------------------------------------------------------------------------------------- in and out
    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Give the model back as it was, when calls in other threads are done. Calling it again does nothing."""
        with self._free:
            while self._others_run():
                self._free.wait(0.1)
            self._closed = True
        self._undo.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError(
            "a model cannot be pickled while a session is applied to it: leave the session first; "
            "save_pretrained and state_dict work within"
        )

    # ------------------------------------------------------------------------------------------------------ threads
    def _begin(self, what: str) -> bool:
        """This thread enters a call. False if the session is over, so that the call is none of ours."""
        with self._free:
            if not self._closed:
                self._running.setdefault(threading.get_ident(), set()).add(what)
            return not self._closed

    def _end(self, what: str) -> bool:
        """This thread leaves a call; True if it was the outermost."""
        with self._free:
            me = threading.get_ident()
            calls = self._running.get(me, set())
            calls.discard(what)
            if calls:
                return False
            self._running.pop(me, None)
            self._free.notify_all()
        return True

    def _runs(self) -> set[str]:
        """The calls in which this thread is."""
        return self._running.get(threading.get_ident(), set())

    def _others_run(self) -> bool:
        alive = {thread.ident for thread in threading.enumerate()}
        return any(thread in alive for thread in self._running if thread != threading.get_ident())

    # ------------------------------------------------------------------------------------------------------- traces
    @property
    def trace(self) -> Any:
        """Record of the last call that this thread made; None before the first, and after a call without images.

        A thread that has made no call itself is shown the trace of the one thread that has (as with streamers), and
        None where there are several.
        """
        return self._local.trace if hasattr(self._local, "trace") else self._only

    def _record(self, trace: Any) -> None:
        if not hasattr(self._local, "trace"):
            with self._free:
                self._authors += 1
        self._local.trace = trace
        self._only = trace if self._authors == 1 else None


def _forget_compiled_code() -> None:
    """Code compiled before hooks were put in, or with hooks that are gone, would run without them and say nothing."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
