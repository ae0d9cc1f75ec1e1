"""Models of real geometry with random weights, and prompts for them: real sizes to time without real weights.

Every preset of `PRESETS` has its decoder, vision tower and connector at their published sizes; only the number of
decoder layers is cut, if asked for. Weights, pixels and words are noise: speed and memory are those of the real model
(of that many layers), answers and accuracy mean nothing. Sizes: the models' own configs on the Hugging Face Hub.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .geometry import Geometry

__all__ = ["RandomModel", "random_model"]

_BEFORE_IMAGE = 35
"""Words before the image, as in LLaVA-1.5's prompt; the others follow it."""
_SPECIAL = 4
"""The last ids of a vocabulary: end and start of an image, video, image."""
_LARGE = 1 << 20
_TIED = {"qwen2.5-vl-3b", "gemma-3-4b", "paligemma-3b"}
"""Models whose head is their embedding."""

_CLIP = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14, "projection_dim": 768, "model_type": "clip_vision_model",
}  # fmt: skip
_SIGLIP = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "patch_size": 14, "vision_use_head": False, "model_type": "siglip_vision_model",
}  # fmt: skip
_INTERN = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True,
}  # fmt: skip
_QWEN2 = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "patch_size": 14, "mlp_ratio": 4}
_QWEN2_5 = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
    "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
_QWEN3 = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
    "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
}  # fmt: skip
_NEXT_SIZES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_ONEVISION_SIZES = [[384 * height, 384 * width] for height in range(1, 7) for width in range(1, 7)]


@dataclass(frozen=True)
class _Family:
    """How a family is built and fed.

    Attributes:
        model: name in transformers, without "Config" and "ForConditionalGeneration".
        text: model type of the decoder.
        vision: options of the tower.
        pixels: shape of `pixel_values` for one prompt.
        given: further vision arguments for one prompt.
        image_token: name of the option for the placeholder's id.
        options: further options of the config.
        text_options: further options of the decoder's config.
        token_types: whether the model wants to know which tokens are an image.
    """

    model: str
    text: str
    vision: dict[str, Any]
    pixels: tuple[int, ...]
    given: dict[str, Any] = dataclasses.field(default_factory=dict)
    image_token: str = "image_token_id"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    text_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    token_types: bool = False


def _llava(model: str, pixels: tuple[int, ...], **more: Any) -> _Family:
    return _Family(model, "llama", _CLIP, pixels, image_token="image_token_index", **more)


def _qwen(model: str, vision: dict[str, Any], grid: list[int], sections: list[int]) -> _Family:
    patch = 3 * 2 * vision["patch_size"] ** 2
    rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6}
    shape = (grid[0] * grid[1] * grid[2], patch)
    return _Family(
        model, "", vision, shape, {"image_grid_thw": [grid]}, text_options={"rope_parameters": rope}, token_types=True
    )


def _families() -> dict[str, _Family]:
    next_ = _llava(
        "LlavaNext", (1, 5, 3, 336, 336), given={"image_sizes": [[672, 672]]},
        options={"image_grid_pinpoints": _NEXT_SIZES},
    )  # fmt: skip
    onevision = _Family(
        "LlavaOnevision", "qwen2", {**_SIGLIP, "num_hidden_layers": 26, "image_size": 384}, (1, 5, 3, 384, 384),
        {"image_sizes": [[768, 768]], "batch_num_images": [1]}, "image_token_index",
        {"image_grid_pinpoints": _ONEVISION_SIZES, "vision_feature_layer": -1, "vision_aspect_ratio": "anyres_max_9"},
    )  # fmt: skip
    smolvlm = {**_SIGLIP, "image_size": 384, "model_type": "smolvlm_vision"}
    return {
        "llava-1.5-7b": _llava("Llava", (1, 3, 336, 336)),
        "llava-1.5-13b": _llava("Llava", (1, 3, 336, 336)),
        "llava-next-7b": next_,
        "llava-next-13b": next_,
        "llava-onevision-7b": onevision,
        "qwen2-vl-7b": _qwen("Qwen2VL", {**_QWEN2, "hidden_size": 3584}, [1, 66, 80], [16, 24, 24]),
        "qwen2.5-vl-3b": _qwen("Qwen2_5_VL", {**_QWEN2_5, "out_hidden_size": 2048}, [1, 66, 80], [16, 24, 24]),
        "qwen2.5-vl-7b": _qwen("Qwen2_5_VL", {**_QWEN2_5, "out_hidden_size": 3584}, [1, 66, 80], [16, 24, 24]),
        "qwen3-vl-8b": _qwen("Qwen3VL", {**_QWEN3, "out_hidden_size": 4096}, [1, 64, 64], [24, 20, 20]),
        "internvl3-8b": _Family("InternVL", "qwen2", _INTERN, (13, 3, 448, 448)),
        "smolvlm-2.2b": _Family("SmolVLM", "llama", smolvlm, (1, 17, 3, 384, 384), options={"scale_factor": 3}),
        "gemma-3-4b": _Family(
            "Gemma3", "gemma3_text", {**_SIGLIP, "image_size": 896}, (1, 3, 896, 896), {}, "image_token_index",
            {"mm_tokens_per_image": 256}, {"query_pre_attn_scalar": 256}, token_types=True,
        ),
        "paligemma-3b": _Family(
            "PaliGemma", "gemma", {**_SIGLIP, "image_size": 224}, (1, 3, 224, 224), {}, "image_token_index",
            {"projection_dim": 2048}, token_types=True,
        ),
    }  # fmt: skip


class RandomModel:
    """A geometry that can be built and fed; see `random_model`.

    Attributes:
        geometry: the decoder as it is built, and the prompt (visual tokens as the model itself lays them out).
    """

    def __init__(self, geometry: Geometry, family: _Family):
        import transformers

        self._family, self._vocabulary = family, geometry.vocab_size
        self._class = getattr(transformers, f"{family.model}ForConditionalGeneration")
        self.config = _config(geometry, family)
        self.geometry = geometry.with_prompt(visual_tokens=_slots(family, geometry))

    def _shell(self, dtype: torch.dtype) -> Any:
        """The model without memory for its weights."""
        with torch.device("meta"):
            return self._class._from_config(self.config, dtype=dtype)

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the weights, worked out without making them."""
        return sum(parameter.nbytes for parameter in self._shell(dtype).parameters())

    def working_bytes(self, dtype: torch.dtype, batch: int = 1, new_tokens: int = 1) -> int:
        """Bytes an answer needs beside the weights, roughly: the cache, and the widest states of a layer."""
        shape = self.geometry
        length = shape.visual_tokens + shape.text_tokens
        cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * (length + new_tokens)
        states = length * (6 * shape.hidden_size + 3 * shape.intermediate_size)
        return batch * (cache + states) * dtype.itemsize

    def build(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Any:
        """The model, in eval mode, with random weights."""
        model = self._shell(dtype).to_empty(device=device)
        model.tie_weights()
        generator = torch.Generator(device).manual_seed(seed)
        # One block of noise serves all large matrices: to draw billions of numbers takes longer than to measure.
        noise = 0.02 * torch.randn(_LARGE, generator=generator, device=device).to(dtype)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            for parameter in model.parameters():
                if parameter.numel() > _LARGE:
                    for part in parameter.view(-1).split(_LARGE):
                        part.copy_(noise[: len(part)])
                    parameter._is_hf_initialized = True
            model.init_weights()  # the small ones, and what is no parameter: rotary frequencies, position ids
        return model.eval()

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu", batch: int = 1) -> dict[str, Tensor]:
        """Model kwargs: noise for an image and random words around it, as many in each row; not padded."""
        family, generator = self._family, torch.Generator().manual_seed(1)
        end, start, _, image = range(self._vocabulary - _SPECIAL, self._vocabulary)
        shown = [image] * self.geometry.visual_tokens
        if "image_grid_thw" in family.given:
            shown = [start, *shown, end]
        count = self.geometry.text_tokens - (len(shown) - self.geometry.visual_tokens)
        words = torch.randint(3, self._vocabulary - _SPECIAL, (batch, count), generator=generator)
        before = min(_BEFORE_IMAGE, count - 1)
        ids = torch.cat([words[:, :before], torch.tensor(shown).expand(batch, -1), words[:, before:]], 1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if family.token_types:
            types = (ids == image) if family.model != "PaliGemma" else torch.zeros_like(ids)
            given["mm_token_type_ids" if "image_grid_thw" in family.given else "token_type_ids"] = types.long()
        pixels = {"pixel_values": torch.randn(family.pixels, generator=generator)}
        pixels |= {name: torch.tensor(value) for name, value in family.given.items()}
        given |= {name: value.repeat(batch, *[1] * (value.dim() - 1)) for name, value in pixels.items()}
        return {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in given.items()}


def random_model(
    name: str, layers: int | None = None, text_tokens: int | None = None, visual_tokens: int | None = None
) -> RandomModel:
    """A preset as a random model that can be built.

    Args:
        name: of the preset.
        layers: decoder layers, the first ones; None for all.
        text_tokens: of the prompt, all that is no image; None for the preset's own.
        visual_tokens: of the prompt; None for the preset's own. LLaVA-1.5 is shown several images, a Qwen one image of
            that size; the other presets have their own count alone.

    Raises:
        ValueError: no such preset (the message lists them), more layers than it has, too short a prompt, or visual
            tokens that the preset cannot have.
    """
    geometry = Geometry.preset(name).with_prompt(text_tokens=text_tokens)
    if geometry.text_tokens < _SPECIAL:
        raise ValueError(f"prompt-tokens={text_tokens}: give {_SPECIAL} at least")
    if layers is not None:
        if not 1 <= layers <= geometry.layers:
            raise ValueError(f"layers={layers}: {geometry.name} has {geometry.layers} decoder layers")
        geometry = dataclasses.replace(geometry, layers=layers, sliding_layers=geometry.sliding_layers[:layers])
    family = _families()[geometry.name]
    if visual_tokens is not None:
        family = _showing(family, geometry, visual_tokens)
        geometry = geometry.with_prompt(visual_tokens=visual_tokens)
    return RandomModel(geometry, family)


def _showing(family: _Family, geometry: Geometry, visual_tokens: int) -> _Family:
    """The family, fed with as many images, or as large a one, as `visual_tokens` take."""
    images, rest = divmod(visual_tokens, geometry.visual_tokens)
    if family.model == "Llava" and images and not rest:
        return dataclasses.replace(family, pixels=(images, *family.pixels[1:]))
    if "image_grid_thw" in family.given and visual_tokens > 0:
        rows = next(rows for rows in range(math.isqrt(visual_tokens), 0, -1) if not visual_tokens % rows)
        grid = [1, 2 * rows, 2 * (visual_tokens // rows)]  # 2 x 2 patches are merged into a token
        pixels = (4 * visual_tokens, family.pixels[1])
        return dataclasses.replace(family, pixels=pixels, given={"image_grid_thw": [grid]})
    raise ValueError(f"visual-tokens={visual_tokens}: {geometry.name} cannot have that many")


def _config(geometry: Geometry, family: _Family) -> Any:
    import transformers

    text: dict[str, Any] = {
        "hidden_size": geometry.hidden_size,
        "intermediate_size": geometry.intermediate_size,
        "num_hidden_layers": geometry.layers,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "vocab_size": geometry.vocab_size,
        "max_position_embeddings": 32768,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        **family.text_options,
    }
    if geometry.sliding_window:
        kinds = ("full_attention", "sliding_attention")
        text |= {"sliding_window": geometry.sliding_window}
        text |= {"layer_types": [kinds[geometry.window(i) is not None] for i in range(geometry.layers)]}
    if family.text:
        text["model_type"] = family.text
    last = geometry.vocab_size - 1
    tokens = {family.image_token: last}
    if family.given.get("image_grid_thw"):
        tokens |= {"video_token_id": last - 1, "vision_start_token_id": last - 2, "vision_end_token_id": last - 3}
    config_class = getattr(transformers, f"{family.model}Config")
    tied = geometry.name in _TIED
    text["tie_word_embeddings"] = tied
    return config_class(
        text_config=text, vision_config=dict(family.vision), tie_word_embeddings=tied, **tokens, **family.options
    )


def _slots(family: _Family, geometry: Geometry) -> int:
    """Visual tokens of a prompt as the model lays them out: tiled families add a learnt row end to each row."""
    if family.model == "LlavaNext":
        return 576 + 48 * 48 + 48
    return geometry.visual_tokens
