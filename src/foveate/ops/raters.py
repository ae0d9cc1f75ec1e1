"""SparseVLM's scores: which text tokens rate the visual ones, and what their attention says.

Lives here: raters (eq. 5), the gravity correction and head selection of SparseVLM+, the rank of the rater matrix.
Where and how much is removed is in `schedule`, what becomes of it in `density_peaks`.

Sources: SparseVLM, arXiv 2410.04417 (ICML 2025); Gumpest/SparseVLMs @ 26a5f488 and @ b72c5d6 (re-implemented from the
formulas).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gravity_weights", "matrix_rank", "rater_mask", "rope_table", "rotated_ones", "text_relevance", "top_heads"]

_BLOCK = 1024
"""Visual tokens whose similarity to the text is held at a time."""


def text_relevance(visual: Tensor, text: Tensor, visual_valid: Tensor, text_valid: Tensor) -> Tensor:
    """How much the visual tokens look at each text token: mean over them of softmax over the text of H_v H_q^T.

    No norm and no 1/sqrt(D): plain dot products of the embeddings that enter layer 0 (eq. 5).

    Args:
        visual: (B, V, D).
        text: (B, T, D).
        visual_valid: (B, V) bool.
        text_valid: (B, T) bool.

    Returns:
        (B, T) float32, 0 for padding; rows sum to 1 (0 without visual or without text tokens).
    """
    keys = text.float().transpose(1, 2)
    total = keys.new_zeros(text_valid.shape)
    for part, valid in zip(visual.split(_BLOCK, 1), visual_valid.split(_BLOCK, 1)):
        logits = (part.float() @ keys).masked_fill(~text_valid[:, None], -torch.inf)
        total += (logits.softmax(-1).nan_to_num(0.0) * valid[..., None]).sum(1)
    return total / visual_valid.sum(1, keepdim=True).clamp_min(1)


def rater_mask(
    relevance: Tensor, valid: Tensor, inclusive: bool = False, shared: bool = False
) -> tuple[Tensor, Tensor]:
    """Raters: text tokens of more than average relevance.

    Args:
        relevance: (B, T), see `text_relevance`.
        valid: (B, T) bool.
        inclusive: the paper's eq. 5, r >= mean; else r > mean, as the official code.
        shared: one mean over the whole batch, as the official code; else one per row.

    Returns:
        (B, T) bool, and the threshold (B, 1). A row may have no rater (all equally relevant).
    """
    total, count = (relevance * valid).sum(1, keepdim=True), valid.sum(1, keepdim=True)
    if shared:
        total, count = total.sum().expand_as(total), count.sum().expand_as(count)
    threshold = total / count.clamp_min(1)
    above = relevance >= threshold if inclusive else relevance > threshold
    return above & valid, threshold


# ------------------------------------------------------------------------------------------------------ SparseVLM+
def rope_table(length: int, head_dim: int, theta: float, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """cos and sin of a plain rotary embedding at positions 0 to length - 1: (length, head_dim) float32 each."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * (1.0 / theta ** (steps / head_dim))
    angles = angles.repeat(1, 2)
    return angles.cos(), angles.sin()


def rotated_ones(cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    """RoPE_m(1), the rotated vector of ones: (L, head_dim) float32.

    Args:
        cos, sin: (L, r) at each position, the two dimensions of a frequency r / 2 apart (Llama) or adjacent (Cohere);
            r <= head_dim, the rest does not rotate.
        head_dim: width of a head.
    """
    first = torch.arange(cos.shape[1], device=cos.device)
    adjacent = (cos[:, :1] == cos[:, 1:2]).all()
    sign = torch.where(torch.where(adjacent, first % 2 == 0, first < cos.shape[1] // 2), -1.0, 1.0)
    return torch.nn.functional.pad(cos.float() + sign * sin.float(), (0, head_dim - cos.shape[1]), value=1.0)


def gravity_weights(ones: Tensor, queries: Tensor, keys: Tensor, floor: float | None = None) -> Tensor:
    """What RoPE alone makes of a distance: W[m, n] = <RoPE_m(1), RoPE_n(1)> / sqrt(head_dim).

    W falls with the distance, so that attention prefers what is near; SparseVLM+ divides attention by it. But W is not
    positive: with 128 dimensions and base 1e4 it is 11.3 at 0, 2.4 at 576 and below 0 from 1,707 on.

    Args:
        ones: (L, head_dim), see `rotated_ones`.
        queries: (B, R) positions.
        keys: (B, N) positions.
        floor: smallest weight, as a share of W at distance 0: the guard. None: unguarded, as the official code.

    Returns:
        (B, R, N) float32.
    """
    scale = ones.shape[-1] ** 0.5
    weights = (ones[queries] @ ones[keys].transpose(1, 2)) / scale
    return weights if floor is None else torch.maximum(weights, floor * ones[0].square().sum() / scale)


def top_heads(sums: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` heads of highest sum: their numbers in descending order (B, count), and as a mask (B, H) bool."""
    chosen = sums.topk(count, dim=1).indices
    return chosen, torch.zeros_like(sums, dtype=torch.bool).scatter(1, chosen, True)


# ------------------------------------------------------------------------------------------------------------ rank
def matrix_rank(matrix: Tensor, row_valid: Tensor, column_valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numerical rank of the valid part of each matrix, counted as `torch.linalg.matrix_rank` does.

    Args:
        matrix: (B, R, N).
        row_valid: (B, R) bool.
        column_valid: (B, N) bool.

    Returns:
        rank (B,) long; singular values (B, min(R, N)) float32, descending, 0 for what is not valid; and the tolerance
        (B,) below which they count as zero: max(rows, columns) * eps * the largest.
    """
    inner = matrix.float() * (row_valid[:, :, None] & column_valid[:, None])
    if not inner.numel():
        none = matrix.new_zeros(len(matrix), dtype=torch.float32)
        return none.long(), none[:, None][:, :0], none
    values = torch.linalg.svdvals(inner)
    size = torch.maximum(row_valid.sum(1), column_valid.sum(1))
    tolerance = size * torch.finfo(torch.float32).eps * values[:, 0]
    return (values > tolerance[:, None]).sum(1), values, tolerance
