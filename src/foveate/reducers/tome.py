"""ToMe, token merging: inside the vision tower, similar patches become one.

Paper: "Token Merging: Your ViT But Faster", arXiv 2210.09461 (ICLR 2023). Official code: facebookresearch/ToMe @
af95e4b1 (CC BY-NC 4.0; re-implemented from the formulas). It has no setting for vision-language models.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from ..ops.bipartite import Merging, merge_schedule, soft_matching
from ..ops.merging import soft_pairs
from ..reduction import BEFORE_LAYERS, Budget, Decision, MethodInfo, OptionError, Reducer, View, register
from ._images import by_image, counts_per_image, renumber_if_possible
from ._layers import check_flag, check_number
from ._merging import check_tower, check_where, decide_by_merging, tower_leaders

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["ToMe"]


@dataclass(frozen=True)
class _InTower:
    """ToMe between the layers of a tower; see `foveate.engine.vision.merging.MergeSpec`."""

    budget: Budget | None
    r: int
    inflect: float
    proportional: bool
    metric: Literal["key", "hidden"] = "key"
    place: Literal["between", "after"] = "between"
    weighted: bool = True

    def schedule(self, tokens: int, layers: int, class_token: bool) -> list[int]:
        if self.budget is None:
            removed = merge_schedule(layers, self.r, self.inflect)
        else:
            gone = tokens - self.budget.of(tokens)
            weights = [1 - self.inflect + 2 * self.inflect * i / max(layers - 1, 1) for i in range(layers)]
            steps = [round(gone * sum(weights[: i + 1]) / sum(weights)) for i in range(layers)]
            removed = [later - earlier for earlier, later in zip([0, *steps], steps)]
        left = []
        for step in removed:
            tokens -= min(step, tokens // 2)
            left.append(tokens)
        return left

    def match(self, metric: Tensor, r: int, layer: int, layers: int, class_token: bool) -> Merging:
        return soft_matching(metric, r, class_token)


@register("tome", MethodInfo(paper="arXiv 2210.09461", acts="inside the vision tower", needs="CLIP or SigLIP tower"))
@dataclass
class ToMe(Reducer):
    """Bipartite soft matching in every layer of the vision tower: the most similar pairs of tokens are averaged.

    Similarity is the cosine of the layer's keys, averaged over its heads; the merge is between attention and MLP; means
    are weighted by how many patches a token stands for, and attention counts it as often (proportional attention). Each
    merged token is projected and takes the slot of its first patch. Merging for a language model is unofficial: the
    schedule removes the same number of patches in each layer (or as `inflect` says) so that `keep` are left. What the
    tower cannot bring down to `keep` (at most half of its tokens vanish in a layer) is merged on, by the same rule, on
    the projected tokens; so is everything with `where="output"`, which works with every model. A vision encoder on its
    own (ViT, CLIP, SigLIP) is served, too: its output keeps its length, each patch carrying its token.

    Args:
        keep: visual tokens per image (int), or their fraction (float in (0, 1]). Exactly as many stay; where a model
            packs tiles and cuts their padding away (LLaVA-NeXT, LLaVA-OneVision) there may be fewer, and for
            `where="tower"` only a fraction can be given.
        where: "tower" or "output".
        r: instead of `keep`, patches to remove in each layer of the tower, as in the paper.
        inflect: 0 the same number in every layer, -1 falling to 0, 1 growing from 0, or between.
        proportional: whether attention is proportional (the paper turns it off for MAE).
        faithful: accepted like everywhere. What the official code has (matching, means, `r`, proportional attention) is
            reproduced anyway.

    Raises:
        BudgetError: bad `keep`.
        OptionError: bad `where`, `r`, `inflect`, `proportional`; not exactly one of `keep` and `r`.
        UnsupportedError: when applied, `where="tower"` with a tower unlike CLIP's, SigLIP's or ViT's.
    """

    keep: int | float | None = None
    where: Literal["tower", "output"] = "tower"
    r: int | None = None
    inflect: float = 0.0
    proportional: bool = True
    faithful: bool = False
    tower: _InTower | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_where(self.where)
        if (self.keep is None) == (self.r is None):
            raise OptionError(f"keep={self.keep!r}, r={self.r!r}: give exactly one of them")
        if self.r is not None and (isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1):
            raise OptionError(f"r={self.r!r}: give an int from 1 on")
        if self.r is not None and self.where == "output":
            raise OptionError("r= is a number per layer of the tower; with where='output' give keep=")
        check_number(self.inflect, -1, 1, "inflect")
        check_flag(self.proportional, "proportional")
        self._budget = None if self.keep is None else Budget(self.keep)
        self.stages = (BEFORE_LAYERS,)
        if self.where == "tower":
            self.tower = _InTower(self._budget, self.r or 0, self.inflect, self.proportional)

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
        return decide_by_merging(view, images, counts, soft_pairs, True, leaders)
