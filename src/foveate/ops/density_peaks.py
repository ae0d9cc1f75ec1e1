"""Density-peak clusters of removed tokens, and the tokens they are merged into. All samples at once.

Source: SparseVLM's token recycling, arXiv 2410.04417 section 3.4; Gumpest/SparseVLMs @ 26a5f488, which takes its
clustering from TCFormer (re-implemented from the formulas). Where paper and code differ, both are here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .select import gather_tokens, inverse, put, ranked

__all__ = ["Clusters", "density_peaks", "merge_clusters"]

Assignment = Literal["euclidean", "cosine"]
Isolation = Literal["sample", "token"]


@dataclass(frozen=True)
class Clusters:
    """Clusters of `N` tokens, at most `K` of them in a sample.

    Attributes:
        density: (B, N), exp of minus the mean squared distance to the nearest neighbours.
        delta: (B, N), distance to the nearest token of higher density.
        score: (B, N), density * delta; the centres have the highest.
        centres: (B, K) long, tokens at the centres by descending score, -1 where a sample has fewer.
        assignment: (B, N) long, number of the cluster (column of `centres`) of each token; 0 for padding.
    """

    density: Tensor
    delta: Tensor
    score: Tensor
    centres: Tensor
    assignment: Tensor


def _distances(tokens: Tensor, valid: Tensor, normalise: bool) -> Tensor:
    """(B, N, N) Euclidean."""
    # Around the mean: hidden states share a large offset, in which small distances would drown.
    mean = (tokens * valid[..., None]).sum(1, keepdim=True) / valid.sum(1)[:, None, None].clamp_min(1)
    centred = tokens - mean
    apart = torch.cdist(centred, centred)
    apart.diagonal(dim1=1, dim2=2).zero_()
    return apart / tokens.shape[-1] ** 0.5 if normalise else apart


@torch.no_grad()
def density_peaks(
    tokens: Tensor,
    valid: Tensor,
    counts: Tensor,
    most: int,
    *,
    neighbours: int | None = None,
    noise: Tensor | None = None,
    normalise: bool = True,
    isolation: Isolation = "sample",
    assignment: Assignment = "euclidean",
    guarded: bool = True,
) -> Clusters:
    """Cluster the valid tokens of every sample around its density peaks.

    Args:
        tokens: (B, N, D).
        valid: (B, N) bool.
        counts: (B,) long, clusters of each sample, at most its valid tokens.
        most: the largest of `counts`.
        neighbours: k of the density, the token itself included; None: the number of clusters (official code).
        noise: (B, N) in [0, 1); 1e-6 of it is added to the density, as the official code breaks ties.
        normalise: divide distances by sqrt(D) (official code); the paper does not.
        isolation: delta of a token without a denser one: the largest distance of the whole `"sample"` (official code),
            or of that `"token"` (paper).
        assignment: a token joins the centre that is nearest (`"euclidean"`, official code) or most similar (`"cosine"`,
            paper); the first of equals.
        guarded: of equally dense tokens the first counts as denser, and densities and scores are compared by their
            logarithms, which is the same order also where exp() is 0 for all. The official code makes two centres of a
            pair of equals (unless its noise tells them apart, which 16 bits do not hold).

    Returns:
        The clusters, float32. Values at padding mean nothing.
    """
    tokens = tokens.float()
    pairs = valid[:, :, None] & valid[:, None]
    apart = _distances(tokens, valid, normalise)
    if neighbours is None:
        k, deepest = counts[:, None], most
    else:
        k, deepest = valid.sum(1, keepdim=True).clamp_max(neighbours), neighbours
    nearest = torch.where(pairs, apart, torch.inf).topk(min(deepest, tokens.shape[1]), largest=False).values
    used = torch.arange(nearest.shape[-1], device=tokens.device) < k[..., None]
    log_density = -nearest.square().where(used, 0.0).sum(-1) / k.clamp_min(1)
    density = log_density.exp() if noise is None else log_density.exp() + noise * 1e-6
    height = log_density if guarded else density

    if guarded:  # of equals the first is denser
        place = inverse(ranked(height, valid))
        denser = place[:, None] < place[..., None]
    else:
        denser = (height[:, None] > height[..., None]) & pairs
    delta = torch.where(denser, apart, torch.inf).amin(-1)
    within = torch.where(pairs, apart, 0.0)
    farthest = within.amax((1, 2))[:, None].expand_as(delta) if isolation == "sample" else within.amax(-1)
    delta = torch.where(delta.isinf(), farthest, delta)
    score = density * delta
    if guarded:
        order = ranked((height + delta.log()).clamp_min(torch.finfo(torch.float32).min), valid)[:, :most]
    else:  # equals in the order of topk, as in the official code
        order = score.masked_fill(~valid, -torch.inf).topk(most).indices
    real = torch.arange(order.shape[1], device=tokens.device) < counts[:, None]

    if assignment == "cosine":
        unit = torch.nn.functional.normalize(tokens, dim=-1)
        cost = -(unit @ gather_tokens(unit, order).transpose(1, 2))
    else:
        cost = apart.gather(2, order[:, None].expand(-1, apart.shape[1], -1))
    joined = torch.where(real[:, None], cost, torch.inf).argmin(-1)
    numbers = torch.arange(order.shape[1], device=tokens.device).expand_as(order)
    centres = torch.where(real, order, -1)
    joined = torch.where(valid, put(joined, centres, numbers), 0)  # a centre belongs to itself
    return Clusters(density, delta, score, centres, joined)


def merge_clusters(tokens: Tensor, valid: Tensor, clusters: Clusters, how: Literal["mean", "sum"] = "mean") -> Tensor:
    """One token per cluster: the mean (official code, divisor count + 1e-6) or the sum (paper) of its members.

    Args:
        tokens: (B, N, D).
        valid: (B, N) bool.
        clusters: of these tokens.
        how: `"mean"` or `"sum"`.

    Returns:
        (B, K, D) float32 in the order of the centres, 0 for padding.
    """
    numbers = torch.arange(clusters.centres.shape[1], device=tokens.device)[:, None]
    member = ((clusters.assignment[:, None] == numbers) & valid[:, None]).float()
    total = member @ tokens.float()
    return total if how == "sum" else total / (member.sum(-1, keepdim=True) + 1e-6)
