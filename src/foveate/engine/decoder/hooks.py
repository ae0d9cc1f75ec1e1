"""Hooks on the decoder's layers that are there only while some thread needs them: a layer without is called faster."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..undo import Shared, Undo

__all__ = ["PassingHooks"]


class PassingHooks(Shared):
    """A pre-hook and a hook on each of some modules.

    Another thread may call a module between two steps of putting a hook in or out. So a hook can be called without its
    partner, and `before` without keyword arguments: for what is none of their thread's they must do nothing.

    Args:
        undo: takes them out at the end, whoever has left them in.
        modules: to be hooked, in order.
        before: called with (number of the module, module, args, kwargs); kwargs may be missing.
        after: called with (number of the module, module, args, output), before every other hook, so that these see
            what it makes.
    """

    def __init__(self, undo: Undo, modules: Sequence[nn.Module], before: Callable[..., Any], after: Callable[..., Any]):
        self._undo, self._users, self._hooks = undo, set[int](), []
        for i, module in enumerate(modules):
            pair = functools.partial(before, i), functools.partial(after, i)
            handles = undo.pre_hook(module, pair[0], with_kwargs=True), undo.hook(module, pair[1], prepend=True)
            for handle in handles:
                handle.remove()  # but its number is ours
            self._hooks.append((module, *pair, handles[0].id, handles[1].id))

    @property
    def mine(self) -> bool:
        """Whether they are in because of the calling thread."""
        return threading.get_ident() in self._users

    def put_in(self) -> None:
        """The calling thread needs them."""
        with self._undo.copying:
            if not self._users:
                # What register_forward_hook does, without a handle: every prefill comes here.
                for module, before, after, first, second in self._hooks:
                    module._forward_pre_hooks[first] = before
                    module._forward_pre_hooks_with_kwargs[first] = True
                    module._forward_hooks[second] = after
                    module._forward_hooks.move_to_end(second, last=False)  # type: ignore[attr-defined]
            self._users.add(threading.get_ident())

    def take_out(self) -> None:
        """The calling thread does not need them any more."""
        if not self.mine:
            return
        with self._undo.copying:
            self._users.discard(threading.get_ident())
            if not self._users:
                for module, _, _, first, second in self._hooks:
                    module._forward_pre_hooks.pop(first, None)
                    module._forward_pre_hooks_with_kwargs.pop(first, None)
                    module._forward_hooks.pop(second, None)
