"""The vocabulary of Foveate: what a method sees, what it answers, and how methods are found by name.

Nothing here knows a model or a hook; the engine (`foveate.engine`) builds the views and carries out the decisions.
"""

from .budget import Budget, look_up
from .errors import BudgetError, OptionError, UnsupportedError
from .reducer import BEFORE_LAYERS, Decision, Positions, Reducer, bind, known_positions
from .registry import MethodInfo, build, check_names, info, name_of, names, options, register, type_of
from .view import Patches, Tap, TapSpec, View, VisionSpec

__all__ = [
    "BEFORE_LAYERS",
    "Budget",
    "BudgetError",
    "Decision",
    "MethodInfo",
    "OptionError",
    "Patches",
    "Positions",
    "Reducer",
    "Tap",
    "TapSpec",
    "UnsupportedError",
    "View",
    "VisionSpec",
    "bind",
    "build",
    "check_names",
    "info",
    "known_positions",
    "look_up",
    "name_of",
    "names",
    "options",
    "register",
    "type_of",
]
