"""Foveate: make any Hugging Face vision-language model keep only the visual tokens that matter."""

import importlib as _importlib
from types import ModuleType as _ModuleType

from .engine.apply import apply
from .engine.session import Session
from .engine.trace import Trace
from .recipe import load
from .reducers import *  # noqa: F403
from .reducers import __all__ as _methods
from .reduction import (
    Budget,
    BudgetError,
    Decision,
    MethodInfo,
    OptionError,
    Patches,
    Reducer,
    Tap,
    TapSpec,
    UnsupportedError,
    View,
    VisionSpec,
    build,
    names,
    register,
)

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "BudgetError",
    "Decision",
    "MethodInfo",
    "OptionError",
    "Patches",
    "Reducer",
    "Session",
    "Tap",
    "TapSpec",
    "Trace",
    "UnsupportedError",
    "View",
    "VisionSpec",
    "apply",
    "build",
    "load",
    "names",
    "register",
    *_methods,
]

_ON_DEMAND = ("evaluate", "measure", "train", "tune", "view", "zoo")


def __getattr__(name: str) -> _ModuleType:
    """Import `foveate.tune` and its like when they are first used, so that `import foveate` stays light."""
    if name in _ON_DEMAND:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
