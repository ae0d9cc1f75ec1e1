"""A seam for measuring: what is done only in order to decide is marked, and whoever wants to may time it.

Marked are decisions and their execution, taps, and matching inside the tower; not the layers that then run on fewer
tokens, nor the gathers around them. Without a watch a mark costs one look-up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

__all__ = ["deciding", "watched"]

P = ParamSpec("P")
R = TypeVar("R")
Watch = Callable[[], AbstractContextManager[Any]]

_watch: ContextVar[Watch | None] = ContextVar("foveate_watch", default=None)


def deciding(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function as part of deciding. Marked functions may call each other: a watch must bear being nested."""

    @functools.wraps(function)
    def marked(*args: P.args, **kwargs: P.kwargs) -> R:
        watch = _watch.get()
        if watch is None:
            return function(*args, **kwargs)
        with watch():
            return function(*args, **kwargs)

    return marked


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Within this block, run every marked function inside `watch()`."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)
