"""A CPU stand-in with the semantics of transformers' FlashAttention path.

A mask is None or (B, T) and says who is padding; everything is causal, aligned at the end; a window counts stored keys;
and position ids with gaps at batch 1 mean several sequences packed into one, which the engine must never suggest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["pretend_flash"]

NAME = "pretended_flash_attention_2"
calls: Counter[str] = Counter()


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """(H, Q, d), (H, N, d), (H, N, d) -> (H, Q, d)."""
    n_queries, n_keys = query.shape[1], key.shape[1]
    distance = torch.arange(n_keys - n_queries, n_keys)[:, None] - torch.arange(n_keys)
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    logits = (query @ key.transpose(-1, -2) * scaling).masked_fill(hidden, float("-inf"))
    return logits.softmax(-1).nan_to_num(0.0) @ value


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    batch, heads, n_queries, dim = query.shape
    key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    scaling = scaling or dim**-0.5
    output = torch.zeros_like(query)
    if attention_mask is not None:
        calls["padded"] += 1
        assert attention_mask.shape == (batch, key.shape[2]), "a mask must speak about the keys that are there"
        for row, there in enumerate(attention_mask.bool()):
            asking = there[-n_queries:]
            output[row][:, asking] = _attend(
                query[row][:, asking], key[row][:, there], value[row][:, there], scaling, sliding_window
            )
    else:
        calls["plain"] += 1
        assert not _is_packed_sequence(position_ids, batch), "position ids were read as packed sequences"
        for row in range(batch):
            output[row] = _attend(query[row], key[row], value[row], scaling, sliding_window)
    return output.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, flash_attention_mask)


@contextmanager
def pretend_flash(model: PreTrainedModel) -> Iterator[Counter[str]]:
    """Run the decoder of a model with the stand-in; yields how often it was called with and without padding."""
    config = model.get_decoder().config
    real = config._attn_implementation
    config._attn_implementation = NAME
    calls.clear()
    try:
        yield calls
    finally:
        config._attn_implementation = real
