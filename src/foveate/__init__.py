"""Foveate: make any Hugging Face vision-language model keep only the visual tokens that matter."""

from .engine.session import Session, apply
from .engine.trace import Trace
from .reducers import *  # noqa: F403
from .reducers import __all__ as _methods
from .reduction import (
    Budget,
    BudgetError,
    Decision,
    OptionError,
    Reducer,
    Tap,
    TapSpec,
    UnsupportedError,
    View,
    build,
    names,
)

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "BudgetError",
    "Decision",
    "OptionError",
    "Reducer",
    "Session",
    "Tap",
    "TapSpec",
    "Trace",
    "UnsupportedError",
    "View",
    "apply",
    "build",
    "names",
    *_methods,
]
