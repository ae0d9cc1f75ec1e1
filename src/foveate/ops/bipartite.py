"""Merging by bipartite matching: which tokens go into one, found by ToMe or by PiToMe's energy. All samples at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import elu, normalize

from .select import gather_tokens

__all__ = [
    "Merging",
    "cosines",
    "energy_matching",
    "feature_energy",
    "merge_schedule",
    "soft_matching",
]


@dataclass(frozen=True)
class Merging:
    """Which of `T` tokens go into which of `T'` ones.

    Attributes:
        index: (B, T) long, the output place of each token; every place has at least one.
        kept: (B, T') long, the token that each output place continues (the target of a merge, or a token left alone).
    """

    index: Tensor
    kept: Tensor

    @property
    def length(self) -> int:
        """T'."""
        return self.kept.shape[1]

    def sums(self, x: Tensor) -> Tensor:
        """Sum of each group: (B, T, D) -> (B, T', D)."""
        out = x.new_zeros(x.shape[0], self.length, x.shape[2])
        return out.scatter_add_(1, self.index[..., None].expand_as(x), x)

    def mean(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean of each group, weighted by how many original tokens each of its members stands for.

        Args:
            x: (B, T, D).
            size: (B, T, 1), or None for ones.

        Returns:
            (B, T', D) and the new sizes (B, T', 1).
        """
        size = x.new_ones(*x.shape[:2], 1) if size is None else size
        total = self.sums(size)
        return self.sums(x * size) / total, total

    def prune(self, x: Tensor) -> Tensor:
        """Drop instead of merging: (B, T, D) -> (B, T', D)."""
        return gather_tokens(x, self.kept)

    def maximum(self, x: Tensor) -> Tensor:
        """Largest value of each group, for masks: (B, T, D) -> (B, T', D)."""
        out = x.new_zeros(x.shape[0], self.length, x.shape[2])
        return out.scatter_reduce_(1, self.index[..., None].expand_as(x), x, "amax", include_self=False)

    def unmerge(self, x: Tensor) -> Tensor:
        """Give every member its group's value: (B, T', D) -> (B, T, D)."""
        return gather_tokens(x, self.index)

    def membership(self) -> Tensor:
        """(B, T', T) bool: which tokens are in which group."""
        return self.index[:, None] == torch.arange(self.length, device=self.index.device)[:, None]

    @classmethod
    def none(cls, batch: int, tokens: int, device: torch.device) -> Merging:
        """Nothing merges."""
        index = torch.arange(tokens, device=device).expand(batch, -1)
        return cls(index, index)

    @classmethod
    def of(cls, first: Tensor, alone: Tensor, target: Tensor, source: Tensor, partner: Tensor) -> Merging:
        """Output order [first, alone, target]; each `source` token goes into `target[partner]`.

        Args:
            first, alone, target, source: (B, .) indices that together are all tokens.
            partner: like `source`, indices into `target`.
        """
        kept = torch.cat([first, alone, target], 1)
        offset = first.shape[1] + alone.shape[1]
        places = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        index = torch.empty(kept.shape[0], kept.shape[1] + source.shape[1], dtype=torch.long, device=kept.device)
        index = index.scatter(1, kept, places).scatter(1, source, partner + offset)
        return cls(index, kept)


def cosines(metric: Tensor) -> Tensor:
    """(B, T, C) -> (B, T, T) float32."""
    units = normalize(metric.float(), dim=-1)
    return units @ units.transpose(1, 2)


def _descending(scores: Tensor) -> Tensor:
    return scores.argsort(dim=1, descending=True, stable=True)


def soft_matching(
    metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False, cap: bool = True
) -> Merging:
    """ToMe's bipartite soft matching: of the tokens at even places, the `r` most similar to one at an odd place merge.

    Source: arXiv 2210.09461, section 3; facebookresearch/ToMe @ af95e4b1 (re-implemented from the formulas).

    Args:
        metric: (B, T, C), compared by cosine in float32.
        r: tokens to remove; at most half of those that are not protected.
        class_token: token 0 never merges.
        distill_token: token 1 is never merged into, and comes second in the output.
        cap: False only for PiToMe's copy of ToMe, which lets `r` run up to half of all tokens.

    Returns:
        T - r tokens in ToMe's order: tokens at even places that stay (by falling similarity; in their own order with a
        class token), then those at odd places.
    """
    batch, tokens = metric.shape[:2]
    r = min(r, (tokens - (class_token + distill_token if cap else 0)) // 2)
    if r <= 0:
        return Merging.none(batch, tokens, metric.device)
    units = normalize(metric.float(), dim=-1)
    scores = units[:, ::2] @ units[:, 1::2].transpose(1, 2)
    if class_token:
        scores[:, 0] = -torch.inf
    if distill_token:
        scores[:, :, 0] = -torch.inf
    best, partner = scores.max(2)
    ranked = _descending(best)
    source, alone = ranked[:, :r], ranked[:, r:]
    if class_token:
        alone = alone.sort(1).values
    target = torch.arange(1, tokens, 2, device=metric.device).expand(batch, -1)
    merging = Merging.of(target[:, :0], alone * 2, target, source * 2, partner.gather(1, source))
    return _distill_second(merging, alone.shape[1]) if distill_token else merging


def _distill_second(merging: Merging, alone: int) -> Merging:
    """Move the place of the first odd token after that of the first even one."""
    places = torch.arange(merging.length, device=merging.index.device)
    new = torch.where(places == alone, 1, torch.where((places >= 1) & (places < alone), places + 1, places))
    return Merging(new[merging.index], merging.kept[:, new.argsort()])


def feature_energy(similarity: Tensor, margin: float, alpha: float = 1.0) -> Tensor:
    """PiToMe's energy: how many near neighbours a token has, mean_j ELU(S_ij - margin), itself included.

    Source: arXiv 2405.16148, equation 4 as in the code: hchautran/PiToMe @ 550b5dee, `pitome_vision` (the paper's own
    expression is larger by `margin` above the margin).

    Args:
        similarity: (B, T, T).
        margin: below it, similarity counts as alpha * (exp(S - margin) - 1).

    Returns:
        (B, T).
    """
    return elu(similarity - margin, alpha=alpha).mean(-1)


def energy_matching(
    similarity: Tensor, energy: Tensor, r: int, class_token: bool = False, pairs: str = "ranks"
) -> Merging:
    """PiToMe's matching: only the 2r tokens of highest energy take part, tokens with few near neighbours are protected.

    Source: arXiv 2405.16148, algorithm 1; hchautran/PiToMe @ 550b5dee, `pitome_vision` and `pitome_text`.

    Args:
        similarity: (B, T', T') of the tokens without the class token.
        energy: (B, T').
        r: tokens to remove, at most half of them.
        class_token: a token before all of these stays first.
        pairs: "ranks": even ranks of energy merge into odd ones; "halves": the upper half into the lower; "all": of all
            tokens at even ranks, the r most similar to one at an odd rank (nothing is protected).

    Returns:
        Order: class token, tokens left alone, tokens merged into.
    """
    batch, tokens = energy.shape
    r = min(r, tokens // 2)
    if r <= 0:
        return Merging.none(batch, tokens + class_token, energy.device)
    ranked = _descending(energy)
    if pairs == "all":
        a, b, alone = ranked[:, ::2], ranked[:, 1::2], ranked[:, :0]
    elif pairs == "halves":
        a, b, alone = ranked[:, :r], ranked[:, r : 2 * r], ranked[:, 2 * r :]
    else:
        a, b, alone = ranked[:, : 2 * r : 2], ranked[:, 1 : 2 * r : 2], ranked[:, 2 * r :]
    rows = similarity.gather(1, a[..., None].expand(-1, -1, tokens))
    best, partner = rows.gather(2, b[:, None].expand(-1, a.shape[1], -1)).max(2)
    if pairs == "all":
        order = _descending(best)
        source, alone = a.gather(1, order[:, :r]), a.gather(1, order[:, r:])
        partner = partner.gather(1, order[:, :r])
    else:
        source = a
    shift = int(class_token)
    first = torch.zeros(batch, shift, dtype=torch.long, device=energy.device)
    return Merging.of(first, alone + shift, b + shift, source + shift, partner)


def merge_schedule(layers: int, r: int, inflect: float = 0.0) -> list[int]:
    """Tokens that ToMe removes in each of `layers` layers, `r` on average.

    Source: facebookresearch/ToMe @ af95e4b1, `parse_r`.

    Args:
        layers: number of layers.
        r: tokens per layer.
        inflect: 0 constant, -1 falling to 0, 1 growing from 0.
    """
    low = int(r * (1 - inflect))
    high = 2 * r - low
    step = (high - low) / (layers - 1) if layers > 1 else 0.0
    return [int(low + step * layer) for layer in range(layers)]
