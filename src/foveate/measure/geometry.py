"""The shape of a decoder, which its cost depends on: presets of published models, and reading a config."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ..engine.families.parts import PLAIN_MLP

__all__ = ["PRESETS", "Geometry"]

PAPER_TEXT_TOKENS = 118
"""Prompt of the SparseVLM paper without the image: 576 + 118 tokens make its 4.62 T MACs for LLaVA-1.5-7B."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of a decoder and of the prompt it is measured with.

    Attributes:
        name: preset or model type.
        layers: decoder layers.
        hidden_size: C, width of the residual stream.
        intermediate_size: m, width of the MLP.
        heads: query heads per layer.
        kv_heads: key/value heads per layer.
        head_dim: width of one head.
        vocab_size: rows of the language-model head.
        visual_tokens: image slots of the prompt.
        text_tokens: all its other slots (system prompt, question, separators).
        gated_mlp: three MLP matrices (gate, up, down) instead of two.
        sliding_window: window of the sliding layers in tokens, None if there are none.
        sliding_layers: for each layer whether it is a sliding one; empty: all or none, as `sliding_window` says.
        note: where `visual_tokens` comes from.
    """

    name: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    visual_tokens: int
    text_tokens: int = PAPER_TEXT_TOKENS
    gated_mlp: bool = True
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        for field in ("layers", "hidden_size", "intermediate_size", "heads", "kv_heads", "head_dim", "vocab_size"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{self.name}: {field}={value!r} must be a whole number of at least 1")
        for field in ("visual_tokens", "text_tokens"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{self.name}: {field}={value!r} must be a whole number of at least 0")

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer in tokens, None where it attends to everything."""
        sliding = self.sliding_layers[layer] if self.sliding_layers else True
        return self.sliding_window if sliding else None

    def with_prompt(self, visual_tokens: int | None = None, text_tokens: int | None = None) -> Geometry:
        """The same decoder with another prompt; None leaves a count as it is. Raises `ValueError` if negative."""
        return dataclasses.replace(
            self,
            visual_tokens=self.visual_tokens if visual_tokens is None else visual_tokens,
            text_tokens=self.text_tokens if text_tokens is None else text_tokens,
        )

    @classmethod
    def preset(cls, name: str) -> Geometry:
        """A published model by name. Raises `ValueError` that lists the presets."""
        try:
            return PRESETS[name.lower()]
        except KeyError:
            raise ValueError(f"unknown geometry {name!r}; presets: {', '.join(PRESETS)}") from None

    @classmethod
    def of(
        cls, source: str | PathLike[str] | Any, visual_tokens: int | None = None, text_tokens: int | None = None
    ) -> Geometry:
        """A preset by name, a `Geometry`, or whatever `from_config` reads, with the given prompt.

        Raises:
            ValueError: neither a preset nor a config; the message lists the presets.
        """
        if isinstance(source, Geometry):
            return source.with_prompt(visual_tokens, text_tokens)
        if isinstance(source, str | PathLike):
            if str(source).lower() in PRESETS:
                return PRESETS[str(source).lower()].with_prompt(visual_tokens, text_tokens)
            if not Path(source).exists():
                raise ValueError(
                    f"unknown geometry {str(source)!r}: neither a file nor a preset; presets: {', '.join(PRESETS)}"
                )
        return cls.from_config(source, visual_tokens, text_tokens)

    @classmethod
    def from_config(
        cls, source: str | PathLike[str] | Any, visual_tokens: int | None = None, text_tokens: int | None = None
    ) -> Geometry:
        """Sizes from a model's configuration. Nothing is downloaded.

        Args:
            source: a transformers config (of a VLM or its decoder), a config as a dict, a config.json, or its folder.
            visual_tokens: image slots of the prompt. None: one image at the tower's own size, where the config says it;
                0 for a decoder without images.
            text_tokens: all other slots; None for the 118 of the SparseVLM paper.

        Raises:
            ValueError: the file cannot be read, a size is missing, or a mixture of experts (its cost depends on the
                router); the message names what.
        """
        name, config = _load(source)
        text = _part(config, "text_config", "llm_config", "language_config")
        text = config if text is None else text
        if _get(text, "num_experts_per_tok") or _get(text, "num_local_experts") or _get(text, "num_experts"):
            raise ValueError(f"{name}: the cost of a mixture of experts depends on its router and is not covered")
        heads = _need(name, text, "num_attention_heads")
        hidden = _need(name, text, "hidden_size")
        window, sliding = _sliding(text)
        if visual_tokens is None:
            visual_tokens = _tokens_per_image(name, config)
        return cls(
            name=_get(config, "model_type") or name,
            layers=_need(name, text, "num_hidden_layers"),
            hidden_size=hidden,
            intermediate_size=_need(name, text, "intermediate_size"),
            heads=heads,
            kv_heads=_get(text, "num_key_value_heads") or heads,
            head_dim=_get(text, "head_dim") or hidden // heads,
            vocab_size=_get(text, "vocab_size") or _need(name, config, "vocab_size"),
            visual_tokens=visual_tokens,
            text_tokens=PAPER_TEXT_TOKENS if text_tokens is None else text_tokens,
            gated_mlp=_get(text, "model_type") not in PLAIN_MLP,
            sliding_window=window,
            sliding_layers=sliding,
        )


# ----------------------------------------------------------------------------------------------- reading a config
def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def _part(config: Any, *names: str) -> Any:
    return next((part for part in (_get(config, name) for name in names) if part is not None), None)


def _need(name: str, config: Any, field: str) -> int:
    value = _get(config, field)
    if value is None:
        raise ValueError(f"{name}: the config does not give {field}")
    return int(value)


def _load(source: Any) -> tuple[str, Any]:
    if not isinstance(source, str | PathLike):
        return str(_get(source, "model_type") or type(source).__name__), source
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as a model config ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: a model config must be a JSON object")
    # A saved config lists only what differs from the defaults of its class: let transformers fill in the rest.
    from transformers import CONFIG_MAPPING

    if raw.get("model_type") in CONFIG_MAPPING:
        try:
            return str(path), CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
        except Exception as error:  # whatever a foreign config class raises, the file is what is wrong
            first_line = str(error).strip().partition("\n")[0]
            raise ValueError(f"{path}: not a valid {raw['model_type']} config ({first_line})") from None
    return str(path), raw


def _sliding(text: Any) -> tuple[int | None, tuple[bool, ...]]:
    window = _get(text, "sliding_window")
    if not window or _get(text, "use_sliding_window") is False:
        return None, ()
    types = _get(text, "layer_types")
    if not types:
        return int(window), ()
    sliding = tuple("sliding" in kind or "chunked" in kind for kind in types)
    return (int(window), sliding) if any(sliding) else (None, ())


def _tokens_per_image(name: str, config: Any) -> int:
    vision = _get(config, "vision_config")
    if vision is None:
        return 0
    fixed = _get(config, "mm_tokens_per_image")
    if fixed:
        return int(fixed)
    size, patch = _get(vision, "image_size"), _get(vision, "patch_size")
    size = size[0] if isinstance(size, list | tuple) else size
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    if not size or not patch:
        raise ValueError(
            f"{name}: the number of visual tokens depends on the image's size, so say it: "
            "visual_tokens=N (--visual-tokens N)"
        )
    side = int(size) // int(patch)
    shrink = _get(config, "scale_factor") or _get(config, "downsample_factor") or 1
    if _get(config, "downsample_ratio"):
        shrink = round(1 / _get(config, "downsample_ratio"))
    shrink = _get(config, "spatial_merge_size") or shrink
    return (side // int(shrink)) ** 2


# -------------------------------------------------------------------------------------------------------- presets
def _preset(name: str, sizes: tuple[int, ...], vocab_size: int, visual_tokens: int, note: str, **more: Any) -> Geometry:
    layers, hidden, intermediate, heads, kv_heads, head_dim = sizes
    return Geometry(
        name, layers, hidden, intermediate, heads, kv_heads, head_dim, vocab_size, visual_tokens, note=note, **more
    )


_VICUNA_7B = (32, 4096, 11008, 32, 32, 128)
_VICUNA_13B = (40, 5120, 13824, 40, 40, 128)
_QWEN2_7B = (28, 3584, 18944, 28, 4, 128)
_ANYRES = "2 x 2 tiles + base image, 5 x 576 (newline slots not counted), as the papers count"
_QWEN2_VL = "average of the SparseVLM paper's Table 2 at dynamic resolution"

PRESETS: dict[str, Geometry] = {
    geometry.name: geometry
    for geometry in (
        _preset("llava-1.5-7b", _VICUNA_7B, 32064, 576, "24 x 24"),
        _preset("llava-1.5-13b", _VICUNA_13B, 32064, 576, "24 x 24"),
        _preset("llava-next-7b", _VICUNA_7B, 32064, 2880, _ANYRES),
        _preset("llava-next-13b", _VICUNA_13B, 32064, 2880, _ANYRES),
        _preset("llava-onevision-7b", _QWEN2_7B, 152000, 3699, "one 768 x 768 image: 729 + 54 x 54 + 54 newline slots"),
        _preset("qwen2-vl-7b", _QWEN2_7B, 152064, 1320, _QWEN2_VL),
        _preset("qwen2.5-vl-3b", (36, 2048, 11008, 16, 2, 128), 151936, 1320, _QWEN2_VL),
        _preset("qwen2.5-vl-7b", _QWEN2_7B, 152064, 1320, _QWEN2_VL),
        _preset("qwen3-vl-8b", (36, 4096, 12288, 32, 8, 128), 151936, 1024, "one 1024 x 1024 image, 32 x 32"),
        _preset("internvl3-8b", _QWEN2_7B, 151674, 3328, "12 tiles + thumbnail, 13 x 256"),
        _preset("smolvlm-2.2b", (24, 2048, 8192, 32, 32, 64), 49280, 1377, "4 x 4 tiles + global image, 17 x 81"),
        _preset(
            "gemma-3-4b",
            (34, 2560, 10240, 8, 4, 256),
            262208,
            256,
            "16 x 16 pooled",
            sliding_window=1024,
            sliding_layers=tuple((layer + 1) % 6 != 0 for layer in range(34)),
        ),
        _preset("paligemma-3b", (18, 2048, 16384, 8, 1, 256), 257216, 256, "one 224 x 224 image, 16 x 16"),
    )
}
"""Published decoders by name; every prompt has the 118 other tokens of the SparseVLM paper unless changed."""
