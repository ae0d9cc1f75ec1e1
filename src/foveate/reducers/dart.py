"""DART: after an early layer, keep the visual tokens that duplicate a few pivot tokens least.

Paper: "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", arXiv 2502.11494
(EMNLP 2025). Official code: ZichenWen1/DART (Apache-2.0), `get_retained_image_token`, read from the copy in
Chenfei-Liao/VTC-Bench @ 983e443e, `external/DART`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..ops.duplication import least_duplicated
from ..ops.select import gather_tokens, top_k_indices
from ..reduction import Budget, Decision, MethodInfo, OptionError, Reducer, TapSpec, View, look_up, register
from ._images import counts_per_row, truncated
from ._layers import check_layer, resolve_layer

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["DART"]


@register(
    "dart",
    MethodInfo(
        paper="arXiv 2502.11494", acts="after an early decoder layer", needs="keys of that layer", text_guided=True
    ),
)
@dataclass
class DART(Reducer):
    """Keep pivots and what is least similar to them; no attention is needed.

    Pivots are the visual tokens, and the text tokens after the first image, with the largest keys (L1 norm over all
    heads) in layer `layer` - 1. Visual pivots stay; then every pivot, visual ones first, by norm, takes an equal share
    of visual tokens with the lowest cosine to itself (hidden states after layer `layer` - 1, through the decoder's
    final norm). Images of one sample are one set. Positions are kept.

    Mended: exactly `keep` tokens stay (the official count is up to `pivot_image` above it: 132 for 128, and its
    division loses the remainder); the order in which pivots choose, which decides between 1 to 33 of its tokens, is not
    that of a Python set; few text tokens or a large `keep` are no error; several images; padding.

    Args:
        keep: visual tokens per image (int), or their fraction (float in (0, 1]), that stay from `layer` on.
        layer: K, the first decoder layer that runs on fewer tokens: an int from 1 on, or a fraction of the depth.
        pivot_image: visual pivots per sample, at least 1.
        pivot_text: text pivots per sample.
        faithful: the official counts, pivot_image + (pivot_image + pivot_text) * floor(`keep` / (pivot_image +
            pivot_text)), and CPython's iteration order of a set of pivots (one device sync per sample). An int is
            `max_num_trunction`, a float is 1 - `reduction_ratio`.

    Raises:
        BudgetError: bad `keep`.
        OptionError: bad `layer` or pivots; `layer` beyond the depth of the model when applied.
    """

    keep: int | float
    layer: int | float = 2
    pivot_image: int = 4
    pivot_text: int = 4
    faithful: bool = False

    def __post_init__(self) -> None:
        self._budget = Budget(self.keep)
        check_layer(self.layer, first=1)
        for option, least in (("pivot_image", 1), ("pivot_text", 0)):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OptionError(f"{option}={value!r}: give an int from {least} on")

    def prepare(self, anatomy: Anatomy) -> None:
        self._first = resolve_layer(self.layer, anatomy.depth, first=1)
        self._norm = getattr(anatomy.decoder, "norm", None) or torch.nn.Identity()
        self.stages = (self._first - 1,)
        self.taps = {self._first - 1: TapSpec(queries="last", keep_qk=True)}

    def decide(self, view: View) -> Decision:
        assert view.tap is not None  # asked for in `prepare`
        assert view.tap.key is not None
        norms = view.tap.to_slots(view.tap.key.float().abs().sum((1, 3)), view.active.shape[1])
        visual = view.active_visual
        after = view.active & ~view.visual & (view.visual.cumsum(1) > 0)
        image_pivots, image_exists = top_k_indices(norms, visual, self.pivot_image)
        text_pivots, text_exists = top_k_indices(norms, after, self.pivot_text)
        total = counts_per_row(self._budget, view)
        if not self.faithful:
            image_exists &= torch.arange(image_exists.shape[1], device=total.device) < total[:, None]
        pivots, exists = torch.cat([image_pivots, text_pivots], 1), torch.cat([image_exists, text_exists], 1)
        if self.faithful:
            first = view.tokens.int().argmax(1, keepdim=True)  # slots are counted without the padding
            pivots, takes = self._official(pivots - first, exists, visual)
            pivots = pivots + first
        else:
            takes = _equal_shares(total - image_exists.sum(1), exists)
        kept = torch.zeros_like(visual).scatter(1, image_pivots, image_exists)
        there = next(iter(self._norm.parameters()), view.hidden).device  # the norm may be on another device
        states = normalize(self._norm(view.hidden.to(there)).to(view.hidden.device).float(), dim=-1)
        chosen = gather_tokens(states, pivots)
        kept = kept | least_duplicated(chosen @ states.transpose(1, 2), visual & ~kept, takes)
        return Decision(keep=view.active & (kept | ~view.visual), scores=norms)

    def _official(self, pivots: Tensor, exists: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Pivots in CPython's set order, and how many tokens each takes: (B, P) both."""
        orders = []
        for row, real in zip(pivots.tolist(), exists.tolist()):
            existing = [slot for slot, there in zip(row, real) if there]
            orders.append(list(set(existing)) + [0] * (len(row) - len(existing)))
        tokens, keep = visual.sum(1), self._budget.keep
        if isinstance(keep, int):
            share = (tokens - self.pivot_image).clamp_max(keep)
        else:
            share = look_up(tokens, visual.shape[1], truncated, keep)
        each = (share // (self.pivot_image + self.pivot_text)).clamp_min(0)[:, None]
        rank = torch.arange(pivots.shape[1], device=pivots.device)
        takes = torch.where(rank < exists.sum(1, keepdim=True), each, 0)
        return torch.tensor(orders, device=pivots.device), takes


def _equal_shares(total: Tensor, exists: Tensor) -> Tensor:
    """Deal `total` (B,) out to what `exists` (B, P), the first ones getting one more: (B, P)."""
    rank, number = exists.cumsum(1) - 1, exists.sum(1, keepdim=True).clamp_min(1)
    share, extra = total[:, None] // number, total[:, None] % number
    return torch.where(exists, share + (rank < extra).long(), 0)
