"""How many visual tokens may stay."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import BudgetError

__all__ = ["Budget", "look_up"]


@dataclass(frozen=True)
class Budget:
    """How many visual tokens may stay: an int (tokens per image) or a float in (0, 1] (fraction of all of them)."""

    keep: int | float

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", self._check(self.keep))

    @staticmethod
    def _check(keep: Any) -> int | float:
        problem = f"keep={keep!r}: give a number of tokens (an int >= 1) or a fraction (a float in (0, 1])"
        if isinstance(keep, bool | str | bytes) or keep is None:
            raise BudgetError(problem)
        try:
            value = keep.item() if hasattr(keep, "item") else keep
            if isinstance(value, bool):
                raise BudgetError(problem)
            if isinstance(value, int):
                if value < 1:
                    raise BudgetError(problem)
                return value
            value = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise BudgetError(problem) from error
        if not (math.isfinite(value) and 0.0 < value <= 1.0):
            raise BudgetError(problem)
        return value

    @classmethod
    def parse(cls, text: str | int | float) -> Budget:
        """From a command line: "192" is a count, "0.22" a fraction. Raises `BudgetError`."""
        if not isinstance(text, str):
            return cls(text)
        try:
            return cls(int(text))
        except BudgetError:
            raise BudgetError(f"keep={text}: a count must be at least 1") from None
        except ValueError:
            pass
        try:
            return cls(float(text))
        except ValueError:
            raise BudgetError(
                f"keep={text}: give a number of tokens (an int >= 1) or a fraction (a float in (0, 1])"
            ) from None

    def of(self, tokens: int, images: int = 1) -> int:
        """Tokens that stay of `tokens` visual ones in `images` images: at least 1, at most all (0 of none)."""
        wanted = self.keep * images if isinstance(self.keep, int) else round(self.keep * tokens)
        return min(tokens, max(1, wanted))

    def per_row(self, tokens: Tensor, images: Tensor | None = None, most: int | None = None) -> Tensor:
        """`of` of every entry, on the device.

        Args:
            tokens: (N,) long, visual tokens of rows, or of images.
            images: (N,) long, images in each; None: one.
            most: a bound of `tokens` that is known without asking the device; a fraction needs one.

        Returns:
            (N,) long.
        """
        if isinstance(self.keep, int):
            wanted = torch.full_like(tokens, self.keep) if images is None else images * self.keep
            return torch.minimum(wanted.clamp_min(1), tokens)
        return look_up(tokens, int(tokens.max()) if most is None and len(tokens) else most or 0, self.of)


def look_up(tokens: Tensor, most: int, function: Callable[..., int], *args: Any) -> Tensor:
    """`function(n, *args)` of every `n` in `tokens`, in Python's own arithmetic: not every device has float64.

    Args:
        tokens: (...) long, from 0 to `most`.
        most: a bound, known without asking the device.
        function: of a whole number; equal ones must do the same.
        args: hashable.

    Returns:
        (...) long.
    """
    table = _table(function, args, 1 << most.bit_length())
    if tokens.device.type != "cpu":  # the host need not wait for what the device is doing
        table = table.to(tokens.device, non_blocking=tokens.device.type not in ("mps", "xpu"))
    return table[tokens]


@functools.lru_cache(maxsize=256)
def _table(function: Callable[..., int], args: tuple[Any, ...], size: int) -> Tensor:
    return torch.tensor([function(n, *args) for n in range(size)])
