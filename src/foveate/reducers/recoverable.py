"""Recoverable Compression: filter patches by the image alone, then get back those that the question is about.

Paper: "Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by Text Information", arXiv
2409.01179 (AAAI 2025). Official code: banjiuyufen/Recoverable-Compression @ d9275944 (Apache-2.0),
`llava/model/multimodal_encoder/clip_encoder.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..ops.host import to_device, to_host
from ..ops.prumerge import class_attention
from ..ops.recoverable import merge_rest, merge_rest_official, recover, recover_faithful
from ..ops.select import gather_tokens, index_mask, padded_indices, put
from ..reduction import (
    BEFORE_LAYERS,
    Budget,
    Decision,
    MethodInfo,
    OptionError,
    Reducer,
    UnsupportedError,
    View,
    bind,
    register,
)
from ._images import renumber_if_possible
from ._tower import Blocks, attention_after, decide_in_place, decide_reordered, feature_layer, states
from .similarity import Question, Scorer, choose_scorer, llm_similarity

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["Recoverable"]


@register(
    "recoverable",
    MethodInfo(
        paper="arXiv 2409.01179",
        acts="before the LLM",
        needs="attention of the vision tower; a CLIP or SigLIP companion, or none",
        text_guided=True,
    ),
)
@dataclass
class Recoverable(Reducer):
    """Visual filter, text recovery, secondary recovery and merging.

    1. Filter: as many patches as there are outliers in the CLS token's attention, the most attended ones. 2. Recovery:
    of the others as many as there are outliers in the similarity to the question, the most similar ones. 3. Of the
    rest, the most attended ones (as many as outliers) become centres: each is replaced by the attention-weighted mean
    of itself and its 32 nearest, by cosine of the keys plus `text_weight` times the similarity to the question. 4. One
    token, in the slot of the last patch that goes, is the weighted mean of the whole rest. Outliers have a local
    outlier factor above 1.5. Attention and keys are those of the layer after that of the features; without a CLS token,
    attention received counts.

    Merged features are projected; where a visual token is made of several patches (Qwen-VL, InternVL) the visual tokens
    themselves are merged. Tiles of an image are served one by one. Positions are renumbered, with M-RoPE kept.

    Mended: the official code encodes the first line of the prompt (LLaVA's system prompt) instead of the question, and
    its state at the last padded place; compares centres with the keys of other patches; takes as many centres as the
    feature width says; adds sums that are not normalised; drops the rest where there is no centre; takes one image.

    Args:
        keep: visual tokens per image (int), or their fraction (float in (0, 1]), merged ones included; exactly as many
            stay, in the proportion of the outliers. None: as many as the outliers say, different in every sample: about
            a tenth in LLaVA-1.5 (paper), more in small towers (a third of the 196 patches of `zoo:tiny-llava`).
        clip: the companion that compares patches and question: a hub id such as "openai/clip-vit-large-patch14-336", a
            folder, or (CLIPModel, tokenizer); loaded when the method is applied.
        siglip: the same with SigLIP.
        similarity: "clip", "siglip"; "llm": visual tokens against the question's embeddings in the language model,
            needs no companion; or a function of the view, see `foveate.reducers.similarity`. None: the companion given,
            else "llm".
        question: the question, one for each row, or a function of the view; None: it is read from the prompt.
        tokenizer: the language model's, with which a companion's question is read from the prompt.
        neighbours: of a centre.
        text_weight: see 3; the official 50 / sqrt(768).
        faithful: the official code (see Mended), its order of tokens, without `keep`.
        variant: with `faithful`: "default", or "union", the other official function: filter and recovery both look at
            all patches, centres are a share of all patches, the rest is always pooled.

    Raises:
        BudgetError: bad `keep`.
        OptionError: any other bad option, a companion or a question that is missing; when applied, a companion that
            cannot be loaded.
        UnsupportedError: when used, images that the companion cannot be shown.
    """

    keep: int | float | None = None
    clip: Any = None
    siglip: Any = None
    similarity: Literal["clip", "siglip", "llm"] | Scorer | None = None
    question: Question | None = None
    tokenizer: Any = None
    neighbours: int = 32
    text_weight: float = 1.8
    faithful: bool = False
    variant: Literal["default", "union"] = "default"

    def __post_init__(self) -> None:
        self._budget = None if self.keep is None else Budget(self.keep)
        if isinstance(self.neighbours, bool) or not isinstance(self.neighbours, int) or self.neighbours < 1:
            raise OptionError(f"neighbours={self.neighbours!r}: give a number of patches")
        if isinstance(self.text_weight, bool) or not isinstance(self.text_weight, int | float):
            raise OptionError(f"text_weight={self.text_weight!r}: give a number")
        if self.variant not in ("default", "union"):
            raise OptionError(f"variant={self.variant!r}: use 'default' or 'union'")
        if self.faithful and self.keep is not None:
            raise OptionError(f"keep={self.keep!r}: the official code has no budget; leave it out with faithful=True")
        if self.variant == "union" and not self.faithful:
            raise OptionError("variant='union' belongs to faithful=True")
        self._score = choose_scorer(
            self.similarity, self.clip, self.siglip, self.question, self.tokenizer, self.faithful
        )
        if self.faithful and self._score is llm_similarity and self.similarity is None:
            raise OptionError("faithful=True needs the official companion: give clip= and tokenizer=, or similarity=")
        self.stages = (BEFORE_LAYERS,)

    def prepare(self, anatomy: Anatomy) -> None:
        self.positions = renumber_if_possible(anatomy)
        self._features = feature_layer(anatomy)
        self._keys, self.vision_taps = attention_after(self._features)
        if hasattr(self._score, "prepare"):
            self._score = bind(self._score, anatomy)

    def decide(self, view: View) -> Decision | None:
        blocks = Blocks.of(view, self._budget)
        patches = blocks.any
        similarity = self._score(view).float()[patches.rows[:, None], patches.slots.clamp_min(0)]
        return (self._official if self.faithful else self._mended)(blocks, similarity)

    def _mended(self, blocks: Blocks, similarity: Tensor) -> Decision:
        attention, valid = blocks.attention(self._keys), blocks.valid
        key = blocks.patches[self._keys].key
        assert key is not None
        # What stays depends on two numbers for each patch; that is settled on the host, after one wait.
        seen = [attention, similarity, valid, *([blocks.shares()] if self._budget else [])]
        scores, likeness, there, *shares = map(torch.from_numpy, to_host(*seen))
        chosen = recover(scores, likeness, there, shares[0] if shares else None)
        own = torch.arange(there.shape[1])
        pruned = there & ~chosen.main & ~index_mask(chosen.centres, there.shape[1])
        last = torch.where(chosen.pooled, torch.where(pruned, own, -1).amax(1), -1)[:, None]
        places = torch.cat([chosen.centres, last], 1)
        homes = index_mask(places, there.shape[1])
        stays = torch.where(chosen.main | homes, own, -1)

        found, kept = chosen.on(valid.device), to_device(chosen.main | homes, valid.device)
        overwritten, stays = to_device(places, valid.device), to_device(stays, valid.device)
        x, project = states(blocks, self._features)
        merged, extra, column = merge_rest(
            x, key.flatten(2), attention, similarity, found, valid, self.neighbours, self.text_weight
        )
        owner = torch.where(column >= 0, overwritten.gather(1, column.clamp_min(0)), -1)
        owner = torch.where(kept, stays, owner)
        values = project(torch.cat([merged, extra], 1))
        return decide_in_place(blocks, kept, overwritten, values, owner, attention)

    def _official(self, blocks: Blocks, similarity: Tensor) -> Decision:
        read, valid = blocks.patches[self._keys], blocks.valid
        assert read.key is not None
        if read.cls_query is None or read.cls_key is None or not bool(valid.all()):
            raise UnsupportedError(
                "Recoverable with faithful=True needs a tower with a CLS token and images of one size"
            )
        attention = class_attention(read.cls_query, read.cls_key, read.key)
        x, project = states(blocks, self._features)
        found = recover_faithful(attention, similarity, x.shape[2], self.variant)
        centres, extra = merge_rest_official(x, read.key.flatten(2), attention, similarity, found, self.neighbours)
        main = padded_indices(found.main, int(found.main.sum(1).max()))
        features = gather_tokens(x, main)
        values = torch.cat([features.to(centres.dtype), centres, extra], 1)
        last = torch.where(found.pooled, 0, -1)[:, None]
        source = torch.cat([main, found.centres, last], 1)
        count = source.shape[1]
        key = torch.arange(source.numel(), device=valid.device).view(-1, count).masked_fill(source < 0, -1)
        tokens = valid.shape[1]
        place = source[:, :-1]
        number = torch.arange(count - 1, device=valid.device).expand_as(place)
        column = put(torch.where(found.pooled, count - 1, -1)[:, None].expand(-1, tokens), place, number)
        homes = index_mask(place, tokens)
        return decide_reordered(blocks, homes, project(values), key, column, attention)
