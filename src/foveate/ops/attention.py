"""Rows of an attention map, without the map."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention_received", "attention_rows"]


def attention_rows(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    softcap: float | None,
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
    return logits.softmax(-1).nan_to_num(0.0)


def attention_received(
    query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None, block: int = 256
) -> Tensor:
    """Attention each key receives, averaged over the queries that may see it: (B, H, N) float32.

    Args:
        query: (B, H, Q, d).
        key: (B, H, N, d).
        scaling: factor on the dot products.
        mask: (B or 1, H or 1, Q, N), bool (True may be seen) or added to the logits.
        block: queries per block; bounds the memory to B * H * block * N.
    """
    received = key.new_zeros(key.shape[:3], dtype=torch.float32)
    queries = key.new_zeros(1, 1, 1, dtype=torch.float32)
    for start in range(0, query.shape[2], block):
        logits = (query[:, :, start : start + block] @ key.transpose(-1, -2)).float() * scaling
        if mask is not None:
            part = mask[:, :, start : start + block]
            seen = part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
            logits = logits.masked_fill(~seen, float("-inf")) if part.dtype == torch.bool else logits + part
            queries = queries + seen.float().sum(2)
        received += logits.softmax(-1).nan_to_num(0.0).sum(2)
    return received / (query.shape[2] if mask is None else queries.clamp_min(1))
