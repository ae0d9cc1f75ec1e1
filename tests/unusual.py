"""Tiny models that differ from `families`: images without a tower, images outside the sequence, unusual decoders.

`UNUSUAL` holds what is served, `REFUSED` what is not, each a function without arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tests.families import (
    DECODER,
    IMAGE_END,
    IMAGE_START,
    IMAGE_TOKEN,
    QWEN_TOWER,
    TOWER,
    VIDEO_TOKEN,
    spread_weights,
)

__all__ = ["REFUSED", "SOUND", "UNUSUAL", "omni", "prompt"]

SOUND = 156
LLAMA = {**DECODER, "model_type": "llama"}


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def _mrope(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": list(sections), "rope_theta": 10000.0, **more}


def prompt(tokens: int, rows: int = 2, **pixels: Tensor) -> dict[str, Tensor]:
    """Rows of words, one image of `tokens` placeholders, words; padded on the left."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for row in range(rows):
        before, after = (torch.randint(5, 140, (n,), generator=generator).tolist() for n in (5 + row, 9 + 2 * row))
        made.append([1, *before, *[IMAGE_TOKEN] * tokens, *after])
    length = max(map(len, made))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in made])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in made])
    return {"input_ids": ids, "attention_mask": mask, **pixels}


# ------------------------------------------------------------------------------------------------------ served
def _chameleon() -> tuple[Any, dict[str, Tensor]]:
    """A VQ encoder turns the image into words of the vocabulary."""
    names = {"IMGIMG" + "".join(chr(65 + int(d)) for d in str(i)) + "Z": 160 + i for i in range(20)}
    vq = {"embed_dim": 16, "num_embeddings": 20, "latent_channels": 16, "resolution": 32, "base_channels": 32}
    vq |= {"channel_multiplier": [1, 2, 1], "num_res_blocks": 1}
    config = hf.ChameleonConfig(
        **DECODER, vq_config=vq, image_token_id=IMAGE_TOKEN, vocabulary_map={**names, "<image>": IMAGE_TOKEN}
    )
    return hf.ChameleonForConditionalGeneration(config), prompt(64, pixel_values=_noise(2, 3, 32, 32))


def _fuyu() -> tuple[Any, dict[str, Tensor]]:
    """Pixels are projected into the sequence."""
    text = hf.PersimmonConfig(**{**DECODER, "num_key_value_heads": 4})
    config = hf.FuyuConfig(text_config=text, hidden_size=64, patch_size=16, image_token_id=IMAGE_TOKEN)
    return hf.FuyuForCausalLM(config), prompt(16, image_patches=_noise(2, 16, 768))


def _blip2(text: hf.PreTrainedConfig) -> tuple[Any, dict[str, Tensor]]:
    qformer = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = hf.Blip2Config(
        vision_config={**TOWER, "image_size": 32, "patch_size": 8},
        qformer_config={**qformer, "vocab_size": 60, "encoder_hidden_size": 32},
        text_config=text,
        num_query_tokens=16,
        image_token_index=IMAGE_TOKEN,
    )
    return hf.Blip2ForConditionalGeneration(config), prompt(16, pixel_values=_noise(2, 3, 32, 32))


def _blip2_opt() -> tuple[Any, dict[str, Tensor]]:
    """OPT's layers are one `get_decoder()` deeper than others', and its positions are learnt."""
    sizes = {name: DECODER[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
    return _blip2(hf.OPTConfig(**sizes, ffn_dim=128, word_embed_proj_dim=64, pad_token_id=0, eos_token_id=None))


def _phi4() -> tuple[Any, dict[str, Tensor]]:
    """The placeholder's id stands in `vision_config`, and pixels go by another name."""
    vision = {**TOWER, "crop_size": 64, "image_size": 64, "patch_size": 8, "image_token_id": IMAGE_TOKEN}
    audio = {"num_blocks": 1, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    audio |= {"depthwise_separable_out_channel": 32, "ext_pw_out_channel": 32, "nemo_conv_channels": 16}
    config = hf.Phi4MultimodalConfig(
        **DECODER,
        vision_config={**vision, "feature_layer": -2},
        audio_config={**audio, "audio_token_id": SOUND, "input_size": 16},
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    )
    pixels = {
        "image_pixel_values": _noise(2, 2, 3, 64, 64),
        "image_sizes": torch.tensor([[64, 64]] * 2),
        "image_attention_mask": torch.ones(2, 2, 8, 8, dtype=torch.long),
    }
    return hf.Phi4MultimodalForCausalLM(config), prompt(41, **pixels)


_UNUSUAL: dict[str, Callable[[], tuple[Any, dict[str, Tensor]]]] = {
    "chameleon": _chameleon,
    "fuyu": _fuyu,
    "blip2": lambda: _blip2(hf.LlamaConfig(**DECODER)),
    "blip2_opt": _blip2_opt,
    "phi4_multimodal": _phi4,
}


def _spread(make: Callable[[], tuple[Any, dict[str, Tensor]]]) -> Callable[[], tuple[Any, dict[str, Tensor]]]:
    def made() -> tuple[Any, dict[str, Tensor]]:
        model, inputs = make()
        return spread_weights(model), inputs

    return made


UNUSUAL = {name: _spread(make) for name, make in _UNUSUAL.items()}
"""Model and prompt of what is served without a tower, or by a way round."""


def omni() -> Any:
    """Qwen2.5-Omni, whose prompts have sound, images and videos; spread weights."""
    audio = {"num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
    config = hf.Qwen2_5OmniThinkerConfig(
        audio_config={**audio, "d_model": 32, "n_window": 50, "output_dim": 64, "max_source_positions": 100},
        vision_config={**QWEN_TOWER, "depth": 3, "window_size": 32, "fullatt_block_indexes": [1]},
        text_config={**DECODER, "rope_parameters": _mrope(2, 3, 3)},
        audio_token_index=SOUND,
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
        audio_start_token_id=157,
        audio_end_token_id=158,
        user_token_id=7,
    )
    return spread_weights(hf.Qwen2_5OmniThinkerForConditionalGeneration(config))


# ----------------------------------------------------------------------------------------------------- refused
def _mllama() -> Any:
    vision = {"hidden_size": 32, "attention_heads": 4, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"intermediate_size": 64, "vision_output_dim": 64, "image_size": 32, "patch_size": 8}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1}
    text = {**DECODER, "cross_attention_layers": [1]}
    return hf.MllamaForConditionalGeneration(
        hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    )


def _idefics() -> Any:
    vision = {"embed_dim": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {name: value for name, value in DECODER.items() if name != "num_key_value_heads"}
    return hf.IdeficsForVisionText2Text(
        hf.IdeficsConfig(
            **sizes,
            vision_config={**vision, "image_size": 32, "patch_size": 8},
            cross_layer_interval=2,
            additional_vocab_size=2,
        )
    )


def _colpali() -> Any:
    vlm = hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**DECODER, head_dim=16),
        vision_config=hf.SiglipVisionConfig(**TOWER, image_size=32, patch_size=8, vision_use_head=False),
        image_token_index=IMAGE_TOKEN,
        projection_dim=64,
    )
    return hf.ColPaliForRetrieval(hf.ColPaliConfig(vlm_config=vlm, embedding_dim=16))


def _blip() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 200, "encoder_hidden_size": 32, "pad_token_id": 0, "sep_token_id": 3}
    return hf.BlipForConditionalGeneration(
        hf.BlipConfig(text_config=text, vision_config={**TOWER, "image_size": 32, "patch_size": 8})
    )


def _text() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "mllama": (_mllama, "cross-attention"),
    "idefics": (_idefics, "cross-attention"),
    "blip": (_blip, "cross-attention"),
    "colpali": (_colpali, "retrieval model"),
    "text": (_text, "takes no images"),
}
"""Model, and the words that say why it is refused."""
