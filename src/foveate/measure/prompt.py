"""A prompt of a wanted length, made of a real one: for timing, where only the number of words counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["with_text_tokens"]


def with_text_tokens(inputs: Mapping[str, Any], visual: Tensor, count: int) -> dict[str, Any]:
    """The same prompt with `count` tokens besides the image: words after it are repeated in turn, or left out.

    What stands before the image, and the last token, stay as they are.

    Args:
        inputs: model kwargs of rows that look alike (no padding); every (B, S) tensor is changed with the ids.
        visual: (B, S) bool, image slots, at the same places in every row.
        count: tokens of a row that are not visual.

    Raises:
        ValueError: fewer than stay in any case, or nothing to repeat; the message says how many there must be.
    """
    places = torch.arange(visual.shape[1], device=visual.device)
    last = int(places[visual[0]].max())
    fixed = int((~visual[0, : last + 1]).sum()) + 1
    tail = places[last + 1 : -1]
    if count < fixed or last + 1 == len(places):
        raise ValueError(f"this prompt has at least {fixed} tokens besides the image")
    if count > fixed and not len(tail):
        raise ValueError(f"this prompt cannot be longer than {fixed} tokens besides the image")
    chosen = tail.repeat(-(-(count - fixed) // max(len(tail), 1)))[: count - fixed]
    index = torch.cat([places[: last + 1], chosen, places[-1:]])
    return {
        name: value[:, index] if isinstance(value, Tensor) and value.shape == visual.shape else value
        for name, value in inputs.items()
    }
