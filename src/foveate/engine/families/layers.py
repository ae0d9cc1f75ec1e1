"""What the layers of a decoder are: attention over keys of their own, of another layer, a recurrent state, or neither.

Judged by the kind of cache that transformers gives a layer and by what its modules declare, never by a model's name.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

__all__ = [
    "KEYLESS",
    "REFERENCE",
    "Streams",
    "attention_of",
    "cache_layers",
    "filled_ids",
    "keeps_inputs",
    "keyless",
    "positional_names",
    "reads_padding",
    "rotates",
    "shared_index",
    "shared_keys",
    "streams_of",
    "takes_index",
    "zeroes_padding",
]

_ATTENTION_NAMES = ("self_attn", "attn", "attention")
_PROJECTIONS = {"q_proj", "k_proj", "v_proj"}
_ROTATED_IN_WINDOWS = {"cohere2", "cohere2_moe"}
REFERENCE = "reference_sliding_attention"
"""Type of a layer whose sliding window begins behind the prompt."""
KEYLESS = {"LinearAttentionLayer", "DummyLayer"}
"""Cache layers that hold a recurrent state (linear attention, convolution, Mamba) or nothing."""


@dataclass(frozen=True)
class Streams:
    """Several hidden states of each token, which a decoder carries side by side.

    Attributes:
        count: C, how many.
        attends: the one that enters attention, of (C, B, S, D) (Gemma 3n); None: all are mixed into what enters, of
            (B, S, C, D), and are equal at first (hyper-connections).
    """

    count: int
    attends: int | None

    def by_token(self, hidden: Tensor) -> Tensor:
        """As the decoder has them -> (B, S, C, D)."""
        return hidden if self.attends is None else hidden.permute(1, 2, 0, 3)

    def back(self, states: Tensor) -> Tensor:
        """(B, S, C, D), or (B, S, C * D) -> as the decoder has them."""
        states = states.unflatten(2, (self.count, -1)) if states.dim() == 3 else states
        return states if self.attends is None else states.permute(2, 0, 1, 3)

    def seen(self, hidden: Tensor) -> Tensor:
        """As the decoder has them -> (B, S, D), what a method is shown."""
        return hidden.mean(2) if self.attends is None else hidden[self.attends]


def cache_layers(config: Any) -> list[Any]:
    """An empty cache layer for each decoder layer; none for a configuration that transformers cannot read."""
    try:
        return list(DynamicCache(config=config).layers)
    except Exception:  # a configuration of the user's own
        return []


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The self-attention module of a decoder layer, None if it has none."""
    for name in _ATTENTION_NAMES:
        module = getattr(layer, name, None)
        if module is not None:
            return module
    mixer = getattr(layer, "mixer", None)  # Nemotron-H: one name for attention, Mamba and MLP
    return mixer if hasattr(mixer, "k_proj") else None


def shared_keys(layers: Sequence[nn.Module]) -> dict[int, int]:
    """Layers that attend to the keys of an earlier layer, and to which: the last of their type that hands them on."""
    found: dict[int, int] = {}
    source: dict[Any, int] = {}
    for i, layer in enumerate(layers):
        attention: Any = attention_of(layer)
        kind = getattr(attention, "layer_type", None)
        if getattr(attention, "is_kv_shared_layer", False):
            found[i] = source[kind]
        elif getattr(attention, "store_full_length_kv", False):
            source[kind] = i
    return found


def keyless(layers: Sequence[nn.Module], config: Any) -> frozenset[int]:
    """Layers without keys: recurrent ones, and those that work on each token by itself."""
    cached, shared = cache_layers(config), shared_keys(layers)
    return frozenset(i for i, layer in enumerate(cached) if type(layer).__name__ in KEYLESS and i not in shared)


def rotates(attention: nn.Module) -> bool:
    """Whether an attention module rotates queries and keys by position; several decoders leave it out in some."""
    window = getattr(attention, "sliding_window", None)
    if getattr(getattr(attention, "config", None), "model_type", "") in _ROTATED_IN_WINDOWS:
        return window is not None or bool(getattr(attention, "force_rope", False))
    if hasattr(attention, "use_rope"):  # Llama 4, SmolLM3
        return bool(attention.use_rope)
    return window is None or bool(getattr(attention, "is_sliding", True))  # Exaone 4


def zeroes_padding(mixer: nn.Module, mask: str = "attention_mask") -> bool:
    """Whether a recurrent module zeroes what a 2-D mask calls padding, so that its state is that of a shorter row."""
    projections = [part for name, part in mixer.named_children() if name.startswith("in_proj") or name in _PROJECTIONS]
    return (
        hasattr(sys.modules[type(mixer).__module__], "apply_mask_to_padding_states")
        and mask in inspect.signature(mixer.forward).parameters
        and all(getattr(part, "bias", None) is None for part in projections)
    )


def _index_of(layer: nn.Module) -> Any:
    return getattr(attention_of(layer), "indexer", None)


def _is_given_an_index(layer: nn.Module) -> bool:
    return "prev_topk_indices" in inspect.signature(layer.forward).parameters


def takes_index(layer: nn.Module) -> bool:
    """Whether sparse attention asks an index of its own layer, which sees nothing but what the mask lets through."""
    return _index_of(layer) is not None and not _is_given_an_index(layer)


def reads_padding(layer: nn.Module) -> bool:
    """Whether sparse attention is told padding, (B, S), of its own tokens alone, and finds out itself who sees whom."""
    return hasattr(_index_of(layer), "get_visible_tokens")


def shared_index(layers: Sequence[nn.Module]) -> frozenset[int]:
    """Layers that take over the keys which the index of the layer before has chosen, by their place among the keys."""
    given = [i for i, layer in enumerate(layers) if _is_given_an_index(layer)]
    attends = [i for i in given if hasattr(attention_of(layers[i]), "indexer")]
    return frozenset(i for i in attends if _index_of(layers[i]) is None)


def streams_of(decoder: Any, text_config: Any) -> Streams | None:
    """The hidden states that a token has side by side; None: one."""
    if hasattr(decoder, "altup_projections") and text_config.altup_num_inputs > 1:
        return Streams(text_config.altup_num_inputs, text_config.altup_active_idx)
    if any(name.endswith("_hc") for name, _ in decoder.layers[0].named_children()):
        return Streams(text_config.hc_mult, None)
    return None


def keeps_inputs(layers: Sequence[nn.Module]) -> bool:
    """Whether the decoder keeps what goes into some layers for later ones (Inkling 2's attention over blocks)."""
    return any("block_states" in inspect.signature(layer.forward).parameters for layer in layers)


def filled_ids(config: Any) -> dict[str, int]:
    """Arguments of decoder layers that hold token ids (B, S), and the id that stands for padding in them."""
    end = getattr(config, "eos_token_id", None)
    end = end[0] if isinstance(end, list) else end
    return {} if end is None else {"ple_input_ids": end}  # n-grams of Qwen4-exp


def positional_names(module: nn.Module, count: int) -> tuple[str, ...]:
    """Names of the arguments that follow the hidden states in a layer's forward."""
    names = tuple(inspect.signature(module.forward).parameters)[1 : count + 1]
    return names + tuple(f"argument {i}" for i in range(len(names), count))
