"""Where a model keeps its decoder, vision tower and placeholder ids.

Everything is found through the names that transformers 5 itself guarantees (`get_decoder`, `get_encoder`,
`base_model`); a family that deviates gets one entry in a table here, never a branch elsewhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import GenerationMixin

from ...reduction import UnsupportedError
from .companion import Companion
from .layers import (
    REFERENCE,
    Streams,
    attention_of,
    cache_layers,
    filled_ids,
    keeps_inputs,
    keyless,
    reads_padding,
    shared_index,
    shared_keys,
    streams_of,
)  # fmt: skip
from .support import check_decoder, check_model, no_placeholders, takes_images
from .tower import resampler
from .tower_layers import attention_modules, layer_of

__all__ = ["Anatomy", "resolve"]

_IMAGE_TOKEN_NAMES = ("image_token_id", "image_token_index")
_VIDEO_TOKEN_NAMES = ("video_token_id", "video_token_index")
PLAIN_MLP = frozenset({"opt", "gpt2", "gpt_neox", "gptj", "phi", "bloom", "falcon", "starcoder2", "persimmon", "mpt"})
"""Decoders whose MLP is two matrices (up, down). All others that carry images use three (gate, up, down)."""
_PLAIN_ATTENTION = {"gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"}
_PLACES = "image_embeds_position_mask"
"""Argument of Kosmos-2 and 2.5 that says which slots are visual, (B, S), in place of an id."""


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model that the engine and the methods need.

    Attributes:
        model: what the user handed over (with the language-model head, as a rule).
        base: the module that computes image features and scatters them into the placeholder slots.
        decoder: the text model; owns the layers and the rotary embedding.
        layers: its decoder layers.
        vision: the vision tower, None for a text-only decoder.
        image_token_ids: placeholder ids of images and videos (never of sound).
        numbered: the caller numbers the images and videos of a row himself (`visual=` of `apply`).
    """

    model: Any
    base: Any
    decoder: Any
    layers: tuple[nn.Module, ...]
    vision: nn.Module | None
    image_token_ids: tuple[int, ...]
    numbered: bool = False

    @property
    def takes_videos(self) -> bool:
        """Whether a video can be told from images: the model takes it apart, or the caller numbers its frames."""
        takes = inspect.signature(self.model.forward).parameters
        return self.numbered or hasattr(self.base, "get_video_features") or "pixel_values_videos" in takes

    @property
    def config(self) -> Any:
        """Configuration of the whole model."""
        return self.model.config

    @property
    def text_config(self) -> Any:
        """Configuration of the decoder."""
        return self.config.get_text_config(decoder=True)

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def heads(self) -> int:
        """Query heads per decoder layer (of the first one where layers differ)."""
        return _of_first_layer(self.text_config).num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head (of the first layer where layers differ)."""
        config = _of_first_layer(self.text_config)
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def rope_theta(self) -> float:
        """Base of the rotary embedding (of the first layer type where layers differ)."""
        parameters = getattr(self.text_config, "rope_parameters", None) or {}
        if "rope_theta" not in parameters:
            parameters = next((p for p in parameters.values() if isinstance(p, dict) and "rope_theta" in p), {})
        return float(parameters.get("rope_theta", 10000.0))

    @property
    def video_token_id(self) -> int | None:
        """Placeholder id of videos, if they have one of their own."""
        return next(
            (v for v in (getattr(self.config, name, None) for name in _VIDEO_TOKEN_NAMES) if v is not None), None
        )

    def without_weights(self) -> Anatomy:
        """What can be asked without the model, for records that outlive it: configurations and methods of classes."""

        def shell(module: Any) -> Any:
            empty = object.__new__(type(module))
            nn.Module.__init__(empty)
            empty.config = module.config
            return empty

        made = replace(self, model=shell(self.model), base=shell(self.base), decoder=None, layers=(), vision=None)
        made.__dict__["resampler"] = self.resampler
        return made

    @cached_property
    def resampler(self) -> str | None:
        """What mixes all patches of an image between tower and decoder; None: visual tokens are made of their own."""
        return resampler(self)

    @cached_property
    def placeholders_by_id(self) -> bool:
        """Whether visual slots are found by their ids: the model does not say where it lays features, or too late."""
        return self.base is self.decoder or not hasattr(self.base, "get_placeholder_mask")

    @cached_property
    def own_generate(self) -> bool:
        """Whether `generate` lays features into embeddings itself, going round `forward` (BLIP-2, InstructBLIP)."""
        goes_round = any(hasattr(self.model, name) for name in ("language_model", "text_model"))
        return type(self.model).generate is not GenerationMixin.generate and goes_round

    @cached_property
    def mrope(self) -> bool:
        """Whether positions have several axes (Qwen-VL, GLM-4V): they cannot be renumbered on a line."""
        return hasattr(self.base, "get_rope_index")

    @property
    def plain_attention(self) -> bool:
        """Whether queries and keys are projection, optional norm, and one-axis RoPE, in every decoder layer."""
        return self.text_config.model_type in _PLAIN_ATTENTION

    def companion(self, model: Any, tokenizer: Any, official: bool = False) -> Companion:
        """A CLIP or SigLIP model that is shown what this model is shown. Raises `UnsupportedError` for others."""
        return Companion(model, tokenizer, self.vision_config, official)

    def attention(self, layer: int) -> nn.Module:
        """Self-attention module of a decoder layer. Raises `UnsupportedError` if the layer has none."""
        module = attention_of(self.layers[layer])
        if module is not None:
            return module
        raise UnsupportedError(f"decoder layer {layer} ({type(self.layers[layer]).__name__}) has no attention to read")

    @property
    def vision_config(self) -> Any:
        """Configuration of the vision tower."""
        return self.config.vision_config

    @cached_property
    def feature_layers(self) -> tuple[int, ...]:
        """Layers of the tower whose outputs the model uses, counted from the end: (-2,) in LLaVA, (-1,) as a rule.

        Raises:
            UnsupportedError: the model uses the patch embeddings, or a layer that the tower does not have.
        """
        return self.counted_from_end(_feature_layers(self.config))

    def counted_from_end(self, given: int | Sequence[int]) -> tuple[int, ...]:
        """Layers of the tower that a `vision_feature_layer` of transformers means: an index into its hidden states."""
        layers = [given] if isinstance(given, int) else list(given)
        if all(layer == -1 for layer in layers):
            return (-1,)
        depth = len(self.vision_attention())
        found = tuple(layer if layer < 0 else layer - depth - 1 for layer in layers)
        if not all(-depth <= layer < 0 for layer in found):
            raise UnsupportedError(
                f"{type(self.model).__name__}: vision_feature_layer={given} is no layer of its tower, which has {depth}"
            )
        return found

    @property
    def vision_layer(self) -> int:
        """The deepest of `feature_layers`."""
        return max(self.feature_layers)

    @property
    def towers(self) -> tuple[nn.Module, ...]:
        """The vision tower, and the one that sees videos where that is another (Video-LLaVA)."""
        found = (self.vision, getattr(self.base, "video_tower", None))
        return tuple(tower for tower in found if tower is not None)

    def vision_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters of the vision tower."""
        return iter(()) if self.vision is None else self.vision.named_parameters()

    def parent(self, module: nn.Module) -> nn.Module:
        """The vision layer that holds an attention module."""
        assert self.vision is not None
        return layer_of(self.vision, module)

    def vision_attention(self) -> list[nn.Module]:
        """Self-attention modules of the vision tower, in depth order."""
        if self.vision is None:
            raise UnsupportedError(
                f"{type(self.model).__name__} names no image encoder (get_encoder), so there is no vision tower to read"
            )
        return attention_modules(self.vision)

    @cached_property
    def sliding_windows(self) -> tuple[int | None, ...]:
        """Sliding window of each decoder layer in tokens, None where it attends to everything."""
        # Families keep the window in different places; the cache they get knows them all.
        cached = cache_layers(self.config)
        windows = [getattr(layer, "sliding_window", None) for layer in cached]
        # What is generated slides, the prompt does not.
        windows = [None if getattr(layer, "_layer_type", None) == REFERENCE else w for w, layer in zip(windows, cached)]
        windows += [None] * (self.depth - len(windows))
        for layer, source in self.shared_keys.items():
            windows[layer] = windows[source]
        return tuple(windows)

    @cached_property
    def shared_keys(self) -> dict[int, int]:
        """Decoder layers that attend to the keys of an earlier layer, and to which (Gemma 4 E, Gemma 3n)."""
        return shared_keys(self.layers)

    @cached_property
    def keyless(self) -> frozenset[int]:
        """Decoder layers without keys: linear attention, convolutions, Mamba, and MLPs on their own."""
        return keyless(self.layers, self.config)

    @cached_property
    def layer_kinds(self) -> tuple[Any, ...]:
        """What the engine must know of each layer to hand it what it handed another one; of no use to compare else."""
        return tuple(
            (window, i in self.keyless, i if i in self.shared_keys else None)
            for i, window in enumerate(self.sliding_windows)
        )

    @cached_property
    def keeps_inputs(self) -> bool:
        """Whether the decoder keeps hidden states that went into a layer: they may not be overwritten."""
        return keeps_inputs(self.layers)

    @cached_property
    def filled_ids(self) -> dict[str, int]:
        """Arguments of decoder layers that hold token ids (B, S), and the id of padding in them."""
        return filled_ids(self.text_config)

    @cached_property
    def shared_index(self) -> frozenset[int]:
        """Layers of sparse attention that take over what the index of an earlier one has chosen."""
        return shared_index(self.layers)

    @cached_property
    def reads_padding(self) -> bool:
        """Whether sparse attention is told padding (B, S) in place of who sees whom (GLM-5)."""
        return any(reads_padding(layer) for layer in self.layers)

    @cached_property
    def streams(self) -> Streams | None:
        """The hidden states that a token has side by side (Gemma 3n, hyper-connections); None: one."""
        return streams_of(self.decoder, self.text_config)

    def rotary(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of a decoder layer at `positions` (B, n): (B, n, d) each. `UnsupportedError` without 1-D RoPE."""
        module = getattr(self.decoder, "rotary_emb", None)
        if module is None or self.mrope:
            raise UnsupportedError(f"{type(self.decoder).__name__}: positions cannot be renumbered without 1-D RoPE")
        if "layer_type" in inspect.signature(module.forward).parameters:
            return module(hidden, positions, self.text_config.layer_types[layer])
        return module(hidden, positions)

    def visual_of(self, found: Any, input_ids: Tensor | None) -> Tensor | None:
        """Slots of images and videos, (B, S) bool, in what `get_placeholder_mask` returned.

        Args:
            found: a mask, or masks of images, videos and sound, each (B, S) or (B, S, D), or None.
            input_ids: (B, S) that it was asked about; None where only embeddings are known.
        """
        masks = found if isinstance(found, tuple) else (found,)
        slots: Tensor | None = None
        for mask in masks[:2]:
            if mask is not None:
                mask = mask[..., 0] if mask.dim() == 3 else mask
                slots = mask if slots is None else slots | mask
        if slots is None or input_ids is None or input_ids.shape != slots.shape:
            return slots
        placeholders = self.find_placeholders(input_ids, None)
        return slots if placeholders is None else slots & placeholders.to(slots.device)

    def placeholders_in(self, arguments: Mapping[str, Any]) -> Tensor | None:
        """Placeholder slots (B, S) bool of a call of the model; None where what it was given does not tell."""
        ids, places = arguments.get("input_ids"), arguments.get(_PLACES)
        if _named_by_place(self.model):
            return places.bool() if places is not None and (ids is None or ids.shape == places.shape) else None
        return self.find_placeholders(ids, arguments.get("inputs_embeds"))

    def find_placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor | None:
        """Placeholder slots by id, or by embedding where only embeddings are given: (B, S) bool."""
        if input_ids is not None:  # one by one: torch.isin waits for the device
            found = [input_ids == i for i in self.image_token_ids]
        elif inputs_embeds is not None:
            table = self.model.get_input_embeddings().weight
            found = [(inputs_embeds == table[i].to(inputs_embeds)).all(-1) for i in self.image_token_ids]
        else:
            return None
        return torch.stack(found).any(0) if found else None


def _of_first_layer(config: Any) -> Any:
    """A decoder's configuration; that of its first layer where each has one of its own."""
    return config.per_layer_config[0] if getattr(config, "per_layer_config", None) else config


def _feature_layers(config: Any) -> int | Sequence[int]:
    for owner in (config, getattr(config, "adapter_config", None)):  # Molmo 2
        for name in ("vision_feature_layer", "vision_feature_layers"):
            value = getattr(owner, name, None)
            if value is not None:
                return value
    return -1


def _named_by_place(model: Any) -> bool:
    return _PLACES in inspect.signature(model.forward).parameters


def _placeholder_ids(config: Any) -> Iterator[int]:
    """Ids of the placeholders of images and videos, wherever a configuration keeps them."""
    for owner in (config, getattr(config, "vision_config", None)):
        for names in (_IMAGE_TOKEN_NAMES, _VIDEO_TOKEN_NAMES):
            value = next((v for v in (getattr(owner, name, None) for name in names) if isinstance(v, int)), None)
            if value is not None:
                yield value


def resolve(model: nn.Module, text_only: bool = False) -> Anatomy:
    """Find the parts of a Hugging Face model.

    Args:
        model: a vision-language model, or any decoder with `text_only=True`.
        text_only: the caller says himself which slots are visual, so no vision tower is needed.

    Raises:
        UnsupportedError: not a transformers decoder, or a model without images when `text_only` is False.
    """
    unwrapped: Any = model
    if hasattr(unwrapped, "get_base_model"):  # peft
        unwrapped = unwrapped.get_base_model()
    kind = type(unwrapped).__name__
    if not (hasattr(unwrapped, "get_decoder") and hasattr(unwrapped, "config") and hasattr(unwrapped, "base_model")):
        raise UnsupportedError(f"{kind} is not a transformers model with a decoder; pass a Hugging Face VLM")
    check_model(unwrapped)
    decoder = unwrapped.get_decoder()
    while not hasattr(decoder, "layers"):
        inner = getattr(decoder, "model", None) or getattr(decoder, "decoder", None)
        if inner is None:
            break
        decoder = inner
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise UnsupportedError(f"{kind}: no list of decoder layers found in {type(decoder).__name__}")
    vision = unwrapped.get_encoder(modality="image")
    vision = None if vision is unwrapped or vision is decoder else vision
    ids = tuple(dict.fromkeys(_placeholder_ids(unwrapped.config)))
    layers = tuple(decoder.layers)
    if text_only or ids or takes_images(unwrapped, vision):
        check_decoder(kind, decoder, layers, unwrapped.config)
    if not text_only and not ids and not _named_by_place(unwrapped):
        raise no_placeholders(unwrapped, vision)
    return Anatomy(unwrapped, unwrapped.base_model, decoder, layers, vision, ids)
