"""VisionZip: dominant patches by attention, contextual tokens by averaging the rest around evenly spaced targets."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .select import gather_tokens, padded_indices

__all__ = [
    "contextual_groups",
    "contextual_targets",
    "merge_into_targets",
    "mosaic_order",
    "nearest_target",
    "split_counts",
]


def contextual_targets(rest: Tensor, counts: Tensor) -> Tensor:
    """Evenly spaced targets among what is left: every (n // T)-th of the n, from the first on, T in all.

    Args:
        rest: (I, N) bool.
        counts: (I,) targets, cut to what there is.

    Returns:
        (I, N) bool.
    """
    rank = rest.cumsum(1) - 1
    step = (rest.sum(1) // counts.clamp_min(1)).clamp_min(1)[:, None]
    return rest & (rank % step == 0) & (rank // step < counts[:, None])


def nearest_target(metric: Tensor, targets: Tensor, sources: Tensor) -> Tensor:
    """The target whose metric is most similar (cosine, in float32), for every source; ties go to the first.

    Args:
        metric: (I, N, d).
        targets: (I, T) long, ascending, -1 for padding.
        sources: (I, N) bool.

    Returns:
        (I, N) long, column of `targets`; -1 for what is no source, or where there is no target.
    """
    if not targets.shape[1]:
        return torch.full_like(sources, -1, dtype=torch.long)
    units = normalize(metric.float(), dim=-1)
    there = gather_tokens(units, targets)
    similarity = (units @ there.transpose(1, 2)).masked_fill_((targets < 0)[:, None], -torch.inf)
    assigned = sources & (targets >= 0).any(1, keepdim=True)
    return torch.where(assigned, similarity.argmax(2), -1)


def merge_into_targets(x: Tensor, targets: Tensor, assigned: Tensor, target_weighs: bool = True) -> Tensor:
    """Mean of each target and its sources.

    Args:
        x: (I, N, C).
        targets: (I, T) long, -1 for padding.
        assigned: (I, N) long, as from `nearest_target`.
        target_weighs: the target is a member of the group. False: as in the official code, the target plus the mean of
            its sources, about twice the norm.

    Returns:
        (I, T, C) float32 (float64 for float64 inputs), zero for padding.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    samples, _, width = x.shape
    column = torch.where(assigned < 0, targets.shape[1], assigned)
    total = x.new_zeros(samples, targets.shape[1] + 1, width)
    total = total.scatter_add(1, column[..., None].expand_as(x), x)[:, :-1]
    members = x.new_zeros(samples, targets.shape[1] + 1).scatter_add(1, column, torch.ones_like(column, dtype=x.dtype))
    members = members[:, :-1, None]
    own = gather_tokens(x, targets).masked_fill((targets < 0)[..., None], 0.0)
    if target_weighs:
        return (own + total) / (1 + members)
    return own + total / members.clamp_min(1)


def mosaic_order(dominant: Tensor, tokens: int, width: int, height: int, side: int = 24) -> Tensor:
    """Official order of the tiles of one image: patches row-major over the mosaic, CLS tokens, contextual tokens.

    Source: dvlab-research/VisionZip @ 3151f6df, `restore_image_features_sorted`.

    Args:
        dominant: (n, D) patches of each tile plus 1, 0 for the CLS token, in any order.
        tokens: per tile, D plus the contextual ones; each tile has its CLS token, its patches ascending, the
            contextual.
        width, height: of the mosaic, in tiles; n = width * height, row-major.
        side: of a tile, in patches.

    Returns:
        (n * tokens,) long, indices into the tiles' tokens laid end to end.
    """
    tiles, count = dominant.shape
    tile = torch.arange(tiles, device=dominant.device)[:, None]
    patch = dominant.sort(1).values[:, 1:] - 1
    row, column = tile // width * side + patch // side, tile % width * side + patch % side
    first = tile * tokens
    place = (row * width * side + column).flatten().argsort(stable=True)
    patches = (first + torch.arange(1, count, device=dominant.device)).flatten()[place]
    contextual = (first + torch.arange(count, tokens, device=dominant.device)).flatten()
    return torch.cat([patches, first.flatten(), contextual])


def split_counts(counts: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Dominant and contextual tokens (I,), (I,) of `counts` (I,): half up, at least one dominant where there is any."""
    above, below = Fraction(share).limit_denominator(1_000_000).as_integer_ratio()
    contextual = torch.minimum((2 * counts * above + below) // (2 * below), (counts - 1).clamp_min(0))
    return counts - contextual, contextual


def contextual_groups(metric: Tensor, rest: Tensor, counts: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Targets (I, most), padded with -1, and to which of them everything else in `rest` (I, N) belongs (I, N)."""
    mask = contextual_targets(rest, counts)
    targets = padded_indices(mask, most)
    return targets, nearest_target(metric, targets, rest & ~mask)
