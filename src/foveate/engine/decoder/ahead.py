"""The attention that the next decoder layer is going to compute for the last token, read before it runs."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ...ops.attention import attention_rows
from ...ops.select import gather_tokens, true_indices
from ...reduction import Tap
from ..families.parts import Anatomy

__all__ = ["next_layer_row", "read_ahead"]


def read_ahead(anatomy: Anatomy, layer: int, hidden: Tensor, active: Tensor, positions: Tensor | None) -> Tap:
    """The row of the last active token in a layer that has not run yet, mean of the heads.

    Args:
        anatomy: of the model.
        layer: number of the layer.
        hidden: (B, S, D) its inputs by slot.
        active: (B, S) bool, slots that will enter it.
        positions: (B, S) for RoPE, None: the slots.
    """
    index, valid = true_indices(active, int(active.sum(1).max()))
    states = gather_tokens(hidden, index)
    at = index if positions is None else positions.gather(1, index)
    with torch.no_grad():
        weights = next_layer_row(anatomy, layer, states, at, index, valid)
    return Tap(weights.mean(1), torch.ones_like(valid[:, :1]), index[:, -1:], torch.where(valid, index, -1))


def next_layer_row(
    anatomy: Anatomy, layer: int, hidden: Tensor, positions: Tensor, slots: Tensor, valid: Tensor
) -> Tensor:
    """The attention that a decoder layer of the plain kind would compute for the last of its inputs.

    Args:
        anatomy: of the model.
        layer: number of the layer.
        hidden: (B, n, D) its inputs, right-aligned.
        positions: (B, n) for RoPE.
        slots: (B, n) by which a sliding window counts.
        valid: (B, n) bool, False for fillers.

    Returns:
        (B, H, 1, n) float32.
    """
    attention: Any = anatomy.attention(layer)
    home, here = hidden.device, attention.q_proj.weight.device  # the layer may be on another device
    cos, sin = (part.to(here) for part in anatomy.rotary(layer, hidden, positions))
    hidden, slots, valid = hidden.to(here), slots.to(here), valid.to(here)
    states = anatomy.layers[layer].input_layernorm(hidden)  # type: ignore[operator]
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb

    def heads(projection: Any, norm: Any, x: Tensor) -> Tensor:
        x = projection(x).unflatten(-1, (-1, attention.head_dim))
        return (x if norm is None else norm(x)).transpose(1, 2)

    last = states[:, -1:]
    query = heads(attention.q_proj, getattr(attention, "q_norm", None), last)
    key = heads(attention.k_proj, getattr(attention, "k_norm", None), states)
    query = rotate(query, query, cos[:, -1:], sin[:, -1:])[0]
    key = rotate(key[:, :1], key, cos, sin)[1]
    window = anatomy.sliding_windows[layer]
    allowed = valid if window is None else valid & (slots[:, -1:] - slots < window)
    softcap = getattr(attention, "attn_logit_softcapping", None)
    first = torch.zeros_like(slots[:, :1])
    return attention_rows(query, key, first, allowed[:, None], None, attention.scaling, softcap).to(home)
