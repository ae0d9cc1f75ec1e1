"""What goes wrong: a model that cannot be served, a bad budget, a bad option."""

from __future__ import annotations

__all__ = ["BudgetError", "OptionError", "UnsupportedError"]


class UnsupportedError(RuntimeError):
    """This model, cache or combination cannot be served. The message says what can."""


class BudgetError(ValueError):
    """`keep` is not a positive number of tokens nor a fraction in (0, 1]."""


class OptionError(ValueError):
    """A method was asked for by an unknown name or with an unknown or impossible option."""
