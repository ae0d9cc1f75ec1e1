"""What one running call of a model knows, and what can be read off its arguments: images, prompt, padding, packing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...reduction import UnsupportedError
from .cache import Permit
from .forward_pass import ForwardPass
from .short_prompt import ShortPrompt

__all__ = ["Call", "carries_images", "chunk_size", "prompt_length", "refuse_packing", "tokens_of"]

_FEATURES = (
    "flattened_patches", "image_embeds", "image_hidden_states", "image_patches", "input_image_embeds",
    "mm_encoder_outputs",
)  # fmt: skip
_PACKED = ("cu_seq_lens_q", "cu_seqlens", "seq_idx")


@dataclass
class Call:
    """State of the call that one thread makes; the outermost of generate, model and decoder begins and ends it.

    Attributes:
        forward_pass: the pass that runs, from the decoder's pre-hook to its post-hook.
        inside: the model is in its forward, not its decoder alone.
        generating: inside `generate`.
        prompt: slots of the prompt that `generate` was given, 0 outside of it.
        chunk: size of the pieces in which `generate` feeds the prompt, None: whole.
        given: arguments of the model that runs.
        features: arguments and results of the vision encoder; within `generate` they outlive a pass.
        encoding: the vision encoder runs.
        placeholders: (B, S) bool, visual slots as the model found them, None if it has not looked.
        round_forward: (B, S) bool, visual slots of a `generate` that goes round the forward of its model.
        reduced: a pass of this call has seen visual slots.
        labels: of the model that runs.
        decoding: the permit of the reduced cache to which a step of decoding adds a token.
        past, rows: of a pass over a reduced cache: its logical length before, and the samples.
        short: {number of a module: the lazy frame whose rows it was given}.
        short_prompt: the pass that runs goes without hooks on the layers.
        keep_hooks: steps of decoding need hooks on the layers; they stay until the end of the call.
    """

    forward_pass: ForwardPass | None = None
    inside: bool = False
    generating: bool = False
    prompt: int = 0
    chunk: int | None = None
    given: dict[str, Any] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    encoding: bool = False
    placeholders: Tensor | None = None
    round_forward: Tensor | None = None
    reduced: bool = False
    labels: Tensor | None = None
    decoding: Permit | None = None
    past: int = 0
    rows: int = 0
    short: dict[int, Any] = field(default_factory=dict)
    short_prompt: ShortPrompt | None = None
    keep_hooks: bool = False


def carries_images(arguments: Mapping[str, Any]) -> bool:
    """Whether pixels or features of images or videos are among the arguments of a call."""

    def filled(value: Any) -> bool:
        if isinstance(value, Mapping):
            return any(filled(part) for part in value.values())
        return value is not None and (not isinstance(value, Tensor) or value.numel() > 0)

    return any(("pixel_values" in name or name in _FEATURES) and filled(v) for name, v in arguments.items())


def prompt_length(args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Slots of the prompt that `generate(*args, **kwargs)` continues, an earlier conversation included."""
    names = ("inputs", "input_ids", "inputs_embeds")
    given = args[0] if args else next((kwargs[name] for name in names if kwargs.get(name) is not None), None)
    mask = kwargs.get("attention_mask")  # it spans the conversation, even if only a new turn's ids are given
    spanning = mask if isinstance(mask, Tensor) and mask.dim() == 2 else given
    return spanning.shape[1] if isinstance(spanning, Tensor) else 0


def chunk_size(model: Any, kwargs: Mapping[str, Any]) -> int | None:
    """`prefill_chunk_size` of a call of `generate`, None where the prompt is fed whole."""
    for place in (kwargs.get("generation_config"), getattr(model, "generation_config", None)):
        size = kwargs.get("prefill_chunk_size") or getattr(place, "prefill_chunk_size", None)
        if size:
            return int(size)
    return None


def tokens_of(masks: tuple[Any, ...], rows: int, length: int, device: torch.device) -> Tensor:
    """(B, S) bool, not padding, from the first mask (B, T) or (B or 1, H or 1, S, T) that fits; else all."""
    for mask in masks:
        if not isinstance(mask, Tensor) or mask.shape[0] not in (1, rows):
            continue
        if mask.dim() == 2 and mask.shape[1] >= length:
            return mask[:, -length:].expand(rows, -1).bool().to(device)
        if mask.dim() == 4 and mask.shape[2] == length <= mask.shape[3]:
            return _seen(mask)[:, :, -length:].diagonal(dim1=1, dim2=2).expand(rows, -1).to(device)
    return torch.ones(rows, length, dtype=torch.bool, device=device)


def refuse_packing(arguments: Mapping[str, Any], tokens: Tensor) -> None:
    """Refuse several samples packed in one row: what rates images, and the last token, would be those of the row.

    Args:
        arguments: what the caller gave the model.
        tokens: (B, S) bool, not padding.

    Raises:
        UnsupportedError: sequence borders are given, positions begin again within a row, or a 4-D mask hides earlier
            tokens of the row from later ones.
    """
    borders = next((name for name in _PACKED if arguments.get(name) is not None), None)
    positions, mask = arguments.get("position_ids"), arguments.get("attention_mask")
    why = f"{borders} is given" if borders else None
    if why is None and isinstance(positions, Tensor) and positions.shape[-1] == tokens.shape[1]:
        line = positions[0] if positions.dim() == 3 else positions
        both = (tokens[:, 1:] & tokens[:, :-1]).to(line.device)
        if bool(((line.diff(dim=-1) < 0) & both).any()):
            why = "position_ids begin again"
    if why is None and isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] == mask.shape[3]:
        there = tokens.to(mask.device)
        earlier = torch.ones(mask.shape[2], mask.shape[2], dtype=torch.bool, device=mask.device).tril()
        hidden = earlier & ~_seen(mask) & there[:, None] & there[:, :, None]
        if bool(hidden.any()):
            why = "the 4-D attention mask hides earlier tokens of a row from later ones"
    if why is not None:
        raise UnsupportedError(
            f"several samples seem to be packed in one row ({why}); a method would take them for one prompt: "
            "give each sample a row of its own"
        )


def _seen(mask: Tensor) -> Tensor:
    """(B, S, T) bool of a 4-D attention mask, bool or additive: what some head sees."""
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0
