"""Changes to a model that are taken back: an attribute for a while, evaluation mode for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["evaluating", "replaced"]


@contextlib.contextmanager
def replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """An instance attribute for a while; whatever was there before (accelerate puts a `forward` there) comes back."""
    missing = object()
    before = module.__dict__.get(name, missing)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if before is missing:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, module by module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
