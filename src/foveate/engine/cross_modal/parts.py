"""What encoder-style VLMs (ViLT, METER, BridgeTower) and methods for them say to each other, and their attention.

Image and text meet in the layers of an encoder: no KV cache, no placeholder slots. `session` beside this file does the
work; here live the parts of such a model, what a method sees and answers, the trace, and attention under a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop_out
from torch.nn.functional import scaled_dot_product_attention

from ...ops.attention import attention_rows
from ...ops.pumer import Reduction, masked_softmax
from ...reduction import UnsupportedError

__all__ = [
    "CrossModal",
    "EncoderAnatomy",
    "EncoderMethod",
    "EncoderTrace",
    "attend",
    "resolve_encoder",
    "text_rows",
]


@dataclass(frozen=True)
class EncoderAnatomy:
    """The parts of an encoder-style VLM.

    Attributes:
        model: what the user handed over.
        base: the module that embeds image and text and owns the layers.
        text_layers: all layers of a single-stream model (ViLT); else the text side of the co-attention layers.
        image_layers: the image side of the co-attention layers; empty for a single stream.
    """

    model: Any
    base: Any
    text_layers: tuple[Any, ...]
    image_layers: tuple[Any, ...]

    @property
    def joint(self) -> bool:
        """Image and text are one sequence."""
        return not self.image_layers

    @property
    def depth(self) -> int:
        """Layers in which image and text meet."""
        return len(self.text_layers)


def resolve_encoder(model: Any) -> EncoderAnatomy:
    """The parts of a model.

    Raises:
        UnsupportedError: image and text do not meet in encoder layers, or not in a known way.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    if family == "vilt" and hasattr(base, "encoder"):
        return EncoderAnatomy(model, base, tuple(base.encoder.layer), ())
    if family in ("meter", "bridgetower") and hasattr(base, "cross_modal_text_layers"):
        return EncoderAnatomy(model, base, tuple(base.cross_modal_text_layers), tuple(base.cross_modal_image_layers))
    raise UnsupportedError(
        f"{type(model).__name__}: this method works where image and text meet in encoder layers (ViLT, METER, "
        "BridgeTower); for a VLM with a language model use another one, e.g. FastV or SparseVLM"
    )


@dataclass
class CrossModal:
    """What a method sees in a layer where text attends to the image: B rows, L text and N image tokens.

    Attributes:
        text_mask: (B, L), 1 for text, 0 for padding, in the official code fractions between.
        image_mask: (B, N) bool. The class token of the image is at place 0.
        text_key, image_key: (B, L, d), (B, N, d): keys, averaged over the heads, by which tokens may be compared with
            others of their kind.
        text_query: (B, L, d) queries of the text, averaged over the heads.
        text_score_key: keys of the text in the attention over the image, (B, L, d).
        rows: attention of the text to the image, (B, H, L, N), softmax over all that the text sees; called with True
            for the first head alone, (B, 1, L, N).
        anatomy: of the model.
    """

    text_mask: Tensor
    image_mask: Tensor
    text_key: Tensor
    image_key: Tensor
    text_query: Tensor
    text_score_key: Callable[[], Tensor]
    rows: Callable[[bool], Tensor]
    anatomy: EncoderAnatomy


@runtime_checkable
class EncoderMethod(Protocol):
    """A method that works inside encoder layers.

    Attributes:
        faithful: attention as in the official code.
    """

    faithful: bool

    def merges_text(self, anatomy: EncoderAnatomy) -> bool:
        """Whether the text gets shorter."""

    def encoder_layers(self, anatomy: EncoderAnatomy) -> frozenset[int]:
        """Layers in which tokens are reduced; empty if there is nothing to do at all."""

    def reduce(self, seen: CrossModal) -> tuple[Reduction | None, Reduction | None]:
        """What becomes of the image tokens and of the text tokens; None: they stay as they are."""


@dataclass
class EncoderTrace:
    """Record of one pass of an image-text pair batch (NLVR2 makes two passes, one for each image).

    Attributes:
        visual: per layer (B,) long, image tokens that entered it, class token and merged ones included.
        text: per layer (B,) long, text tokens that entered it.
        places: layer -> (B, N) long: the place in the image, after this layer, of each token of the full image; -1 if
            it was dropped. Equal places are one merged token; class token at 0.
    """

    visual: list[Tensor] = field(default_factory=list)
    text: list[Tensor] = field(default_factory=list)
    places: dict[int, Tensor] = field(default_factory=dict)
    patches: Tensor | None = None
    """(B, N - 1, 2) long: row and column of each token but the class token. ViLT shuffles its patches in some batches;
    None for the others, whose patches lie row by row."""

    @property
    def n_layers(self) -> int:
        """Layers in which image and text meet."""
        return len(self.visual)

    @property
    def visual_tokens(self) -> Tensor:
        """LongTensor (B, n_layers)."""
        return torch.stack(self.visual, 1)

    @property
    def text_tokens(self) -> Tensor:
        """LongTensor (B, n_layers)."""
        return torch.stack(self.text, 1)

    @property
    def mean_visual_tokens(self) -> Tensor:
        """(B,) mean over the layers of the image tokens that entered them."""
        return self.visual_tokens.float().mean(1)

    def kept(self, stage: int) -> Tensor:
        """(B, N) bool: one patch of the full image for each image token left after layer `stage`, its first member.

        The class token counts as one. Raises `ValueError` where no token has been reduced yet.
        """
        reduced = [layer for layer in self.places if layer <= stage]
        if not reduced:
            raise ValueError(f"nothing is reduced up to layer {stage}; layers that reduce: {sorted(self.places)}")
        place = self.places[max(reduced)]
        slots = torch.arange(place.shape[1], device=place.device).expand_as(place)
        length = place.shape[1]
        target = torch.where(place < 0, length, place)
        first = torch.full((len(place), length + 1), length, device=place.device)
        first = first.scatter_reduce(1, target, slots, "amin")
        return (first.gather(1, target) == slots) & (place >= 0)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    padded: bool,
    scaling: float,
    dropout: float,
    official: bool,
    maps: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention under a mask of the keys.

    Args:
        query: (B, H, Q, d).  key, value: (B, H, N, d).
        mask: (B, N), true or above 0 where a key may be seen.
        padded: some key may not be seen.
        scaling, dropout: of the logits and of the probabilities.
        official: PuMer's own softmax instead of SDPA.
        maps: return the probabilities as well.

    Returns:
        (B, Q, H, d), and (B, H, Q, N) or None.
    """
    if not (official or maps):
        seen = mask.bool()[:, None, None] if padded else None
        out = scaled_dot_product_attention(query, key, value, seen, dropout, scale=scaling)
        return out.transpose(1, 2), None
    logits = query @ key.transpose(2, 3) * scaling
    if official:
        weights = masked_softmax(logits, mask)
    else:
        weights = logits.masked_fill(~mask.bool()[:, None, None], torch.finfo(logits.dtype).min).softmax(-1)
    weights = drop_out(weights, dropout)
    return (weights @ value).transpose(1, 2), weights


def text_rows(query: Tensor, key: Tensor, mask: Tensor, scaling: float, first: int, one_head: bool) -> Tensor:
    """Attention of all queries to the keys from place `first` on: (B, H, L, N - first), or of one head (B, 1, ...).

    The softmax is over all keys (B, H, N, d) that `mask` (B, N) lets be seen.
    """
    heads = 1 if one_head else query.shape[1]
    everyone = torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
    allowed = mask.bool()[:, None].expand(-1, query.shape[2], -1)
    return attention_rows(query[:, :heads], key[:, :heads], everyone, allowed, None, scaling, None)[..., first:]
