"""CDPruner: before the language model, keep visual tokens that are diverse and relevant to the question.

Paper: "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", arXiv 2506.10967
(NeurIPS 2025). Official code: Theia-4869/CDPruner @ 9541616c (Apache-2.0), `llava/model/llava_arch.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops.determinantal import determinantal_points
from ..ops.select import index_mask
from ..reduction import BEFORE_LAYERS, Budget, Decision, MethodInfo, Patches, Reducer, View, bind, register
from ._images import by_block, by_image, counts_per_image, renumber_if_possible, take
from ._layers import check_flag
from .similarity import CompanionSimilarity, Question, Scorer, choose_scorer

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["CDPruner"]


@register(
    "cdpruner",
    MethodInfo(paper="arXiv 2506.10967", acts="before the LLM", needs="nothing", text_guided=True),
)
@dataclass
class CDPruner(Reducer):
    """Greedy MAP of a determinantal point process with kernel diag(r) S diag(r).

    S are the cosines of the projected features, r the relevance to the question, scaled to (0, 1] within each image.
    All crops of an image are one set, several images are chosen from one by one, everything in float32. Positions are
    closed up ("renumber"); with M-RoPE (Qwen-VL, GLM-4V) and sliding windows, for which there is no official code, they
    are kept.

    The official relevance is minus the cosine of CLIP's patch embeddings and CLIP's text embedding (the paper has a
    plus; low cosines mark relevant patches in CLIP). It needs CLIP's text tower, which LLaVA checkpoints do not have:
    hand it over as `clip`. Without it the relevance is the cosine to the embeddings of the question's words in the
    language model: unofficial.

    Mended: NaN when the rank of the features is used up (the rest is filled by relevance); NaN for constant relevance;
    several samples in one call.

    Args:
        keep: visual tokens per image (int), or their fraction (float in (0, 1]): exactly as many stay.
        similarity: "llm", "clip" (minus the cosine), "siglip", or a function of the view that returns the relevance of
            each slot, (B, S). None: the companion that is given, else "llm".
        clip, siglip: companion model: hub id, folder, or (model, tokenizer).
        question, tokenizer: where a companion reads the question; see `similarity.questions`.
        negate: minus the cosine of a CLIP companion, as in the official code; False for a companion in which high
            cosines mark the relevant patches (`zoo:tiny-clip`, or the paper's formula).
        faithful: the official kernel: each tile of an image is chosen from on its own with an equal share of `keep`
            (rounded down), the relevance scaled over all of them, learnt row ends dropped, NaNs and all.

    Raises:
        BudgetError: bad `keep`.
        OptionError: bad `similarity` or `negate`, or a companion without a question.
    """

    keep: int | float
    similarity: str | Scorer | None = None
    clip: Any = None
    siglip: Any = None
    question: Question | None = None
    tokenizer: Any = None
    negate: bool = True
    faithful: bool = False

    def __post_init__(self) -> None:
        self._budget = Budget(self.keep)
        check_flag(self.negate, "negate")
        self._scorer = choose_scorer(self.similarity, self.clip, self.siglip, self.question, self.tokenizer)
        self.stages = (BEFORE_LAYERS,)

    def prepare(self, anatomy: Anatomy) -> None:
        self.positions = renumber_if_possible(anatomy)
        if isinstance(self._scorer, CompanionSimilarity):
            self._scorer = bind(self._scorer, anatomy)

    def _relevance(self, view: View, images: Patches, blocks: Patches) -> Tensor:
        """(B, S) relevance, scaled over the patches of each image; learnt row ends have none."""
        score = self._scorer(view)
        if isinstance(self._scorer, CompanionSimilarity) and self._scorer.kind == "clip" and self.negate:
            score = -score
        shown = blocks.to_slots(torch.ones_like(blocks.slots), *view.active.shape) > 0
        place = images.rows[:, None], images.slots.clamp_min(0)
        score, patch = score.float()[place], images.valid & shown[place]
        low = score.masked_fill(~patch, torch.inf).amin(1, keepdim=True)
        spread = score.masked_fill(~patch, -torch.inf).amax(1, keepdim=True) - low
        scaled = (score - low + 1e-6) / spread
        if not self.faithful:
            scaled = torch.where(spread > 0, scaled, torch.ones_like(scaled))
        return images.to_slots(torch.where(patch, scaled, 0.0), *view.active.shape)

    def _shares(self, images: Patches, blocks: Patches, view: View) -> Tensor:
        """Equal share of each block in the budget of its image: (blocks,)."""
        numbers = torch.arange(len(images.rows), device=images.rows.device)
        owner = images.to_slots(numbers[:, None].expand_as(images.slots), *view.active.shape)
        mine = owner[blocks.rows, blocks.slots[:, 0]]
        share = counts_per_image(self._budget, images) // torch.bincount(mine, minlength=len(numbers)).clamp_min(1)
        return torch.minimum(share[mine], blocks.valid.sum(1))

    def decide(self, view: View) -> Decision | None:
        images = by_image(view)
        if not len(images.rows):
            return None
        blocks = by_block(view)
        relevance = self._relevance(view, images, blocks)
        sets = blocks if self.faithful else images
        counts = self._shares(images, blocks, view) if self.faithful else counts_per_image(self._budget, images)
        features, weights = take(view.hidden, sets), relevance[sets.rows[:, None], sets.slots.clamp_min(0)]
        order = determinantal_points(features, weights, sets.valid, counts, guard=not self.faithful)
        kept = sets.to_slots(index_mask(order, sets.slots.shape[1]).float(), *view.active.shape) > 0
        return Decision(keep=view.active & (kept | ~view.visual), scores=relevance)
