"""A tiny random vision-language model of every supported family, and hand-made inputs for it.

No processor and no download: six decoder layers of width 64, images of a few patches, seeded weights that are spread
widely enough for a removed token to change the logits visibly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor

__all__ = ["FAMILIES", "IMAGE_TOKEN", "N_LAYERS", "VIDEO_TOKEN", "build", "inputs", "visual_slots"]

N_LAYERS = 6
VOCABULARY = 200
IMAGE_TOKEN = 150
VIDEO_TOKEN = 151
IMAGE_START, IMAGE_END = 152, 153
FIRST_WORD, LAST_WORD = 5, 140
"""Ids of ordinary words; everything from 150 on means something to some family."""

DECODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
ANYRES_SIZES = [[60, 50], [30, 60], [64, 64], [50, 28]]
QWEN_GRIDS = [[1, 8, 6], [1, 6, 10], [1, 8, 8], [1, 4, 10]]
WINDOW = 12
"""Sliding window of the families whose window is exceeded, in prefill and in decode."""


@dataclass(frozen=True)
class Family:
    """How to make a model and what it is fed with.

    Attributes:
        model: builds the model, weights still untouched.
        pixels: vision arguments for a number of images.
        brackets: whether an image stands between a start and an end token.
    """

    model: Callable[[], hf.PreTrainedModel]
    pixels: Callable[[int], dict[str, Tensor]]
    brackets: bool = False


def _noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _images(size: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda n: {"pixel_values": _noise(n, 3, size, size)}


def _clip() -> hf.CLIPVisionConfig:
    return hf.CLIPVisionConfig(**{**TOWER, "num_hidden_layers": 4}, image_size=32, patch_size=8, projection_dim=32)


def _siglip(size: int = 32) -> hf.SiglipVisionConfig:
    return hf.SiglipVisionConfig(**TOWER, image_size=size, patch_size=8, vision_use_head=False)


# ---------------------------------------------------------------------------------------------------- the families
def _llava() -> hf.PreTrainedModel:
    config = hf.LlavaConfig(
        vision_config=_clip(), text_config=hf.LlamaConfig(**DECODER), image_token_index=IMAGE_TOKEN, image_seq_length=16
    )
    return hf.LlavaForConditionalGeneration(config)


def _vipllava() -> hf.PreTrainedModel:
    config = hf.VipLlavaConfig(
        vision_config=_clip(),
        text_config=hf.LlamaConfig(**DECODER),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layers=[-1, -2],
    )
    return hf.VipLlavaForConditionalGeneration(config)


def _llava_next() -> hf.PreTrainedModel:
    config = hf.LlavaNextConfig(
        vision_config=_clip(),
        text_config=hf.LlamaConfig(**DECODER),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=16,
        image_grid_pinpoints=PINPOINTS,
    )
    return hf.LlavaNextForConditionalGeneration(config)


def _llava_onevision() -> hf.PreTrainedModel:
    config = hf.LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config=hf.Qwen2Config(**DECODER, use_sliding_window=False),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


def _anyres(n: int) -> dict[str, Tensor]:
    return {"pixel_values": _noise(n, 5, 3, 32, 32), "image_sizes": torch.tensor(ANYRES_SIZES[:n])}


QWEN_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": IMAGE_START,
    "vision_end_token_id": IMAGE_END,
}
QWEN_TOWER = {"hidden_size": 32, "out_hidden_size": 64, "num_heads": 4, "patch_size": 8, "intermediate_size": 64}


def _mrope(*sections: int) -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": list(sections), "rope_theta": 10000.0}


def _qwen2_vl() -> hf.PreTrainedModel:
    tower = {"depth": 3, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "patch_size": 8, "mlp_ratio": 2}
    decoder = {**DECODER, "rope_parameters": _mrope(2, 3, 3)}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=decoder, vision_config=tower, **QWEN_TOKENS))


def _qwen2_5_vl() -> hf.PreTrainedModel:
    tower = {**QWEN_TOWER, "depth": 3, "window_size": 32, "fullatt_block_indexes": [1]}
    decoder = {**DECODER, "rope_parameters": _mrope(2, 3, 3)}
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(text_config=decoder, vision_config=tower, **QWEN_TOKENS)
    )


def _qwen3_vl() -> hf.PreTrainedModel:
    tower = {**QWEN_TOWER, "depth": 4, "deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 64}
    decoder = {**DECODER, "head_dim": 16, "rope_parameters": _mrope(4, 2, 2)}
    return hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(text_config=decoder, vision_config=tower, **QWEN_TOKENS))


def _glm4v() -> hf.PreTrainedModel:
    config = hf.Glm4vConfig(
        vision_config={**QWEN_TOWER, "depth": 3, "image_size": 64},
        text_config={**DECODER, "rope_parameters": _mrope(2, 3, 3)},
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        image_start_token_id=IMAGE_START,
        image_end_token_id=IMAGE_END,
        video_start_token_id=154,
        video_end_token_id=155,
    )
    return hf.Glm4vForConditionalGeneration(config)


def _patches(n: int) -> dict[str, Tensor]:
    grids = torch.tensor(QWEN_GRIDS[:n])
    return {"pixel_values": _noise(int(grids.prod(1).sum()), 3 * 2 * 8 * 8), "image_grid_thw": grids}


def _internvl() -> hf.PreTrainedModel:
    config = hf.InternVLConfig(
        vision_config={**TOWER, "image_size": [64, 64], "patch_size": [8, 8]},
        text_config=hf.Qwen2Config(**DECODER, use_sliding_window=False),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=16,
    )
    return hf.InternVLForConditionalGeneration(config)


def _idefics3(config_class: type = hf.Idefics3Config, model_class: type = hf.Idefics3ForConditionalGeneration):
    config = config_class(
        vision_config={**TOWER, "image_size": 64, "patch_size": 8},
        text_config=hf.LlamaConfig(**DECODER),
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
        pad_token_id=0,
    )
    return model_class(config)


def _smolvlm() -> hf.PreTrainedModel:
    return _idefics3(hf.SmolVLMConfig, hf.SmolVLMForConditionalGeneration)


def _gemma3(window: int) -> hf.PreTrainedModel:
    decoder = {
        **DECODER,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": window,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    }
    config = hf.Gemma3Config(
        text_config=decoder,
        vision_config={**TOWER, "image_size": 64, "patch_size": 8, "vision_use_head": False},
        mm_tokens_per_image=16,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=IMAGE_START,
        eoi_token_index=IMAGE_END,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def _paligemma() -> hf.PreTrainedModel:
    config = hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**DECODER, head_dim=16),
        vision_config=_siglip(),
        image_token_index=IMAGE_TOKEN,
        projection_dim=64,
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def _aya_vision() -> hf.PreTrainedModel:
    config = hf.AyaVisionConfig(
        vision_config=_siglip(64),
        text_config=hf.Cohere2Config(**DECODER, sliding_window=WINDOW, sliding_window_pattern=3),
        image_token_index=IMAGE_TOKEN,
        downsample_factor=2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return hf.AyaVisionForConditionalGeneration(config)


def _mistral3() -> hf.PreTrainedModel:
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**TOWER, image_size=64, patch_size=8),
        text_config=hf.MistralConfig(**DECODER, head_dim=16, sliding_window=WINDOW),
        image_token_index=IMAGE_TOKEN,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return hf.Mistral3ForConditionalGeneration(config)


_FAMILIES = {
    "llava": Family(_llava, _images(32)),
    "llava_next": Family(_llava_next, _anyres),
    "llava_onevision": Family(
        _llava_onevision, lambda n: {**_anyres(n), "batch_num_images": torch.ones(n, dtype=torch.long)}
    ),
    "qwen2_vl": Family(_qwen2_vl, _patches, brackets=True),
    "qwen2_5_vl": Family(_qwen2_5_vl, _patches, brackets=True),
    "qwen3_vl": Family(_qwen3_vl, _patches, brackets=True),
    "internvl": Family(_internvl, _images(64)),
    "idefics3": Family(_idefics3, lambda n: {"pixel_values": _noise(n, 1, 3, 64, 64)}),
    "smolvlm": Family(_smolvlm, lambda n: {"pixel_values": _noise(n, 1, 3, 64, 64)}),
    "gemma3": Family(lambda: _gemma3(4096), _images(64)),
    "gemma3_window": Family(lambda: _gemma3(WINDOW), _images(64)),
    "paligemma": Family(_paligemma, _images(32)),
    "vipllava": Family(_vipllava, _images(32)),
    "aya_vision": Family(_aya_vision, _images(64), brackets=True),
    "mistral3": Family(
        _mistral3, lambda n: {"pixel_values": _noise(n, 3, 64, 64), "image_sizes": torch.tensor([[64, 64]] * n)}
    ),
    "glm4v": Family(_glm4v, _patches, brackets=True),
}
FAMILIES: list[str] = list(_FAMILIES)


# ----------------------------------------------------------------------------------------------- models and inputs
def build(name: str, impl: str = "sdpa", seed: int = 0) -> hf.PreTrainedModel:
    """A new model of a family in eval mode, float32, with its own weights (callers cache it).

    Args:
        name: one of `FAMILIES`.
        impl: attention implementation, "sdpa" or "eager".
        seed: of the weights.
    """
    model = spread_weights(_FAMILIES[name].model(), seed)
    model.set_attn_implementation(impl)
    return model


def spread_weights(model: torch.nn.Module, seed: int = 0, gain: float = 1.2) -> Any:
    """Draw every weight anew, scaled by its fan-in, so that signals neither die nor explode; norms stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "embed" in name and "patch" not in name:
                parameter.copy_(noise * 0.1)
            elif parameter.dim() >= 2:
                parameter.copy_(noise * gain / parameter[0].numel() ** 0.5)
            elif "bias" in name or "newline" in name or "class_embedding" in name:
                parameter.copy_(noise * 0.1)
    return model.float().eval()


def visual_slots(input_ids: Tensor) -> Tensor:
    """(B, S) bool: placeholders of images and videos."""
    return (input_ids == IMAGE_TOKEN) | (input_ids == VIDEO_TOKEN)


def _features_per_image(model: hf.PreTrainedModel, pixels: dict[str, Tensor]) -> list[int]:
    """How many placeholders each image takes: whatever the model itself returns for it."""
    get = model.base_model.get_image_features
    accepted = inspect.signature(get).parameters
    with torch.no_grad():
        features = get(**{k: v for k, v in pixels.items() if k in accepted}, return_dict=True).pooler_output
    return [image.shape[-2] for image in features]


def inputs(
    name: str,
    model: hf.PreTrainedModel,
    batch: int = 2,
    images: int | Sequence[int] = 1,
    before: int = 5,
    after: int = 9,
    seed: int = 7,
) -> dict[str, Tensor]:
    """Keyword arguments of one prompt per row: words, image, words (more of them in later rows), padded on the left.

    Args:
        name: family of `model`.
        model: gives the number of tokens of each image.
        batch: rows.
        images: per row; a single number holds for all rows. Several images are separated by words.
        before: words before the first image, in row 0; row b has b more.
        after: words after each image, in row 0; row b has 2b more.
        seed: of the words.
    """
    family = _FAMILIES[name]
    per_row = [images] * batch if isinstance(images, int) else list(images)
    one_by_one = family.pixels(sum(per_row)) if sum(per_row) else {}
    pixels = _arrange(name, one_by_one, per_row) if one_by_one else {}
    # Idefics counts rows, not images; OneVision cuts an image into tiles only where a row has no other.
    counted = one_by_one if name in ("idefics3", "smolvlm") else pixels
    lengths = iter(_features_per_image(model, counted) if counted else [])
    generator = torch.Generator().manual_seed(seed)

    def words(n: int) -> list[int]:
        return torch.randint(FIRST_WORD, LAST_WORD, (n,), generator=generator).tolist()

    rows = []
    for b, n_images in enumerate(per_row):
        row = [1, *words(before + b)]
        for _ in range(n_images):
            image = [IMAGE_TOKEN] * next(lengths)
            row += [IMAGE_START, *image, IMAGE_END] if family.brackets else image
            row += words(after + 2 * b)
        rows.append(row)
    return {**pixels, **_pad_left(name, rows)}


def _arrange(name: str, pixels: dict[str, Tensor], per_row: list[int]) -> dict[str, Tensor]:
    """Bring the images into the shape in which a family says which row they belong to."""
    if name in ("idefics3", "smolvlm"):  # (B, images, ...), short rows padded with empty images
        images = pixels["pixel_values"][:, 0]
        framed = images.new_zeros(len(per_row), max(per_row), *images.shape[1:])
        for row, group in enumerate(images.split(per_row)):
            framed[row, : len(group)] = group
        return {"pixel_values": framed}
    if name == "llava_onevision":
        return {**pixels, "batch_num_images": torch.tensor(per_row)}
    return pixels


def _pad_left(name: str, rows: list[list[int]]) -> dict[str, Tensor]:
    length = max(map(len, rows))
    input_ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": input_ids, "attention_mask": mask, **token_types(name, input_ids)}


def token_types(name: str, input_ids: Tensor) -> dict[str, Tensor]:
    """What some families want to know about every token besides its id."""
    if name.startswith("qwen") or name == "glm4v":
        return {"mm_token_type_ids": (input_ids == IMAGE_TOKEN).int() + 2 * (input_ids == VIDEO_TOKEN).int()}
    if name.startswith("gemma3"):
        return {"token_type_ids": (input_ids == IMAGE_TOKEN).long()}
    if name == "paligemma":
        return {"token_type_ids": torch.zeros_like(input_ids)}
    return {}
