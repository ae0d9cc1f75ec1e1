"""DivPrune: before the language model, keep visual tokens that are as different from each other as possible.

Paper: "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", arXiv 2503.02175 (CVPR 2025).
Official code: vbdi/divprune @ 799e2d95 (CC BY-NC 4.0; re-implemented from the formulas).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..ops.diversity import farthest_points
from ..ops.select import index_mask
from ..reduction import BEFORE_LAYERS, Budget, Decision, MethodInfo, Reducer, View, register
from ._images import by_image, counts_per_image, renumber_if_possible, take

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["DivPrune"]


@register("divprune", MethodInfo(paper="arXiv 2503.02175", acts="before the LLM", needs="nothing"))
@dataclass
class DivPrune(Reducer):
    """Solve the max-min diversity problem greedily on the visual embeddings as they enter the language model.

    The first token is the one whose nearest neighbour is farthest away, then always the one whose nearest chosen token
    is farthest away; the distance is 1 - cosine. Text plays no part. All crops of an image, and the learnt row ends
    between them, are one set; several images are chosen from one by one. Kept tokens are in the order of the prompt
    (the published tables were made in the order of selection, issue #8 of the official code). Positions are
    renumbered; with M-RoPE (Qwen-VL, GLM-4V) and sliding windows, for which there is no official code, they are kept.

    Mended: the official code chooses a token again and again when there are fewer distinct vectors than `keep`, and it
    decides in the model's precision, which changes up to a third of the choice in bfloat16.

    Args:
        keep: visual tokens per image (int), or their fraction (float in (0, 1]): exactly as many stay. The paper's is
            0.098.
        faithful: choose the same token again where the official code does. A prompt cannot hold a token twice, so fewer
            stay.

    Raises:
        BudgetError: bad `keep`.
    """

    keep: int | float
    faithful: bool = False

    def __post_init__(self) -> None:
        self._budget = Budget(self.keep)
        self.stages = (BEFORE_LAYERS,)

    def prepare(self, anatomy: Anatomy) -> None:
        self.positions = renumber_if_possible(anatomy)

    def decide(self, view: View) -> Decision | None:
        images = by_image(view)
        if not len(images.rows):
            return None
        counts = counts_per_image(self._budget, images)
        order = farthest_points(take(view.hidden, images), images.valid, counts, repeat=self.faithful)
        chosen = index_mask(order, images.slots.shape[1])
        kept = images.to_slots(chosen.float(), *view.active.shape) > 0
        return Decision(keep=view.active & (kept | ~view.visual))
