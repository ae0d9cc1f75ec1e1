"""Which slots of a prefill are visual, and which must stay whatever a method says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...reduction import OptionError, UnsupportedError
from ..families.parts import Anatomy
from .call import Call, carries_images

__all__ = ["checked_visual", "required_slots", "visual_slots"]


def checked_visual(visual: Any) -> Tensor | None:
    """`visual=` of `apply`: (B, S) bool, or long with the number of each item. Raises `OptionError` for all else."""
    if visual is None:
        return None
    whole = isinstance(visual, Tensor) and visual.dim() == 2 and visual.dtype in (torch.bool, torch.long)
    if not whole or (visual.dtype == torch.long and bool((visual < 0).any())):
        raise OptionError(
            "visual= must be a BoolTensor (B, S), or a LongTensor (B, S) with 0 for text and 1, 2, ... for the images "
            "and videos of a row"
        )
    return visual


def visual_slots(
    anatomy: Anatomy, given: Tensor | None, call: Call, rows: int, length: int, past: int, kwargs: Mapping[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """Of a prefill with images, cut to the prompt: (B, P) bool, and (B, P) long where items are numbered.

    Args:
        anatomy: of the model.
        given: `visual=`, as checked.
        call: that runs.
        rows, length: B and S of this pass of the decoder.
        past: logical length of the cache before it.
        kwargs: of the decoder.

    Returns:
        (None, None) for a pass without images.

    Raises:
        UnsupportedError: nothing tells where images are, or not in these slots.
    """
    if given is not None:
        if past:
            return None, None
        if given.shape[1] > length or rows % given.shape[0]:
            raise UnsupportedError(
                f"visual= is {tuple(given.shape)}, but the decoder was called with ({rows}, {length}) slots"
            )
        items = given.repeat_interleave(rows // given.shape[0], 0)
        visual = items > 0
        return (visual, None if given.dtype == torch.bool else items) if bool(visual.any()) else (None, None)
    if call.round_forward is not None and not call.inside:
        slots = None if past else call.round_forward.repeat_interleave(rows // len(call.round_forward), 0)
        return slots, None
    kind = type(anatomy.model).__name__
    if not (past and length == 1) and call.placeholders is None:
        _refuse_blind(kind, call.given if call.inside else kwargs)
    slots = call.placeholders
    if slots is None or not bool(slots.any()):
        return None, None
    if slots.shape != (rows, length):
        raise UnsupportedError(
            f"{kind}: images were looked for in {tuple(slots.shape)} slots, but the decoder was called with "
            f"({rows}, {length}); give the prompt whole, or visual=BoolTensor (B, S)"
        )
    return (slots[:, : min(length, call.prompt - past)] if call.prompt > past else slots), None


def _refuse_blind(kind: str, arguments: Mapping[str, Any]) -> None:
    """Embeddings into which images may have been laid already: nobody says where."""
    embedded = arguments.get("inputs_embeds") is not None and arguments.get("input_ids") is None
    if embedded and not carries_images(arguments):
        raise UnsupportedError(
            f"{kind} was given inputs_embeds without pixels, so nothing tells which slots are visual; "
            "apply(model, method, visual=BoolTensor (B, S)) says so (all False for text)"
        )


def required_slots(labels: Any, visual: Tensor, length: int) -> Tensor | None:
    """Slots from which a label is predicted must stay: (B, S) bool, None without labels (B, S)."""
    if not isinstance(labels, Tensor) or labels.shape[1] != length:
        return None
    learnt = labels.to(visual.device) != -100
    if bool((learnt & visual).any()):
        raise ValueError("labels on image placeholders: set them to -100, the model cannot learn to predict them")
    return pad(learnt[:, 1:], (0, 1))
