"""Recoverable Compression: how many tokens each of its steps keeps, and which."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .host import to_device
from .outliers import count_outliers
from .prumerge import merge_neighbours
from .select import gather_tokens, index_mask, inverse, padded_indices, ranked, top_k_mask

__all__ = ["Recovery", "apportion", "merge_rest", "merge_rest_official", "recover", "recover_faithful"]


@dataclass
class Recovery:
    """What the steps chose, for I images of N tokens.

    Attributes:
        visual: (I, N) bool, kept by the visual filter.
        text: (I, N) bool, recovered by the question.
        centres: (I, M) long, centres of the clusters by falling attention, -1 for padding.
        pooled: (I,) bool, whether what is left becomes one more token.
        visual_ratio, text_ratio, rest_ratio: (I,) float, shares of outliers.
    """

    visual: Tensor
    text: Tensor
    centres: Tensor
    pooled: Tensor
    visual_ratio: Tensor
    text_ratio: Tensor
    rest_ratio: Tensor

    def on(self, device: torch.device) -> Recovery:
        """The same on a device."""
        return Recovery(**{name: to_device(value, device) for name, value in vars(self).items()})

    @property
    def main(self) -> Tensor:
        """(I, N) bool: tokens that stay as they are."""
        return self.visual | self.text


def apportion(weights: Tensor, total: Tensor) -> Tensor:
    """Whole numbers that sum to `total` (I,), in proportion to `weights` (I, P), by largest remainder: (I, P).

    Where all weights are zero the first gets everything.
    """
    first = torch.zeros_like(weights)
    first[:, 0] = 1
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, first)
    product, whole = weights * total[:, None], weights.sum(1, keepdim=True)
    share, remainder = product // whole, product % whole
    missing = total[:, None] - share.sum(1, keepdim=True)
    rank = inverse(remainder.argsort(dim=1, descending=True, stable=True))
    return share + (rank < missing).long()


def _share(values: Tensor, neighbours: int, valid: Tensor) -> Tensor:
    return count_outliers(values, neighbours, valid, double=True).double() / valid.sum(1).clamp_min(1)


def _centres(attention: Tensor, rest: Tensor, counts: Tensor) -> Tensor:
    """The `counts` (I,) most attended of `rest`, by falling attention: (I, largest count), padded with -1."""
    most = int(counts.max()) if len(counts) else 0
    order = ranked(attention, rest)[:, :most]
    return torch.where(torch.arange(order.shape[1], device=order.device) < counts[:, None], order, -1)


def recover(
    attention: Tensor,
    similarity: Tensor,
    valid: Tensor,
    budget: Tensor | None = None,
    filter_k: int = 20,
    rest_k: int = 10,
) -> Recovery:
    """Visual filter, text recovery, secondary recovery.

    Each step keeps as many of the best tokens of what is left as there are local outliers: by attention of the CLS
    token, by similarity to the question, and again by attention, for the centres of the clusters. That is some 200
    small operations on two numbers for each token, and best done on the host.

    Args:
        attention, similarity: (I, N) float.
        valid: (I, N) bool.
        budget: (I,) tokens in all, at most the valid ones; the counts found are then scaled to it, the one token that
            pools the rest included (from 2 on). None: as found, at least one.
        filter_k, rest_k: neighbours of the local outlier factor.
    """
    tokens = valid.sum(1)
    found_visual = count_outliers(attention, filter_k, valid)
    left = valid & ~top_k_mask(attention, valid, found_visual)
    found_text = count_outliers(similarity, filter_k, left)
    rest = left & ~top_k_mask(similarity, left, found_text)
    found_rest = count_outliers(attention, rest_k, rest)
    counts = torch.stack([found_visual, found_text, found_rest], 1)
    pooled = rest.sum(1) > found_rest
    if budget is not None:
        budget = torch.minimum(budget, tokens)
        pooled = (budget > 1) & (budget < tokens)
        counts = apportion(counts, budget - pooled.long())
        complete = (budget == tokens)[:, None]
        everything = torch.stack([tokens, torch.zeros_like(tokens), torch.zeros_like(tokens)], 1)
        counts = torch.where(complete, everything, counts)
    visual = top_k_mask(attention, valid, counts[:, 0])
    left = valid & ~visual
    text = top_k_mask(similarity, left, counts[:, 1])
    centres = _centres(attention, left & ~text, counts[:, 2])
    every = tokens.clamp_min(1)
    rest_ratio = found_rest / rest.sum(1).clamp_min(1)
    return Recovery(visual, text, centres, pooled, found_visual / every, found_text / every, rest_ratio)


def recover_faithful(attention: Tensor, similarity: Tensor, width: int, variant: str = "default") -> Recovery:
    """The official counts: by truncation, over all tokens, and centres as a share of the feature width.

    Source: banjiuyufen/Recoverable-Compression @ d9275944, `token_recycling_with_text_in_vision_and_clustring` and
    (`variant="union"`) `token_recycling_with_text_clustering`.

    Args:
        attention, similarity: (I, N); several images are served one by one, the official code takes one.
        width: C, of the features.
        variant: "default" or "union".
    """
    valid = torch.ones_like(attention, dtype=torch.bool)
    tokens = attention.shape[1]
    union = variant == "union"
    visual_ratio = _share(attention, 10 if union else 20, valid)
    visual = top_k_mask(attention, valid, (tokens * visual_ratio).long())
    if not union:
        lowest = similarity.amin(1, keepdim=True)
        similarity = torch.where(visual, lowest, similarity)
    text_ratio = _share(similarity, 10 if union else 20, valid)
    eligible = torch.full_like(tokens * text_ratio, tokens) if union else (tokens - visual.sum(1)).double()
    text = top_k_mask(similarity, valid, (eligible * text_ratio).long())
    rest = ~(visual | text)
    rest_ratio = _share(attention, 10, rest)
    counts = ((tokens if union else width) * rest_ratio).long()
    centres = _centres(attention, rest, torch.minimum(counts, rest.sum(1)))
    pooled = torch.ones_like(counts, dtype=torch.bool) if union else counts > 0
    return Recovery(visual, text, centres, pooled, visual_ratio, text_ratio, rest_ratio)


def merge_rest_official(
    x: Tensor, key: Tensor, attention: Tensor, similarity: Tensor, found: Recovery, neighbours: int = 32
) -> tuple[Tensor, Tensor]:
    """Centres plus the attention-weighted sum of their neighbours in the rest; the rest without the centres, pooled.

    As in the official code, the keys of the first |rest| patches stand for the keys of the rest, a neighbour's
    similarity to the question counts 50 times, and other centres are neighbours too.

    Args:
        x: (I, N, C).  key: (I, N, K).  attention, similarity: (I, N).
        found: what `recover_faithful` chose.
        neighbours: 32 in the official code.

    Returns:
        centres (I, M, C) and extra (I, 1, C).
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    rest = ~found.main
    longest = int(rest.sum(1).max())
    pool = padded_indices(rest, longest)
    place, exists = pool.clamp_min(0), pool >= 0
    tokens = gather_tokens(x, place)
    weights = attention.gather(1, place).to(x.dtype).masked_fill(~exists, 0.0)
    inside = (rest.cumsum(1) - 1).gather(1, found.centres.clamp_min(0))
    centres = torch.where(found.centres >= 0, inside, -1)
    merged, _ = merge_neighbours(
        tokens, key[:, :longest], weights, centres, exists, neighbours, False, 50 * similarity.gather(1, place)
    )
    taken = torch.zeros_like(weights).scatter_add(1, centres.clamp_min(0), (centres >= 0).to(weights.dtype)) > 0
    return merged, (tokens * weights.masked_fill(taken, 0.0)[..., None]).sum(1, keepdim=True)


def merge_rest(
    x: Tensor,
    key: Tensor,
    attention: Tensor,
    similarity: Tensor,
    found: Recovery,
    valid: Tensor,
    neighbours: int = 32,
    text_weight: float = 1.8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention-weighted means: of each centre with its nearest tokens of the rest, and of the whole rest.

    Args:
        x: (I, N, C).  key: (I, N, K).  attention, similarity: (I, N).
        found: what `recover` chose.
        valid: (I, N) bool.
        neighbours: of a centre, at most; centres are nobody's neighbours.
        text_weight: of the similarity to the question beside the cosine of the keys.

    Returns:
        centres (I, M, C), extra (I, 1, C), and for each token (I, N) the column of its centre, M for those that are in
        the extra token alone, -1 for all others.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    centre = index_mask(found.centres, valid.shape[1])
    rest = valid & ~found.main & ~centre
    merged, owner = merge_neighbours(x, key, attention, found.centres, rest, neighbours, True, text_weight * similarity)
    weights = torch.where(rest, attention.to(x.dtype).clamp_min(1e-30), 0.0)
    extra = (weights[:, None] @ x) / weights.sum(1).clamp_min(1e-30)[:, None, None]
    owner = torch.where(rest & (owner < 0) & found.pooled[:, None], found.centres.shape[1], owner)
    return merged, extra, torch.where(rest, owner, -1)
