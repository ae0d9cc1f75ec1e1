"""PuMer's mathematics: scores of image tokens by text, pruning, and merging within one modality, for ragged batches.

Source: PuMer, arXiv 2305.17530 (ACL 2023); csarron/PuMer @ 8a00d853 (MIT; re-implemented).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .select import gather_tokens, inverse, true_indices

__all__ = [
    "MergeStyle",
    "Reduction",
    "attention_scores",
    "key_scores",
    "masked_softmax",
    "pair_places",
    "reduce_image",
    "reduce_text",
    "token_counts",
]

MergeStyle = Literal["tome", "tip", "diff"]
"""tome: by cosine of the keys, averaged. tip: keys weighted by the score, added. diff: by nearness of score, added."""


@dataclass(frozen=True)
class Reduction:
    """Fewer tokens, as a linear map: every token goes to at most one place, with a weight.

    Attributes:
        place: (B, T) long, where each token goes, below T'.
        weight: (B, T) float32; 0 for a token that is dropped.
        mask: (B, T'), the places in use; bool, or the fractional mask of the official code.
    """

    place: Tensor
    weight: Tensor
    mask: Tensor

    @property
    def length(self) -> int:
        """T'."""
        return self.mask.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T', D); unused places are zero. Half precision is summed in float32."""
        batch, tokens, width = x.shape
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        rows = torch.arange(batch, device=x.device)[:, None] * self.length
        out = wide.new_zeros(batch * self.length, width)
        weighted = (wide * self.weight[..., None].to(wide.dtype)).reshape(batch * tokens, width)
        out = out.index_add(0, (self.place + rows).reshape(-1), weighted)
        return out.view(batch, self.length, width).to(x.dtype)

    def then(self, after: Reduction) -> Reduction:
        """This map and then `after`, as one: (B, T) -> (B, T'')."""
        place, weight = after.place.gather(1, self.place), after.weight.gather(1, self.place)
        return Reduction(place, self.weight * weight, after.mask)

    def origin(self) -> Tensor:
        """(B, T) long: the place each token went to, -1 if it was dropped."""
        return torch.where(self.weight != 0, self.place, -1)


def masked_softmax(logits: Tensor, mask: Tensor, eps: float = 1e-6) -> Tensor:
    """The attention of the official code: the mask multiplies, and query `i` always sees key `i`.

    Source: `differentiable_masked_softmax` of csarron/PuMer @ 8a00d853, defects included: every key keeps eps / N, and
    in cross-attention an unrelated key is unmasked for the first queries.

    Args:
        logits: (B, H, Q, N).
        mask: (B, N), 0 to 1; fractions count in part.

    Returns:
        (B, H, Q, N), in the type of `logits`.
    """
    queries, keys = logits.shape[-2:]
    visible = mask[:, None, None].float()
    visible = visible + (1 - visible) * torch.eye(queries, keys, device=logits.device)
    weights = (logits - logits.amax(-1, keepdim=True)).float().exp() * visible
    return ((weights + eps / keys) / (weights.sum(-1, keepdim=True) + eps)).to(logits.dtype)


def attention_scores(rows: Tensor, counted: Tensor, lengths: Tensor) -> Tensor:
    """How much text attends to each image token: (B, N).

    Args:
        rows: (B, H, L, N), attention of the text tokens, over the heads to be averaged.
        counted: (B, L), weight of each text token in the sum.
        lengths: (B,), what the sum is divided by.
    """
    return torch.einsum("bln,bl->bn", rows.float().mean(1), counted.float()) / lengths.float().clamp_min(1)[:, None]


def key_scores(text: Tensor, image: Tensor, counted: Tensor, lengths: Tensor) -> Tensor:
    """Sum of dot products with the text tokens: (B, N).

    Args:
        text: (B, L, d), keys ("km") or queries ("qk"), averaged over the heads.
        image: (B, N, d), keys averaged over the heads.
        counted, lengths: as for `attention_scores`.
    """
    total = torch.einsum("bld,bl->bd", text.float(), counted.float())
    return torch.einsum("bd,bnd->bn", total, image.float()) / lengths.float().clamp_min(1)[:, None]


def token_counts(tokens: int, prune: float, merge: float) -> tuple[int, int]:
    """Of `tokens` image tokens, the class token included: how many survive pruning, and how many of them merge away.

    Both ratios are of the tokens that enter; fractions of a token are rounded half to even, at most half merge away.
    """
    kept = max(tokens - round(prune * tokens), 1)
    return kept, min(round(merge * tokens), (kept - 1) // 2)


def pair_places(
    likeness: Tensor, count: Tensor, r: Tensor, length: int, protect_first: bool = True, sort_alone: bool = True
) -> tuple[Tensor, Tensor]:
    """Bipartite matching of ragged lists: `r` tokens at even places go into the most alike one at an odd place.

    Args:
        likeness: (B, ceil(T / 2), T // 2), tokens at even places against those at odd ones.
        count: (B,) long, tokens in use.
        r: (B,) long, tokens to merge away.
        length: T.
        protect_first: token 0 merges with nothing.
        sort_alone: even tokens left alone keep their order; otherwise the most alike come first.

    Returns:
        place (B, T) long: even tokens left alone come first, then the odd ones; and in_use (B, T) bool.
    """
    slots = torch.arange(length, device=likeness.device)
    used = slots < count[:, None]
    likeness = likeness.masked_fill(~(used[:, ::2, None] & used[:, None, 1::2]), -torch.inf)
    if protect_first:
        likeness[:, 0] = -torch.inf
    best, partner = likeness.max(2)
    # Unused tokens rank last, after the protected one.
    best = best.masked_fill(~used[:, ::2], -torch.inf)
    rank = inverse(best.argsort(dim=1, descending=True, stable=True))
    source = rank < r[:, None]
    alone = used[:, ::2] & ~source
    after = alone.sum(1, keepdim=True)
    first = alone.cumsum(1) - 1 if sort_alone else rank - r[:, None]
    odd = after + torch.arange(length // 2, device=likeness.device)
    place = torch.zeros(len(count), length, dtype=torch.long, device=likeness.device)
    place[:, ::2] = torch.where(source, after + partner, first)
    place[:, 1::2] = odd
    return place.masked_fill(~used, 0), used


def _likeness(metric: Tensor) -> Tensor:
    units = normalize(metric if metric.dtype == torch.float64 else metric.float(), dim=-1)
    return units[:, ::2] @ units[:, 1::2].transpose(1, 2)


def _group_weights(place: Tensor, used: Tensor, length: int, average: bool) -> Tensor:
    """(B, T) float32: 1 / size of the token's group, or 1; 0 where no token is."""
    weight = used.float()
    if not average:
        return weight
    size = weight.new_zeros(len(place), length).scatter_add(1, place, weight)
    return weight / size.gather(1, place).clamp_min(1)


def _merged(
    likeness: Tensor | None,
    count: list[int],
    r: list[int],
    length: int,
    device: torch.device,
    average: bool,
    protect_first: bool = True,
    sort_alone: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Place and weight (B, T) of the tokens of lists, and which places are in use (B, T')."""
    counts = torch.tensor(count, device=device)
    left = counts
    if likeness is None or not any(r):
        slots = torch.arange(length, device=device)
        used = slots < counts[:, None]
        place = torch.where(used, slots, 0)
    else:
        merged = torch.tensor(r, device=device)
        place, used = pair_places(likeness, counts, merged, length, protect_first, sort_alone)
        left = counts - merged
    longest = max(n - m for n, m in zip(count, r))
    mask = torch.arange(longest, device=device) < left[:, None]
    return place, _group_weights(place, used, longest, average), mask


@torch.no_grad()
def reduce_image(
    scores: Tensor,
    key: Tensor,
    mask: Tensor,
    prune: float,
    merge: float,
    style: MergeStyle = "tome",
    protect_class: bool = True,
) -> Reduction:
    """Drop the image tokens that the text cares least about, merge of the others those that are alike.

    Survivors are ranked by score; tokens at even ranks merge into tokens at odd ranks.

    Args:
        scores: (B, N), the class token at place 0.
        key: (B, N, d), keys averaged over the heads.
        mask: (B, N) bool, not padding.
        prune, merge: of the tokens that enter, which share is dropped and which share merges away.
        style: how they merge.
        protect_class: the class token stays, first and alone. False as in the official code: it is ranked like any
            other; the token of the highest score is the one that merges with nothing ("diff": none is).

    Returns:
        N -> N' tokens, most wanted first as far as they are left alone at even ranks, then those at odd ranks.
    """
    tokens = mask.sum(1).tolist()
    count, r = [], []
    for n in tokens:
        kept, merged = token_counts(n, prune, merge)
        if style == "diff" and not protect_class:
            merged = min(round(merge * n), kept // 2)
        count.append(kept)
        r.append(merged)
    longest = max(count)
    ranked = scores.float().masked_fill(~mask.bool(), -torch.inf)
    if protect_class:
        ranked[:, 0] = torch.inf
    order = ranked.argsort(dim=1, descending=True, stable=True)[:, :longest]
    likeness = None
    if any(r):
        value = scores.float().gather(1, order)
        if style == "diff":
            likeness = -(value[:, ::2, None] - value[:, None, 1::2]).abs()
        else:
            metric = gather_tokens(key, order)
            likeness = _likeness(metric * value[..., None] if style == "tip" else metric)
    official_diff = style == "diff" and not protect_class
    place, weight, used = _merged(
        likeness, count, r, longest, scores.device, style == "tome", not official_diff, not official_diff
    )
    all_places = torch.zeros_like(ranked, dtype=torch.long).scatter(1, order, place)
    return Reduction(all_places, torch.zeros_like(ranked).scatter(1, order, weight), used)


@torch.no_grad()
def reduce_text(key: Tensor, mask: Tensor, merge: float, count_padding: bool = False) -> Reduction | None:
    """Merge text tokens that are alike by their mean; the first one stays alone.

    Args:
        key: (B, L, d), keys averaged over the heads.
        mask: (B, L), 1 for text, 0 for padding, fractions between.
        merge: share of the tokens that merges away.
        count_padding: as in the official code, padding is text: it counts, merges with words, and the mask is averaged.
            False: each row merges its own share of its own words, and padding is cut off.

    Returns:
        None where nothing merges.
    """
    batch, length = mask.shape
    count = [length] * batch if count_padding else (mask > 0).sum(1).tolist()
    r = [min(round(merge * n), (n - 1) // 2) if n else 0 for n in count]
    if not any(r):
        return None
    if count_padding:
        order = torch.arange(length, device=key.device).expand(batch, -1)
    else:
        order = true_indices(mask > 0, max(count), align="left")[0]
    likeness = _likeness(gather_tokens(key, order))
    place, weight, used = _merged(likeness, count, r, order.shape[1], key.device, True)
    all_places = torch.zeros(batch, length, dtype=torch.long, device=key.device).scatter(1, order, place)
    all_weights = torch.zeros(batch, length, device=key.device).scatter(1, order, weight)
    reduction = Reduction(all_places, all_weights, used)
    if not count_padding:
        return reduction
    return Reduction(all_places, all_weights, reduction.apply(mask[..., None].float())[..., 0])
