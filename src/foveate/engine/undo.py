"""What is put into a model, and how all of it comes out again.

Everything a session changes in a model goes through `Undo`: forward hooks and attributes of modules. It comes out in
reverse order, every step of it even if one fails, and a copy of the model is freed of it.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Shared", "Undo"]

_ABSENT = object()
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class Shared:
    """Objects that hooks refer to: a copy of the model shares them until its hooks are taken out."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class Undo(Shared):
    """A stack of undo steps over the modules of one model."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._hooks: dict[int, tuple[nn.Module, RemovableHandle]] = {}
        self._attributes: list[tuple[nn.Module, str, Any, Any]] = []
        self.copying = threading.RLock()
        """Held while a module is copied, and by who puts hooks in and out in between."""

    @property
    def hooks(self) -> frozenset[int]:
        """Numbers of the hooks that were put in."""
        return frozenset(self._hooks)

    def pre_hook(self, module: nn.Module, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
        """`module.register_forward_pre_hook(hook, **options)`, to be undone."""
        return self._hooked(module, module.register_forward_pre_hook(hook, **options))

    def hook(self, module: nn.Module, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
        """`module.register_forward_hook(hook, **options)`, to be undone."""
        return self._hooked(module, module.register_forward_hook(hook, **options))

    def _hooked(self, module: nn.Module, handle: RemovableHandle) -> RemovableHandle:
        self._hooks[handle.id] = module, handle
        return handle

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of the instance. What stood there comes back, unless somebody has replaced `value` since."""
        before = module.__dict__.get(name, _ABSENT)
        module.__dict__[name] = value
        self._attributes.append((module, name, value, before))

        def restore() -> None:
            if module.__dict__.get(name, _ABSENT) is value:
                _put(module, name, before)

        self._stack.callback(restore)

    def then(self, step: Callable[[], Any]) -> None:
        """Any other step."""
        self._stack.callback(step)

    def close(self) -> None:
        """Undo all steps, the last first. The first error is raised when every step has been taken."""
        for _, handle in self._hooks.values():
            handle.remove()
        try:
            self._stack.close()
        finally:
            self._hooks, self._attributes = {}, []

    def copied(self, *modules: nn.Module | None) -> None:
        """Make `copy.deepcopy` of these modules give plain ones, free of everything that was put in."""
        for module in {id(module): module for module in modules if module is not None}.values():
            self.set(module, "__deepcopy__", functools.partial(self._plain_copy, module))

    def _plain_copy(self, module: nn.Module, memo: dict[int, Any]) -> nn.Module:
        twin = type(module).__new__(type(module))
        memo[id(module)] = twin
        with self.copying:
            twin.__setstate__(copy.deepcopy(module.__getstate__(), memo))
            for number, (hooked, _) in self._hooks.items():
                for name in _HOOKS:
                    getattr(memo.get(id(hooked)), name, {}).pop(number, None)
        for changed, name, _, before in reversed(self._attributes):
            other = memo.get(id(changed))
            if isinstance(other, nn.Module):
                _put(other, name, before if before is _ABSENT else copy.deepcopy(before, memo))
        return twin


def _put(module: nn.Module, name: str, value: Any) -> None:
    if value is _ABSENT:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = value
