"""PyramidDrop: drop visual tokens in several stages, deeper layers seeing ever fewer.

Paper: "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", arXiv
2410.17247 (CVPR 2025). Official code: Cooperx521/PyramidDrop @ 6444f304 (MIT), `llava/model/modeling_llama_pdrop.py`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops.host import to_device
from ..ops.select import top_k_mask
from ..reduction import Budget, Decision, MethodInfo, OptionError, Reducer, TapSpec, View, register
from ._images import can_renumber, counts_per_row, truncated
from ._layers import check_layers, resolve_layer

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["PyramidDrop"]

_LAYERS, _RATIOS = (8, 16, 24), (0.5, 0.25, 0.125)
_FRACTIONS = (0.25, 0.5, 0.75)


@register(
    "pyramiddrop",
    MethodInfo(
        paper="arXiv 2410.17247",
        acts="before several decoder layers",
        needs="attention of the last token",
        text_guided=True,
    ),
)
@dataclass
class PyramidDrop(Reducer):
    """Before each layer of a list, keep the visual tokens that the last prompt token would attend to most there.

    The attention row is the one layer L would compute without the drop: its own norm, query and key projections (mean
    over heads, softmax over all tokens). Where L's attention is not of the plain Llama kind (M-RoPE, fused projections,
    layers without RoPE), the row that layer L - 1 did compute is taken instead: a substitute, not in the paper. After
    each drop positions are counted anew, per layer, decoding included ("renumber", official; "keep" with
    M-RoPE and sliding windows).

    Mended: depths other than 32, left padding, batches, several images in a row (one set).

    Args:
        keep: visual tokens per image (int), or their fraction (float in (0, 1]), that enter the decoder layers on
            average. A share r stays at the first layer of the list, r^2 at the second, r^3 at the third, rounded so
            that the average is met (at least one token stays). The paper's own setting is a fraction of 0.469.
        layers: before which layers tokens go: numbers from 1 on, or fractions of the depth. Default: 1/4, 1/2, 3/4; for
            a `keep` below 5/12 a half, a quarter, ... of these, sample by sample, until it can be met.
        ratios: instead of `keep`, the fraction of all visual tokens left at each of `layers` (rounded down). Without
            both, the paper's (0.5, 0.25, 0.125).
        renumber: whether positions are counted anew after each drop (official); None: where the model allows it.
        faithful: the official layers 8, 16, 24 at any depth unless `layers` is given; those beyond the depth are left
        out.

    Raises:
        BudgetError: bad `keep`.
        OptionError: bad or contradictory `layers`, `ratios`, `renumber`; layers beyond the depth when applied.
    """

    keep: int | float | None = None
    layers: Sequence[int | float] | None = None
    ratios: Sequence[float] | None = None
    renumber: bool | None = None
    faithful: bool = False

    def __post_init__(self) -> None:
        self._budget = None if self.keep is None else Budget(self.keep)
        if self._budget is not None and self.ratios is not None:
            raise OptionError(f"keep={self.keep} and ratios={self.ratios}: give one of them")
        if self.layers is not None:
            check_layers(self.layers, first=1)
        ratios = self.ratios if self.ratios is not None else _RATIOS
        if not _are_falling(ratios):
            raise OptionError(f"ratios={self.ratios!r}: give fractions in (0, 1] that do not grow")
        layers = self.layers if self.layers is not None else _FRACTIONS
        if self._budget is None and len(layers) != len(ratios):
            raise OptionError(f"layers={self.layers!r} and ratios={self.ratios!r}: give one ratio for each layer")
        if self.renumber not in (None, True, False):
            raise OptionError(f"renumber={self.renumber!r}: use True, False or None")

    def prepare(self, anatomy: Anatomy) -> None:
        depth, lists = anatomy.depth, []
        if self.layers is not None or self.faithful or self._budget is None:
            given = self.layers or (_LAYERS if self.faithful else _FRACTIONS)
            if self.layers is None and self.faithful:
                given = [layer for layer in given if layer < depth]
            lists.append([resolve_layer(layer, depth, first=1, option="layers") for layer in given])
        else:
            lists = _halved(depth)
        if any(later <= earlier for layers in lists for earlier, later in itertools.pairwise(layers)):
            raise OptionError(f"layers={self.layers}: must ascend (they are {lists[0]} of {depth})")
        self._depth, self._lists = depth, lists
        self.stages = tuple(sorted({layer - 1 for layers in lists for layer in layers}))
        one_axis = not anatomy.mrope and hasattr(anatomy.decoder, "rotary_emb")
        self.positions = "renumber" if (can_renumber(anatomy) if self.renumber is None else self.renumber) else "keep"
        plain = one_axis and anatomy.plain_attention
        tap = TapSpec(queries=None, ahead=True) if plain else TapSpec(queries="last")
        self.taps = dict.fromkeys(self.stages, tap)

    # ------------------------------------------------------------------------------------------------------ schedule
    def _plan(self, view: View) -> tuple[Tensor, Tensor, set[int]]:
        """Layers and token counts of each sample, (B, stages) both, and all layers at which something happens."""
        tokens = view.active_visual.sum(1)  # in a Chain, those that others have left
        counted = tokens
        if self._budget is not None and isinstance(self._budget.keep, int):
            counted = counts_per_row(self._budget, view)
        facts = torch.stack([tokens, counted], 1).tolist()
        plans = [self._plan_sample(*fact) for fact in facts]
        layers, counts = to_device(torch.tensor(plans), tokens.device).unbind(1)
        return layers, counts, {layer for plan in plans for layer in plan[0]}

    def _plan_sample(self, tokens: int, counted: int) -> tuple[Sequence[int], Sequence[int]]:
        """Layers and token counts of a sample of `tokens`, of which a count as budget leaves `counted`."""
        if self._budget is None:
            (layers,) = self._lists
            return layers, [truncated(tokens, ratio) for ratio, _ in zip(self.ratios or _RATIOS, layers)]
        keep = self._budget.keep
        fraction = (tokens * keep if isinstance(keep, float) else counted) / max(tokens, 1)
        # The first of the lists that leaves enough of the budget to the layers after its first one.
        possible = (layers for layers in self._lists if layers[0] / self._depth <= 0.6 * fraction)
        layers = next(possible, self._lists[-1])
        return layers, _pyramid(tokens, fraction, tuple(layers), self._depth)

    def decide(self, view: View) -> Decision | None:
        if "plan" not in view.state:
            view.state["plan"] = self._plan(view)
        layers, counts, wanted = view.state["plan"]
        layer = view.stage + 1
        if layer not in wanted:
            return None
        eligible, here = view.active_visual, layers == layer
        target = torch.where(here, counts, 0).sum(1)
        target = torch.where(here.any(1), target, eligible.sum(1))
        tap = view.tap if view.ahead is None else view.ahead(view.hidden, view.active)
        assert tap is not None  # asked for in `prepare`
        scores = tap.per_slot(view.active.shape[1])
        chosen = top_k_mask(scores, eligible, target)
        return Decision(keep=view.active & (chosen | ~view.visual), scores=scores)


def _are_falling(ratios: Any) -> bool:
    """A list of fractions, none larger than the one before it."""
    if isinstance(ratios, str) or not isinstance(ratios, Sequence):
        return False
    numbers = all(isinstance(ratio, int | float) and not isinstance(ratio, bool) for ratio in ratios)
    return numbers and all(0 < ratio <= 1 for ratio in ratios) and list(ratios) == sorted(ratios, reverse=True)


def _halved(depth: int) -> list[list[int]]:
    """1/4, 1/2, 3/4 of the depth, a half of these, and so on, down to layers 1, 2, 3."""
    lists: list[list[int]] = []
    scale = 1.0
    while not lists or lists[-1][0] > 1:
        layers: list[int] = []
        for fraction in _FRACTIONS:
            layers.append(max(round(fraction * scale * depth), layers[-1] + 1 if layers else 1))
        if layers[-1] >= depth:
            layers = [layer for layer in layers if layer < depth] or [depth - 1]
        lists.append(layers)
        scale /= 2
    shortest = min(map(len, lists))
    return [layers[:shortest] for layers in lists]


@functools.lru_cache(maxsize=4096)
def _pyramid(tokens: int, fraction: float, layers: tuple[int, ...], depth: int) -> list[int]:
    """Counts that fall geometrically and give an average of `fraction` over the layers, one for each of `layers`."""
    spans = [end - layer for layer, end in zip(layers, (*layers[1:], depth))]
    wanted = fraction * depth - layers[0]
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        over = sum(span * middle ** (i + 1) for i, span in enumerate(spans)) > wanted
        low, high = (low, middle) if over else (middle, high)
    counts = [round(tokens * high ** (i + 1)) for i in range(len(layers))]
    for stage in reversed(range(len(layers))):  # what rounding did to the average, the stages take back
        missing = tokens * wanted - sum(span * count for span, count in zip(spans, counts))
        upper = counts[stage - 1] if stage else tokens
        lower = counts[stage + 1] if stage + 1 < len(layers) else min(tokens, 1)
        counts[stage] = min(max(counts[stage] + round(missing / spans[stage]), lower), upper)
    return counts
