"""FoPru: how much attention a patch gets or gives, and the choice of patches or of whole rows of patches."""

from __future__ import annotations

import torch
from torch import Tensor

from .select import first_k_mask, inverse, ranked

__all__ = ["best_rows", "given_and_received", "significance"]


def given_and_received(
    query: Tensor, key: Tensor, cls_key: Tensor, scaling: float, valid: Tensor | None = None, block: int = 64
) -> tuple[Tensor, Tensor]:
    """Attention among the patches alone (softmax with the CLS token, its row and column left out), averaged.

    Args:
        query, key: (I, N, H, d).
        cls_key: (I, H, d).
        scaling: factor on the dot products.
        valid: (I, N) bool, patches that exist; all by default.
        block: queries at a time; never N x N.

    Returns:
        given: (I, N), mean over the keys for each query; received: (I, N), mean over the queries for each key. The
            heads are averaged.
    """
    keys = torch.cat([cls_key[:, None], key], 1).float().permute(0, 2, 3, 1)
    valid = torch.ones_like(key[:, :, 0, 0], dtype=torch.bool) if valid is None else valid
    number = valid.sum(1, keepdim=True).clamp_min(1)
    missing = torch.nn.functional.pad(~valid, (1, 0))[:, None, None]
    given, received = [], keys.new_zeros(len(key), key.shape[1])
    for part, asking in zip(query.float().transpose(1, 2).split(block, 2), valid.split(block, 1)):
        weights = (part @ keys * scaling).masked_fill_(missing, -torch.inf).softmax(-1).mean(1)[..., 1:]
        weights = weights * asking[..., None]
        given.append(weights.sum(2) / number)
        received = received + weights.sum(1)
    return torch.cat(given, 1), received / number


def significance(given: Tensor, received: Tensor, valid: Tensor | None = None) -> Tensor:
    """Whichever of the two (I, N) varies more over the patches that exist (I, N), for each image: (I, N)."""
    valid = torch.ones_like(given, dtype=torch.bool) if valid is None else valid
    more = _spread(received.float(), valid) >= _spread(given.float(), valid)
    return torch.where(more, received, given)


def _spread(values: Tensor, valid: Tensor) -> Tensor:
    """Sum of the squared deviations from the mean: (I, 1)."""
    mean = values.masked_fill(~valid, 0.0).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp_min(1)
    return (values - mean).masked_fill(~valid, 0.0).square().sum(1, keepdim=True)


def best_rows(scores: Tensor, valid: Tensor, width: Tensor, counts: Tensor) -> Tensor:
    """`counts` (I,) patches of the rows with the highest mean score, the last row in part, its best patches. "row".

    Args:
        scores: (I, N).
        valid: (I, N) bool.
        width: (I,) patches in a row.
        counts: (I,).

    Returns:
        (I, N) bool.
    """
    columns = torch.arange(scores.shape[1], device=scores.device)
    row = columns // width[:, None].clamp_min(1)
    score = torch.where(valid, scores.float(), 0.0)
    total = torch.zeros_like(score).scatter_add(1, row, score)
    members = torch.zeros_like(score).scatter_add(1, row, valid.float())
    mean = (total / members.clamp_min(1)).masked_fill(members == 0, -torch.inf)
    place = inverse(ranked(mean, members > 0))
    by_score = ranked(scores, valid)
    by_row = place.gather(1, row).masked_fill(~valid, scores.shape[1]).gather(1, by_score).argsort(dim=1, stable=True)
    return first_k_mask(by_score.gather(1, by_row), valid, counts)
