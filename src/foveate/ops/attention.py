"""Rows of an attention map, without the map."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention_received", "attention_rows"]

_NUMBERS = 1 << 21
"""Of a block of attention; two of them are held."""


def attention_rows(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention of a few query rows over all keys.

    Args:
        query: (B, H, Q, d).
        key: (B, Hkv, N, d); H is a multiple of Hkv.
        rows: (B, R) which queries.
        allowed: (B, R, N) or (B, H or 1, R, N) bool, or None.
        bias: (B, H or 1, R, N) added to the logits, or None.
        scaling: factor on the dot products.
        softcap: Gemma's tanh cap, or None.
        sinks: (B or 1, H, R or 1, 1) logits of no key, which take their share of each row (GPT-OSS), or None.

    Returns:
        (B, H, R, N) float32; rows that may see nothing are zero.
    """
    batch, heads, _, dim = query.shape
    groups, n_keys, n_rows = key.shape[1], key.shape[2], rows.shape[1]
    query = query.gather(2, rows[:, None, :, None].expand(batch, heads, n_rows, dim))
    query = query.reshape(batch, groups, heads // groups * n_rows, dim)
    logits = (query @ key.transpose(-1, -2)).float().reshape(batch, heads, n_rows, n_keys) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    if allowed is not None:
        allowed = allowed[:, None] if allowed.dim() == 3 else allowed
        logits = logits.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        logits = torch.cat([logits, sinks.float().expand(batch, heads, n_rows, 1)], -1)
    return logits.softmax(-1).nan_to_num(0.0)[..., :n_keys]


def attention_received(
    query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None, block: int | None = None
) -> Tensor:
    """Attention each key receives, averaged over the queries that may see it: (B, H, N) float32.

    Args:
        query: (B, H, Q, d).
        key: (B, H, N, d).
        scaling: factor on the dot products.
        mask: (B or 1, H or 1, Q, N), bool (True may be seen) or added to the logits.
        block: queries per block, which bounds the memory to 2 * B * H * block * N numbers, 4 million by default.
    """
    batch, heads, n_keys = key.shape[:3]
    block = block or max(16, _NUMBERS // max(batch * heads * n_keys, 1))
    received = key.new_zeros(batch, heads, n_keys, dtype=torch.float32)
    queries = key.new_zeros(1, 1, 1, dtype=torch.float32)
    transposed = key.transpose(-1, -2)
    for start in range(0, query.shape[2], block):
        weights = (query[:, :, start : start + block] @ transposed).float().mul_(scaling)
        if mask is not None:
            part = mask[:, :, start : start + block]
            seen = part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
            weights = weights.masked_fill_(~seen, float("-inf")) if part.dtype == torch.bool else weights.add_(part)
            queries = queries + seen.float().sum(2)
        weights = weights.softmax(-1)
        received += (weights if mask is None else weights.nan_to_num_(0.0)).sum(2)
        del weights  # before the next block is made
    return received / (query.shape[2] if mask is None else queries.clamp_min(1))
