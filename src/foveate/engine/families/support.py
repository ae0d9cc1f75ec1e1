"""Which models can be served, and the true reason where one cannot. Judged by structure: what layers are made of.

Everything here is asked once, by `resolve`, before anything is put into the model.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...reduction import UnsupportedError
from .layers import REFERENCE, cache_layers, reads_padding, shared_index, takes_index, zeroes_padding

__all__ = ["check_decoder", "check_model", "no_placeholders", "takes_images"]

_SERVED = {"full_attention", "sliding_attention", "chunked_attention", "moe", "mlp", REFERENCE}
_LAYER_TYPES = {
    "linear_attention": "linear attention, a recurrent state into which every earlier token went",
    "mamba": "Mamba, a recurrent state into which every earlier token went",
    "conv": "a convolution over neighbouring tokens",
    "hybrid": "a convolution or a recurrent state beside attention",
    "hybrid_sliding": "a convolution or a recurrent state beside attention",
    "indexed_attention": "sparse attention that chooses keys through an index which layers share",
    "minimax_m3_sparse": "sparse attention that chooses blocks of keys",
    "compressed_sparse_attention": "attention over compressed keys",
    "heavily_compressed_attention": "attention over compressed keys",
}
"""Words for the layer types of transformers' configurations that read more than a set of keys."""
_MIXERS = {"linear_attn": "linear_attention", "mamba": "mamba", "conv": "conv", "temporal_block": "linear_attention"}
"""Modules of decoder layers whose configuration does not name a type."""
_RECURRENT = {"linear_attention", "mamba", "conv"}
"""Kinds that are served where the module zeroes padding."""
_CACHES = {
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "DynamicIndexedLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
}
_HYBRID = {"hybrid", "hybrid_sliding"}
"""Kinds that are served where the layer zeroes padding in its convolutions."""
_CROSS = {
    "cross_attn",
    "gated_cross_attn_layers",
    "crossattention",
    "cross_attention",
    "encoder_attn",
    "encoder_decoder_attention",
}


def check_model(model: Any) -> None:
    """Refuse models whose images do not stand in the sequence of a decoder, or whose output is a token each.

    Raises:
        UnsupportedError: encoder-decoders, cross-attention, retrieval models.
    """
    kind, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{kind} is an encoder-decoder model; token reduction needs a decoder-only language model"
        )
    if hasattr(config, "vlm_config") and hasattr(config, "embedding_dim"):
        raise UnsupportedError(
            f"{kind} is a retrieval model: it returns an embedding for each visual token, and those of removed tokens "
            "would mean nothing"
        )
    if hasattr(model, "action_out_proj"):
        raise UnsupportedError(f"{kind} writes the actions of a robot; token reduction needs a model that writes text")
    if hasattr(model.base_model, "image_encoder") and hasattr(model.base_model, "visual_projection"):
        raise UnsupportedError(
            f"{kind} lays the features of its images before the embeddings of the text within its decoder; the prompt "
            "has no slots for them, so nothing tells which are visual"
        )
    if hasattr(model.base_model, "encoder") and hasattr(model.base_model, "decoder"):
        raise UnsupportedError(
            f"{kind}: the prompt and its images go through an encoder, whose keys the decoder reads; token reduction "
            "needs a decoder-only language model"
        )
    decoder = model.get_decoder()
    if any(name.rpartition(".")[2] in _CROSS for name, _ in decoder.named_modules()):
        raise UnsupportedError(
            f"{kind} reads its images by cross-attention; they take up no slots of the sequence, so there are no "
            "visual tokens to remove from it"
        )


def check_decoder(kind: str, decoder: nn.Module, layers: Sequence[nn.Module], config: Any) -> None:
    """Refuse decoders whose layers do more than attend to the keys of their own tokens.

    Args:
        kind: name of the model's class.
        decoder: owner of the layers.
        layers: decoder layers.
        config: configuration of the whole model.

    Raises:
        UnsupportedError: several streams of hidden states, recurrent layers into which padding would go, sparse
            attention with an index. The message names which.
    """
    text = config.get_text_config(decoder=True)
    found = Counter(_kinds(text, layers))
    if found:
        words = " and ".join(f"{count} are {words}" for words, count in found.items())
        raise UnsupportedError(
            f"{kind}: of its {len(layers)} decoder layers {words}; visual tokens cannot be removed from their input"
        )
    other = {type(layer) for layer in cache_layers(config) if getattr(layer, "_layer_type", None) != REFERENCE}
    strange = sorted({cached.__name__ for cached in other} - _CACHES)
    if strange:
        raise UnsupportedError(f"{kind}: its layers cache more than keys and values ({', '.join(strange)})")


def _kinds(text: Any, layers: Sequence[nn.Module]) -> list[str]:
    """What the layers are that are not plain attention, in words."""
    found = []
    types = getattr(text, "layer_types", None) or [None] * len(layers)
    shared = shared_index(layers) if any(reads_padding(layer) for layer in layers) else ()
    for i, (kind, layer) in enumerate(zip(types, layers)):
        parts = dict(layer.named_children())
        mixer = next((name for name in _MIXERS if name in parts), None)
        if mixer is not None and (kind is None or kind in _SERVED or kind not in _LAYER_TYPES):
            kind = _MIXERS[mixer]
        if kind is not None and kind not in _SERVED and (kind in _LAYER_TYPES or "self_attn" not in parts):
            module = parts.get(mixer or "mixer", parts.get("self_attn"))
            if kind in _RECURRENT and module is not None and zeroes_padding(module):
                continue
            if kind in _HYBRID and zeroes_padding(layer, "conv_mask"):
                continue
            if kind == "indexed_attention" and (takes_index(layer) or reads_padding(layer) or i in shared):
                continue
            name = f" ({type(module).__name__})" if module is not None else ""
            found.append(_LAYER_TYPES.get(kind, f"of type {kind!r}") + name)
    return found


def takes_images(model: Any, vision: nn.Module | None) -> bool:
    """Whether images or videos go into a model, however it names them."""
    names = inspect.signature(model.forward).parameters
    return vision is not None or any("pixel" in name or "image" in name for name in names)


def no_placeholders(model: Any, vision: nn.Module | None) -> UnsupportedError:
    """What to say about a model whose configuration names no placeholder of images."""
    kind, own = type(model).__name__, "for your own VLM around a text decoder pass visual=BoolTensor (B, S)"
    if not takes_images(model, vision):
        return UnsupportedError(f"{kind} takes no images, so there is nothing to reduce; {own}")
    return UnsupportedError(
        f"{kind}: its configuration names no placeholder token of images, so nothing tells which slots are visual; "
        "say so by visual=BoolTensor (B, S)"
    )
