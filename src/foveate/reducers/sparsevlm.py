"""SparseVLM: question tokens to which the image matters rate its tokens, and the best of the removed ones are merged.

Paper: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", arXiv 2410.04417 (ICML
2025). Official code: Gumpest/SparseVLMs @ 26a5f488 ("1.5", "2.0") and @ b72c5d6 ("1.0"); re-implemented from the
formulas. Here: the options and the order of things. The mathematics is in `ops.raters` (scores), `ops.schedule` (how
many), `ops.density_peaks` (clusters) and `ops.recycle` (slots).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..ops import raters, schedule
from ..ops.density_peaks import density_peaks, merge_clusters
from ..ops.host import to_device
from ..ops.recycle import Merged, official_order, slot_order
from ..ops.select import first_k_mask, gather_tokens, ranked, true_indices
from ..reduction import (
    BEFORE_LAYERS,
    Decision,
    MethodInfo,
    Tap,
    TapSpec,
    UnsupportedError,
    View,
    register,
)
from ._images import counts_per_row
from ._sparsevlm import Options, Plan, Rules, SparseVLMDetails

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["SparseVLM", "SparseVLMDetails"]

_OFFICIAL_HEADS = 14


class Selection(NamedTuple):
    """What stays of the visual tokens of `B` rows and `S` slots, and what of the rest is clustered.

    Attributes:
        scores: (B, S).
        chosen: (B, S) bool, tokens that stay as they are.
        members: (B, P) long, slots to be clustered by descending score; -1 for padding.
        clusters: (B,) long, how many tokens they become.
        most: the largest of `clusters`.
    """

    scores: Tensor
    chosen: Tensor
    members: Tensor
    clusters: Tensor
    most: int


@register(
    "sparsevlm",
    MethodInfo(
        paper="SparseVLM (arXiv 2410.04417, ICML 2025)",
        acts="inside the LLM",
        needs="attention of some question tokens",
        text_guided=True,
    ),
)
@dataclass
class SparseVLM(Options):
    """Keep, layer by layer, the visual tokens that the raters attend to; merge the best of the removed ones.

    Raters are the tokens of the question that the image is more similar to than to the average one; a visual token's
    score is its attention from them. Of the removed tokens the best 30 % are clustered and come back as one token per
    cluster, in the slot of its centre. At least one visual token stays.

    Options at None are what the variant says: "1.5", "1.0", "2.0" choose as the official code does, "paper" as the
    paper.

    Args:
        keep: visual tokens per image (int), or their fraction (float in (0, 1]): the mean over all decoder layers of
            the tokens left *after* each of them, merged ones included, as the paper's tables count. What enters the
            layers is more (`Trace.mean_visual_tokens`: 206 for 192). "1.5" and "2.0" meet it within 2 % from some 16
            tokens on, "1.0" and "paper" as nearly as their rule allows if the rank stays what it is at first.
        variant: "1.5": fixed counts. "1.0": rank(P) * `scale` + `bias` tokens stay. "2.0" (SparseVLM+): attention is
            corrected for distance, some heads count, nothing is merged. "paper": `lam` * (Lv - rank(P)) go, each layer.
        faithful: the official code to the letter: layers 2, 6, 15 (1.0: and 19) and the counts of LLaVA-1.5-7B whatever
            the model and the image, one rater threshold for the batch, 14 heads, no guard; in 1.x merged tokens after
            the kept ones, and renumbered positions. `keep`: 192, 128, 96 or 64 (1.0: not 96; any if `scale` is given).
        layers: decoder layers after which tokens go: ints, or fractions of the depth. None: 2, 6, 15 of 32 (1.0: and
            19; paper: all), the first one replaced by 0 where `keep` needs it.
        counts: instead of `keep`, tokens kept after each layer, merged ones not counted ("1.5", "2.0").
        recycle: merge removed tokens (2.0: no).
        scale: of 1.0; None: as `keep` needs it (faithful: the official pair of scale and bias).
        bias: of 1.0; None: 0.
        lam: lambda of "paper", in (0, 1]; None: as `keep` needs it.
        positions: "keep" or "renumber"; None: "renumber" for faithful 1.x, else "keep".
        details: the points on which paper and code differ: a `SparseVLMDetails`, or a mapping of some of its fields.

    Raises:
        BudgetError: bad `keep`.
        OptionError: any other bad option; when applied: layers that the model does not have or that cannot meet `keep`.
        UnsupportedError: when applied: `faithful` 2.0 with fewer than 14 heads; renumbering with multi-axis RoPE.
    """

    def prepare(self, anatomy: Anatomy) -> None:
        self._anatomy, self._rules = anatomy, Rules(self, anatomy.depth)
        layers = self._rules.layers
        heads: Any = "none" if self.variant == "2.0" else "mean"
        self.stages = (BEFORE_LAYERS, *layers)
        self.taps = {layer: TapSpec(queries=partial(_rows_to_read, layer), heads=heads) for layer in layers}
        self._heads = _OFFICIAL_HEADS if self.faithful else max(1, round(self.details.head_share * anatomy.heads))
        if self.variant == "2.0" and self._heads > anatomy.heads:
            raise UnsupportedError(
                f"SparseVLM 2.0 with faithful=True chooses {_OFFICIAL_HEADS} heads, this model has {anatomy.heads}; "
                "use faithful=False"
            )

    def decide(self, view: View) -> Decision | None:
        if view.stage == BEFORE_LAYERS:
            self._begin(view)
            return None
        if not any(view.stage in plan.layers for plan in view.state["plans"]):
            return None
        scores, chosen, members, clusters, most = self.select(view)
        if not most:
            return Decision(keep=view.active & (chosen | ~view.visual), scores=scores)
        merged = self.merge_tokens(view, members, clusters, most)
        laid = official_order(view.states, chosen, merged) if self.faithful else slot_order(chosen, merged)
        in_use, slots, values, origin = laid
        own = torch.arange(origin.shape[1], device=origin.device)
        origin = torch.where(view.active & ~view.visual, own, origin)
        return Decision(view.active & (in_use | ~view.visual), slots, values, origin, scores)

    @torch.no_grad()
    def select(self, view: View) -> Selection:
        """What stays after a layer, and what of the rest is clustered."""
        eligible, tap = view.active_visual, self.attention(view)
        scores = self._scores(view, tap)
        rank = self._rank(view, tap)
        facts = [eligible.sum(1)] if rank is None else [eligible.sum(1), rank]
        counts = self._counts(view, torch.stack(facts, 1).tolist())
        kept, pool, clusters = to_device(torch.tensor(counts), scores.device).T
        # Image or not, the last token of the prompt has to stay.
        order = ranked(scores.masked_fill(view.state["last"], torch.inf), eligible)
        chosen = first_k_mask(order, eligible, kept)
        next_best = torch.arange(max(count[1] for count in counts), device=order.device)
        members = order.gather(1, (kept[:, None] + next_best).clamp_max(order.shape[1] - 1))
        members = members.masked_fill(next_best >= pool[:, None], -1)
        return Selection(scores, chosen, members, clusters, max(count[2] for count in counts))

    def _counts(self, view: View, facts: list[list[int]]) -> list[tuple[int, int, int]]:
        """Of each sample's tokens, and rank where it counts: how many stay, are clustered, and come back merged."""
        counts, rules = [], view.state["rules"]
        for row, (plan, (tokens, *ranks)) in enumerate(zip(view.state["plans"], facts)):
            rank = ranks[0] if ranks else 0
            if view.stage not in plan.layers:
                counts.append((tokens, 0, 0))
                continue
            if plan.kept:
                kept = plan.kept[plan.layers.index(view.stage)]
            else:
                if row not in rules:
                    rules[row] = self._rules.rule(plan, tokens, rank)
                factor, bias = rules[row]
                kept = int(rank * factor + bias) if self.variant == "1.0" else tokens - int(factor * (tokens - rank))
            full = self.faithful and self.variant == "1.0" and rank == tokens  # the official code leaves it alone
            counts.append((tokens, 0, 0) if full else self._rules.counts(kept, tokens))
        return counts

    @torch.no_grad()
    def _begin(self, view: View) -> None:
        """Plan every sample, and choose its raters by the embeddings that enter layer 0."""
        slots = torch.arange(view.active.shape[1], device=view.active.device)
        visual, text = view.active_visual, view.active & ~view.visual
        last = slots == (view.active * slots).amax(1, keepdim=True)
        after = text & (slots > (visual * slots).amax(1, keepdim=True))
        after = torch.where(after.any(1, keepdim=True), after, last) & visual.any(1, keepdim=True)
        number = visual.sum(1)
        counted = counts_per_row(self.budget, view) if isinstance(self.budget.keep, int) else number
        facts = torch.stack([number, after.sum(1), counted], 1).tolist()
        plans: list[Plan] = [self._rules.plan(tokens, left) for tokens, _, left in facts]
        view.state.update(plans=plans, rules={}, last=last, raters=after)
        if any(plan.layers for plan in plans):
            image, image_valid = true_indices(visual, max(fact[0] for fact in facts))
            words, words_valid = true_indices(after, max(fact[1] for fact in facts))
            seen, said = gather_tokens(view.hidden, image), gather_tokens(view.hidden, words)
            relevance = raters.text_relevance(seen, said, image_valid, words_valid)
            inclusive = self.choices.rater_threshold == "greater_equal"
            found, _ = raters.rater_mask(relevance, words_valid, inclusive, shared=self.faithful)
            # A question all of whose words are equally relevant has no rater: all of them rate.
            found = torch.where(found.any(1, keepdim=True), found, words_valid)
            view.state["raters"] = torch.zeros_like(after).scatter(1, words, found)
        everything = "text" in (self.choices.score_rows, self._rank_rows)
        rows = after if everything else view.state["raters"]
        # Samples that lose nothing at a stage have no row read there.
        acting = [[stage in plan.layers for stage in self.stages] for plan in plans]
        acts = to_device(torch.tensor(acting), slots.device).T[..., None]
        view.state["rows"] = {stage: rows & acts[i] for i, stage in enumerate(self.stages)}

    @property
    def _rank_rows(self) -> str | None:
        """Rows of the matrix whose rank counts; None where no rank counts."""
        return None if self.variant in schedule.COUNTS else self.choices.rank_rows

    def _rows(self, view: View, tap: Tap, which: str) -> Tensor:
        return tap.row_valid & view.state["raters"].gather(1, tap.query_slots) if which == "raters" else tap.row_valid

    def attention(self, view: View) -> Tap:
        """The rows read, (B, R, N): mean over the heads; in 2.0 corrected for distance, mean over the chosen heads."""
        assert view.tap is not None  # asked for in `prepare`
        if self.variant != "2.0":
            return view.tap
        weights, _ = self.select_heads(view)
        return replace(view.tap, weights=weights)

    def select_heads(self, view: View) -> tuple[Tensor, Tensor]:
        """SparseVLM+: corrected attention (B, R, N), mean over the chosen heads; and these, best first (B, heads)."""
        tap = view.tap
        assert tap is not None
        length, anatomy = view.active.shape[1], self._anatomy
        if anatomy.mrope:  # no line of positions: the plain embedding of the same base
            table = raters.rope_table(length, anatomy.head_dim, anatomy.rope_theta, view.hidden.device)
        else:
            at = torch.arange(length, device=view.hidden.device)[None]
            cos, sin = anatomy.rotary(view.stage, view.hidden[:1, :1].float(), at)
            table = cos[0], sin[0]
        ones = raters.rotated_ones(*table, anatomy.head_dim).to(tap.weights.device)
        floor = None if self.faithful else self.details.gravity_floor
        gravity = raters.gravity_weights(ones, tap.query_slots, tap.key_slots.clamp(0, length - 1), floor)
        corrected = tap.weights / gravity[:, None]
        inside = (tap.key_slots >= 0) & (tap.key_slots < length)
        keys = view.visual.gather(1, tap.key_slots.clamp(0, length - 1)) & inside
        rows = self._rows(view, tap, self.choices.score_rows)
        sums = (corrected * (rows[:, :, None] & keys[:, None])[:, None]).sum((2, 3))
        numbers, chosen = raters.top_heads(sums, self._heads)
        return (corrected * chosen[..., None, None]).sum(1) / self._heads, numbers

    def _scores(self, view: View, tap: Tap) -> Tensor:
        rows = self._rows(view, tap, self.choices.score_rows)
        return replace(tap, row_valid=rows).per_slot(view.active.shape[1])

    def _rank(self, view: View, tap: Tap) -> Tensor | None:
        """(B,) rank of the attention from the rows that count to the visual tokens; None where no rank counts."""
        if self._rank_rows is None:
            return None
        visual = view.active_visual
        matrix = tap.to_slots(tap.weights, visual.shape[1])
        return raters.matrix_rank(matrix, self._rows(view, tap, self._rank_rows), visual)[0]

    def merge_tokens(self, view: View, members: Tensor, counts: Tensor, most: int) -> Merged:
        """Cluster the states at the slots `members` (B, P), -1 for padding, into `counts` (B,) tokens."""
        choices, there = self.choices, members >= 0
        seen = gather_tokens(view.hidden, members)
        clusters = density_peaks(
            seen,
            there,
            counts,
            most,
            neighbours=choices.neighbours,
            normalise=choices.normalise,
            isolation=choices.isolation,
            assignment=choices.assignment,
            guarded=not self.faithful,
        )
        centres = members.gather(1, clusters.centres.clamp_min(0)).masked_fill(clusters.centres < 0, -1)
        states = seen if view.streams is None else gather_tokens(view.states, members)
        merged = merge_clusters(states, there, clusters, choices.merge)
        return Merged(members, clusters.assignment, centres, merged)


def _rows_to_read(stage: int, state: dict[str, Any]) -> Tensor:
    return state["rows"][stage]
