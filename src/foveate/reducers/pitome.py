"""PiToMe: merge tokens that have many near neighbours, protect those that stand alone.

Paper: "Accelerating Transformers with Spectrum-Preserving Token Merging", arXiv 2405.16148 (NeurIPS 2024). Official
code: hchautran/PiToMe @ 550b5dee (CC BY-NC; re-implemented from the formulas).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from ..ops.bipartite import Merging, cosines, energy_matching, feature_energy, soft_matching
from ..ops.merging import energy_pairs
from ..reduction import BEFORE_LAYERS, Budget, Decision, MethodInfo, OptionError, Reducer, View, register
from ._images import by_image, counts_per_image, renumber_if_possible
from ._layers import check_flag, check_number
from ._merging import check_tower, check_where, decide_by_merging, tower_leaders

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["PiToMe"]

_Rule = Literal["pitome", "bsm_pitome", "tome"]


@dataclass(frozen=True)
class _Preset:
    """How the official code runs an encoder family: margin(l) = start - slope * l / L, and the rule of each layer."""

    start: float
    slope: float
    metric: Literal["key", "hidden"]
    place: Literal["between", "after"]
    weighted: bool = True
    early: _Rule = "pitome"
    late: _Rule = "pitome"
    share: float = 0.5
    spared: int = 0
    """Last layers in which nothing merges."""

    def rule(self, layer: int, layers: int) -> _Rule:
        return self.early if layer < math.ceil(self.share * layers) else self.late


_PRESETS = {
    "clip": _Preset(0.9, 0.9, "hidden", "after"),
    "openclip": _Preset(0.95, 0.95, "hidden", "between"),
    "blip": _Preset(0.9, 0.9, "hidden", "between", spared=1),
    "blip2": _Preset(0.75, 0.4, "key", "between"),
    "deit": _Preset(0.75, 0.75, "key", "between", early="bsm_pitome"),
    "mae": _Preset(0.75, 0.75, "key", "between", late="bsm_pitome"),
    # 13 of the 23 layers whose output counts in LLaVA-1.5 run plain ToMe; means without sizes.
    "llava": _Preset(0.9, 0.9, "hidden", "after", weighted=False, early="tome", share=13 / 23),
}
_DEFAULT = _Preset(0.9, 0.9, "key", "between")


@dataclass(frozen=True)
class _InTower:
    """PiToMe between the layers of a tower; see `foveate.engine.vision.merging.MergeSpec`."""

    preset: _Preset
    budget: Budget | None
    ratio: float
    alpha: float
    proportional: bool

    @property
    def metric(self) -> Literal["key", "hidden"]:
        return self.preset.metric

    @property
    def place(self) -> Literal["between", "after"]:
        return self.preset.place

    @property
    def weighted(self) -> bool:
        return self.preset.weighted

    def schedule(self, tokens: int, layers: int, class_token: bool) -> list[int]:
        return list(self._left(tokens, layers, class_token))

    def _left(self, tokens: int, layers: int, class_token: bool) -> Iterator[int]:
        whole, working = tokens, max(layers - self.preset.spared, 1)
        for layer in range(layers):
            if layer >= working:
                pass
            elif self.budget is not None:
                share = (self.budget.of(whole) / whole) ** ((layer + 1) / working)
                tokens = max(round(whole * share), tokens - tokens // 2)
            else:
                counted = tokens + (class_token and self.preset.rule(layer, layers) == "tome")
                tokens -= min(math.floor(counted - counted * self.ratio), tokens // 2)
            yield tokens

    def match(self, metric: Tensor, r: int, layer: int, layers: int, class_token: bool) -> Merging:
        rule = self.preset.rule(layer, layers)
        if rule == "tome":
            return soft_matching(metric, r, class_token, cap=False)
        similarity = cosines(metric[:, 1:] if class_token else metric)
        energy = feature_energy(similarity, self.preset.start - self.preset.slope * layer / layers, self.alpha)
        return energy_matching(similarity, energy, r, class_token, "all" if rule == "bsm_pitome" else "ranks")


@register("pitome", MethodInfo(paper="arXiv 2405.16148", acts="inside the vision tower", needs="CLIP or SigLIP tower"))
@dataclass
class PiToMe(Reducer):
    """In every layer of the vision tower, of the tokens with the highest energy every second one merges into another.

    The energy of a token is mean_j ELU_alpha(cos_ij - margin), with a margin that falls over the layers: tokens in
    large groups of look-alikes have much, tokens of small objects little, and these are protected. The code's
    expression is used; the paper's equation 4 differs from it above the margin. Merged tokens are projected and take
    the slot of their first patch. What the tower cannot bring down to `keep` is merged on by the same rule (margin
    0.45) on the projected tokens; so is everything with `where="output"`, which works with every model. A vision
    encoder on its own (ViT, CLIP, SigLIP) is served, too: its output keeps its length, each patch carrying its token.

    Args:
        keep: visual tokens per image (int), or their fraction (float in (0, 1]): the layers keep equal shares, and
            exactly as many stay; where a model packs tiles and cuts their padding away (LLaVA-NeXT, LLaVA-OneVision)
            there may be fewer, and for `where="tower"` only a fraction can be given.
        where: "tower" or "output".
        ratio: instead of `keep`, the share of tokens that each layer keeps, as in the paper (0.5 to below 1).
        preset: margins, metric, place and rules as the official code has them for "clip" (Hugging Face), "openclip",
            "blip" (not in the last layer), "blip2", "deit", "mae" or "llava" (plain ToMe in the first 13 of 23 layers,
            unweighted means). None: keys, between attention and MLP, margin 0.9 - 0.9 l / L.
        alpha: of the ELU.
        proportional: whether attention counts a merged token as often as it has patches; off in the official code.
        faithful: like `preset="llava"`, which is what the official code does in LLaVA.

    Raises:
        BudgetError: bad `keep`.
        OptionError: bad `where`, `ratio`, `preset`, `alpha`, `proportional`; not exactly one of `keep` and `ratio`.
        UnsupportedError: when applied, `where="tower"` with a tower unlike CLIP's, SigLIP's or ViT's.
    """

    keep: int | float | None = None
    where: Literal["tower", "output"] = "tower"
    ratio: float | None = None
    preset: str | None = None
    alpha: float = 1.0
    proportional: bool = False
    faithful: bool = False
    tower: _InTower | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_where(self.where)
        if (self.keep is None) == (self.ratio is None):
            raise OptionError(f"keep={self.keep!r}, ratio={self.ratio!r}: give exactly one of them")
        if self.ratio is not None and not (isinstance(self.ratio, float) and 0.5 <= self.ratio < 1):
            raise OptionError(f"ratio={self.ratio!r}: give the share that a layer keeps, from 0.5 to below 1")
        if self.ratio is not None and self.where == "output":
            raise OptionError("ratio= belongs to the layers of the tower; with where='output' give keep=")
        if self.preset is not None and self.preset not in _PRESETS:
            raise OptionError(f"preset={self.preset!r}: use one of {', '.join(_PRESETS)}")
        check_number(self.alpha, 0, 100, "alpha")
        check_flag(self.proportional, "proportional")
        self._budget = None if self.keep is None else Budget(self.keep)
        self.stages = (BEFORE_LAYERS,)
        if self.where == "tower":
            name = self.preset or ("llava" if self.faithful else None)
            preset = _PRESETS[name] if name else _DEFAULT
            self.tower = _InTower(preset, self._budget, self.ratio or 0.0, self.alpha, self.proportional)

    def prepare(self, anatomy: Anatomy) -> None:
        self.positions = renumber_if_possible(anatomy)
        if self.where == "tower":
            check_tower(self.keep, anatomy)

    def decide(self, view: View) -> Decision | None:
        images = by_image(view)
        if not len(images.rows):
            return None
        leaders = tower_leaders(view, images) if self.where == "tower" else None
        counts = counts_per_image(self._budget or Budget(1.0), images)
        weighted = self.tower.weighted if self.tower is not None else True
        match = functools.partial(energy_pairs, margin=_DEFAULT.start / 2, alpha=self.alpha)
        return decide_by_merging(view, images, counts, match, weighted, leaders)
