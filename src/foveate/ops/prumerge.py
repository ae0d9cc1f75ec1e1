"""PruMerge: which patches stay, and how their neighbours are merged into them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from .select import gather_tokens, index_mask, ranked

__all__ = [
    "class_attention",
    "complement",
    "evenly_spaced",
    "merge_neighbours",
    "merge_official",
    "nearest_neighbours",
    "official_grid",
    "official_selection",
    "owners",
    "weighted_sum",
]

_BLOCK = 1024
"""Centres that are compared with all tokens at once."""


def class_attention(cls_query: Tensor, cls_key: Tensor, key: Tensor) -> Tensor:
    """Attention of the CLS token to the patches, as if the layer had one head over the whole width.

    Source: 42Shawn/LLaVA-PruMerge @ 097c0411, softmax(q k^T C^-0.5), without the column of the CLS token.

    Args:
        cls_query, cls_key: (I, H, d).
        key: (I, N, H, d).

    Returns:
        (I, N) float32 (float64 for float64 inputs).
    """
    keys = torch.cat([cls_key[:, None], key], 1).flatten(2)
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    logits = keys @ cls_query.flatten(1).to(keys.dtype)[..., None] * keys.shape[2] ** -0.5
    return logits[:, :, 0].softmax(1)[:, 1:]


def evenly_spaced(eligible: Tensor, counts: Tensor) -> Tensor:
    """`counts` (I,) of the eligible entries (I, N), at equal distances in their order: (I, N) bool."""
    rank, total, wanted = eligible.cumsum(1) - 1, eligible.sum(1, keepdim=True).clamp_min(1), counts[:, None]
    half = total // 2
    return eligible & (((rank + 1) * wanted + half) // total > (rank * wanted + half) // total)


def complement(chosen: Tensor, tokens: int) -> Tensor:
    """What was not chosen, ascending: (I, tokens - S) long.

    Args:
        chosen: (I, S) long. As in the official code, an index that is named twice costs one of the lowest others.
        tokens: N.
    """
    mask = index_mask(chosen, tokens)
    return mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, chosen.shape[1] :]


def official_grid(chosen: Tensor, tokens: int, ratio: float, adaptive: bool) -> Tensor:
    """PruMerge+'s indices in the official order: the important ones, then a grid over the row-major patches.

    Source: 42Shawn/LLaVA-PruMerge @ 097c0411, `token_prune_merge_advanced_plus`. The last patch is never in the grid; a
    fixed grid (`adaptive=False`) may name important patches a second time.

    Args:
        chosen: (I, K) important patches.
        tokens: N, 576 in the official code.
        ratio: K / N.
        adaptive: whether the ratio was found by outliers.

    Raises:
        ValueError: the official code fails (no outlier, more than a third, or a grid that starts after the
            last patch), or serves one image only.
    """
    step = int(1 / ratio) if ratio > 0 else 0
    step = int(step / 3) if adaptive else step
    first = 0 if adaptive else step // 2
    if step < 1 or first > tokens - 1:
        raise ValueError(f"a ratio of {ratio:.3f} leaves no grid step")
    grid = torch.arange(first, tokens - 1, step, device=chosen.device)
    if adaptive:
        if len(chosen) != 1:
            raise ValueError(f"{len(chosen)} images at once")
        grid = grid[~torch.isin(grid, chosen)]
    return torch.cat([chosen, grid.expand(len(chosen), -1)], 1)


def official_selection(attention: Tensor, ratio: float, plus: bool, adaptive: bool) -> Tensor:
    """Patches that stay in the official code, in its order: by falling attention, then the grid. (I, S) long.

    Args:
        attention: (I, N).
        ratio: fixed, or the share of outliers in the whole batch.
        plus: PruMerge+.
        adaptive: whether the ratio was found by outliers.

    Raises:
        ValueError: see `official_grid`.
    """
    tokens = attention.shape[1]
    order = ranked(attention, torch.ones_like(attention, dtype=torch.bool))[:, : int(tokens * ratio)]
    return official_grid(order, tokens, ratio, adaptive) if plus else order


def nearest_neighbours(
    key: Tensor, centres: Tensor, candidates: Tensor, neighbours: int, bonus: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The candidates with the most similar keys, for each centre: by cosine, plus `bonus`. In float32.

    Args:
        key: (I, N, C).
        centres: (I, S) long, -1 for padding.
        candidates: (I, N) bool; a centre is never its own neighbour.
        neighbours: how many, at most.
        bonus: (I, N) added to the cosine, or None.

    Returns:
        index (I, S, k) long and similarity (I, S, k), -inf where there are fewer.
    """
    units = normalize(key.to(torch.promote_types(key.dtype, torch.float32)), dim=-1)
    columns = torch.arange(key.shape[1], device=key.device)
    count = min(neighbours, key.shape[1])
    found = []
    for part in centres.split(_BLOCK, 1):
        mine = gather_tokens(units, part)
        score = mine @ units.transpose(1, 2)
        if bonus is not None:
            score = score + bonus[:, None].to(score.dtype)
        closed = ~candidates[:, None] | (columns == part[..., None]) | (part < 0)[..., None]
        found.append(score.masked_fill(closed, -torch.inf).topk(count, dim=2))
    if not found:
        empty = key.new_zeros(*centres.shape, count)
        return empty.long(), empty
    return torch.cat([f.indices for f in found], 1), torch.cat([f.values for f in found], 1)


def weighted_sum(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Sum over k of `weights` (I, S, k) times the rows `index` (I, S, k) of x (I, N, C): (I, S, C)."""
    samples, tokens, width = x.shape
    if not index.numel():
        return x.new_zeros(*index.shape[:2], width)
    rows = index + torch.arange(samples, device=x.device)[:, None, None] * tokens
    bags, shares = rows.flatten(0, 1), weights.flatten(0, 1).to(x.dtype)
    flat = embedding_bag(bags, x.flatten(0, 1), per_sample_weights=shares, mode="sum")
    return flat.view(*index.shape[:2], width)


def owners(index: Tensor, similarity: Tensor, tokens: int) -> Tensor:
    """The centre (its column) to which each token is most similar, of those that list it: (I, tokens), -1 for none.

    Args:
        index, similarity: (I, S, k), as `nearest_neighbours` returns them.
        tokens: N.
    """
    samples, centres, count = index.shape
    flat, score = index.flatten(1), similarity.flatten(1)
    best = score.new_full((samples, tokens), -torch.inf).scatter_reduce(1, flat, score, "amax")
    column = torch.arange(centres, device=index.device)[:, None].expand(-1, count).reshape(1, -1).expand_as(flat)
    column = torch.where((score == best.gather(1, flat)) & score.isfinite(), column, -1)
    return index.new_full((samples, tokens), -1).scatter_reduce(1, flat, column, "amax")


def merge_official(
    x: Tensor, key: Tensor, attention: Tensor, chosen: Tensor, neighbours: int = 32
) -> tuple[Tensor, Tensor]:
    """Chosen tokens plus the attention-weighted sum of their neighbours; one more token pools what was not chosen.

    Neighbours are any other tokens, chosen ones too; weights are not normalised; an index that is named twice is two
    tokens, neighbours of each other.

    Source: 42Shawn/LLaVA-PruMerge @ 097c0411, `token_prune_merge_advanced`.

    Args:
        x: (I, N, C).  key: (I, N, K).  attention: (I, N).
        chosen: (I, S) long.
        neighbours: 32 in the official code; fewer where there are fewer.

    Returns:
        centres (I, S, C) and extra (I, 1, C), float32 (float64 for float64 inputs).
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    pool = torch.cat([chosen, complement(chosen, x.shape[1])], 1)
    tokens, keys = gather_tokens(x, pool), gather_tokens(key, pool)
    weights = attention.gather(1, pool).to(x.dtype)
    centres = torch.arange(chosen.shape[1], device=x.device).expand_as(chosen)
    index, similarity = nearest_neighbours(keys, centres, torch.ones_like(pool, dtype=torch.bool), neighbours)
    share = weights.gather(1, index.flatten(1)).view_as(similarity).masked_fill(similarity.isneginf(), 0.0)
    merged = tokens[:, : chosen.shape[1]] + weighted_sum(tokens, index, share)
    left = chosen.shape[1]
    return merged, (tokens[:, left:] * weights[:, left:, None]).sum(1, keepdim=True)


def merge_neighbours(
    x: Tensor,
    key: Tensor,
    attention: Tensor,
    centres: Tensor,
    candidates: Tensor,
    neighbours: int = 32,
    mean: bool = True,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge into each centre its nearest candidates, weighted by attention.

    Args:
        x: (I, N, C).  key: (I, N, K).  attention: (I, N).
        centres: (I, S) long, -1 for padding.
        candidates: (I, N) bool, tokens that may be merged.
        neighbours: at most this many to a centre; a candidate may go to several.
        mean: attention-weighted mean of centre and neighbours. False: the centre plus the weighted sum of the
            neighbours.
        bonus: (I, N) added to the cosine of the keys.

    Returns:
        merged (I, S, C), and for each token (I, N) the column of the centre it is most similar to, -1 for none.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    index, similarity = nearest_neighbours(key, centres, candidates, neighbours, bonus)
    share = attention.to(x.dtype).gather(1, index.flatten(1)).view_as(similarity)
    share = share.masked_fill(similarity.isneginf(), 0.0)
    place = centres.clamp_min(0)
    own = gather_tokens(x, place)
    merged = weighted_sum(x, index, share)
    if mean:
        # Attention may be all zero: the centre alone is its own mean.
        weight = attention.to(x.dtype).gather(1, place).clamp_min(1e-30)[..., None]
        merged = (own * weight + merged) / (weight + share.sum(2)[..., None])
    else:
        merged = own + merged
    return merged, owners(index, similarity, x.shape[1])
