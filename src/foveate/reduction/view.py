"""What a method sees: what may be read in the model, and the view of one stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..engine.layout import Layout

__all__ = ["Patches", "Tap", "TapSpec", "View", "VisionSpec"]


@dataclass(frozen=True)
class TapSpec:
    """What to read in the attention of a decoder layer, for the decision of the stage after that layer.

    Attributes:
        queries: which rows. `"last"`: the last prompt token; `"text"`: every token that is not visual; `"text_after"`:
            text after the last visual token of its row; a BoolTensor (B, S); or a function of `View.state` that returns
            one (for rows chosen at an earlier stage). None: nothing is read in this layer.
        heads: `"mean"` averages the heads, `"none"` hands them over one by one.
        keep_qk: also hand over the queries of the rows and all keys, after RoPE.
        ahead: `View.ahead` tells the row of the last token in the layer after the stage, before that layer runs. Only
            for decoders of the plain kind (`Anatomy.plain_attention`).
    """

    queries: str | Tensor | Callable[[dict[str, Any]], Tensor] | None = "last"
    heads: Literal["mean", "none"] = "mean"
    keep_qk: bool = False
    ahead: bool = False


@dataclass
class Tap:
    """Attention rows as read: softmax over *all* keys of the layer, with the layer's own mask, in float32.

    Attributes:
        weights: (B, R, N), or (B, H, R, N) with `heads="none"`.
        row_valid: (B, R) bool; False marks padding of a row list shorter than the longest in the batch.
        query_slots: (B, R) sequence slot of each row, 0 for padding.
        key_slots: (B, N) sequence slot of each key; -1 marks a filler, negative slots an earlier turn.
        query: (B, H, R, d) or None.  key: (B, Hkv, N, d) or None. With one-axis RoPE, turned as if the first token of
            the row, padding left out, were at position 0.
    """

    weights: Tensor
    row_valid: Tensor
    query_slots: Tensor
    key_slots: Tensor
    query: Tensor | None = None
    key: Tensor | None = None

    def to_slots(self, weights: Tensor, length: int) -> Tensor:
        """Spread the last axis of `weights` (B, ..., N) over sequence slots: (B, ..., length), 0 where no key is."""
        index = torch.where((self.key_slots < 0) | (self.key_slots >= length), length, self.key_slots)
        index = index.reshape(index.shape[0], *([1] * (weights.dim() - 2)), index.shape[-1]).expand_as(weights)
        out = weights.new_zeros(*weights.shape[:-1], length + 1)
        return out.scatter(-1, index, weights)[..., :length]

    def mean_over_rows(self) -> Tensor:
        """Mean over the valid rows: (B, N), or (B, H, N) with `heads="none"`."""
        valid = self.row_valid.to(self.weights.dtype)
        valid = valid[:, None, :, None] if self.weights.dim() == 4 else valid[:, :, None]
        return (self.weights * valid).sum(-2) / valid.sum(-2).clamp_min(1)

    def per_slot(self, length: int) -> Tensor:
        """`mean_over_rows` by sequence slot: (B, length) or (B, H, length)."""
        return self.to_slots(self.mean_over_rows(), length)


@dataclass(frozen=True)
class VisionSpec:
    """What to read in an attention layer of the vision tower.

    Attributes:
        attention: `"cls"`: the row of the CLS token; `"received"`: attention each token gets, averaged over the
            queries; `"auto"`: the first where the tower has a CLS token, else the second; None: nothing.
        key: also hand over the keys (before RoPE where the tower has any is not promised).
        query: also hand over the queries.
        features: also hand over the hidden states that leave this layer (LLaVA's features at layer -2).
    """

    attention: Literal["cls", "received", "auto"] | None = "auto"
    key: bool = False
    query: bool = False
    features: bool = False


@dataclass
class Patches:
    """Visual tokens as the vision tower saw them, aligned with the slots of the prompt.

    `I` blocks (an image, or each tile of one), `N` tokens in the longest. Where a model merges several patches into one
    visual token (2 x 2 in Qwen-VL, pixel shuffle, pooling), every quantity is the mean over the token's patches.

    Attributes:
        rows: (I,) long, row of the batch.
        slots: (I, N) long, slot of each token in its row; -1 where a block is shorter.
        grid: (I, 2) long, height and width of each block in tokens (0 where it is not known).
        attention: (I, H, N) float32 over the patches, softmax taken over all tokens of the tower (CLS included).
        key, query: (I, N, H, d).  cls_key: (I, H, d), only with a CLS token.  cls_query: (I, H, d).
        features: (I, N, C).  cls_features: (I, C).
        complete: every visual slot of the prompt is known to be one of these tokens: there are no learnt row ends.
    """

    rows: Tensor
    slots: Tensor
    grid: Tensor
    attention: Tensor | None = None
    key: Tensor | None = None
    query: Tensor | None = None
    features: Tensor | None = None
    cls_key: Tensor | None = None
    cls_query: Tensor | None = None
    cls_features: Tensor | None = None
    complete: bool = False
    _places: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def valid(self) -> Tensor:
        """(I, N) bool."""
        return self.slots >= 0

    def to_slots(self, values: Tensor, batch: int, length: int) -> Tensor:
        """Spread per-token values (I, N) over the slots of the prompt: (batch, length), 0 where no token is."""
        if (batch, length) not in self._places:
            place = torch.where(self.valid, self.rows[:, None] * length + self.slots, batch * length)
            self._places[batch, length] = place.reshape(-1)
        out = values.new_zeros(batch * length + 1)
        return out.scatter(0, self._places[batch, length], values.reshape(-1))[:-1].view(batch, length)


@dataclass
class View:
    """What a method sees at a stage. `B` rows, `S` prompt slots, `D` hidden size.

    Only the prompt is shown: speculated candidates and tokens already generated are never part of a view.

    Attributes:
        stage: -1 before layer 0, i after layer i.
        hidden: (B, S, D) hidden states by slot; removed slots hold their last value.
        active: (B, S) bool, tokens still there.
        visual: (B, S) bool, slots of visual tokens (constant over the pass).
        tokens: (B, S) bool, not padding.
        tap: rows read in the layer of this stage, if asked for.
        vision: what was read in the vision tower: {layer as asked for: patches}.
        layout: which slot is which patch of which image.
        info: what the model was called with (`input_ids`, grids, image sizes, ...).
        state: a method's own scratch space, fresh for each prefill.
        project: the model's projector on single features, (..., C) -> (..., D); None where a visual token is not the
            projection of one patch alone, so that merged features cannot be projected.
        ahead: of `hidden` and `active`, the attention row of the last token in the next layer (`TapSpec.ahead`).
        tower_groups: (B, S) long, for a method whose tower works on fewer tokens (`Reducer.tower`): slots of a row with
            the same number show one token of the tower; -1 for all other slots. None: the tower did not run.
        streams: (B, S, C * D), where a decoder has C hidden states of each token side by side (Gemma 3n, hyper-
            connections) and `hidden` is one of them, or their mean. None: there is one.
    """

    stage: int
    hidden: Tensor
    active: Tensor
    visual: Tensor
    tokens: Tensor
    tap: Tap | None = None
    vision: dict[int, Patches] = field(default_factory=dict)
    layout: Layout | None = None
    info: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    project: Callable[[Tensor], Tensor] | None = None
    ahead: Callable[[Tensor, Tensor], Tap] | None = None
    tower_groups: Tensor | None = None
    streams: Tensor | None = None

    @property
    def states(self) -> Tensor:
        """(B, S, D), or (B, S, C * D): what a merged token is made of; `hidden` is what tokens are compared by."""
        return self.hidden if self.streams is None else self.streams

    @property
    def active_visual(self) -> Tensor:
        """(B, S) bool: visual tokens, merged ones included, that are still there."""
        return self.active & self.visual

    @property
    def images(self) -> Tensor:
        """(B,) number of images in each row (1 where the layout is not known and there is a visual token)."""
        if self.layout is not None:
            return self.layout.image_counts.to(self.visual.device)
        return self.visual.any(1).long()
