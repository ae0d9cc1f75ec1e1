"""Classes that no table of configurations builds: three with images in the sequence, eleven without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tests.catalogue import pixels

__all__ = ["HANDMADE", "IMAGE", "Handmade", "prompts"]

IMAGE, START, END = 150, 152, 153


@dataclass
class Handmade:
    """How to make a model, and (model, rows) -> prompt where its visual tokens stand in a sequence.

    `placeholder` is -1 where the prompt has none.
    """

    cls: str
    make: Callable[[], Any]
    inputs: Callable[[Any, int], dict[str, Tensor]] | None = None
    placeholder: int = IMAGE

    @property
    def in_sequence(self) -> bool:
        return self.inputs is not None


def prompts(images: Sequence[Sequence[int]], alike: bool = False) -> dict[str, Tensor]:
    """Ids and mask of rows with one image each, given as ids; the words before and after grow with the row.

    `alike`: every row has the words of the first.
    """
    generator = torch.Generator().manual_seed(7)

    def words(n: int) -> list[int]:
        return torch.randint(5, 140, (n,), generator=generator).tolist()

    rows = [[1, *words(5 + row), *image, *words(9 + 2 * row)] for row, image in enumerate(images)]
    rows = [rows[0]] * len(rows) if alike else rows
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def _marked(rows: int, tokens: int) -> tuple[dict[str, Tensor], Tensor]:
    prompt = prompts([[START, *[IMAGE] * tokens, END]] * rows)
    return prompt, (prompt["input_ids"] == IMAGE).long()


def _git_inputs(model: Any, rows: int) -> dict[str, Tensor]:
    """The features come before the padding, so all rows are equally long."""
    return {**prompts([[]] * rows, alike=True), "pixel_values": pixels.noise(rows, 3, 32, 32)}


def _kosmos2_5_inputs(model: Any, rows: int) -> dict[str, Tensor]:
    prompt, visual = _marked(rows, 8)
    return {**prompt, **pixels.numbered_patches(model, rows), "image_embeds_position_mask": visual}


def _diffusion_gemma_inputs(model: Any, rows: int) -> dict[str, Tensor]:
    prompt, visual = _marked(rows, 16)
    canvas = torch.randint(5, 140, (rows, 8), generator=torch.Generator().manual_seed(8))
    images = pixels.positioned_patches(model, rows)
    return {**prompt, **images, "decoder_input_ids": canvas, "mm_token_type_ids": visual.int()}


_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 200,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_T5 = {"d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 200}


def _git() -> Any:
    return hf.GitForCausalLM(
        hf.GitConfig(**_SMALL | {"eos_token_id": None}, vision_config=_VIT, max_position_embeddings=128)
    )


def _kosmos2_5() -> Any:
    text = {
        "embed_dim": 64,
        "ffn_dim": 128,
        "layers": 6,
        "attention_heads": 4,
        "vocab_size": 200,
        "max_position_embeddings": 128,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
        "patch_embed_hidden_size": 192,
        "max_num_patches": 64,
    }
    return hf.Kosmos2_5ForConditionalGeneration(
        hf.Kosmos2_5Config(text_config=text, vision_config=vision, latent_query_num=8)
    )


def _diffusion_gemma() -> Any:
    text = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 200,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "global_head_dim": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "patch_size": 8,
        "position_embedding_size": 64,
        "pooling_kernel_size": 2,
    }
    return hf.DiffusionGemmaForBlockDiffusion(
        hf.DiffusionGemmaConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=IMAGE,
            boi_token_id=START,
            eoi_token_id=END,
            canvas_length=8,
        )
    )


def _blip() -> Any:
    text = _SMALL | {"encoder_hidden_size": 32, "max_position_embeddings": 128, "sep_token_id": 3}
    return hf.BlipForConditionalGeneration(hf.BlipConfig(text_config=text, vision_config=_VIT))


def _idefics() -> Any:
    vision = {
        "embed_dim": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    return hf.IdeficsForVisionText2Text(
        hf.IdeficsConfig(**_SMALL, vision_config=vision, cross_layer_interval=2, additional_vocab_size=2)
    )


def _florence2() -> Any:
    text = {
        "model_type": "bart",
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "vocab_size": 200,
    }
    vision = {
        "embed_dim": [16, 16, 32, 32],
        "num_heads": [2] * 4,
        "num_groups": [2] * 4,
        "depths": [1] * 4,
        "projection_dim": 64,
    }
    return hf.Florence2ForConditionalGeneration(
        hf.Florence2Config(text_config=text, vision_config=vision, image_token_id=IMAGE)
    )


def _pix2struct() -> Any:
    vision = {
        "hidden_size": 64,
        "d_kv": 16,
        "d_ff": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_embed_hidden_size": 192,
        "seq_len": 64,
    }
    return hf.Pix2StructForConditionalGeneration(
        hf.Pix2StructConfig(text_config={**_T5, "hidden_size": 64}, vision_config=vision)
    )


def _udop() -> Any:
    return hf.UdopForConditionalGeneration(
        hf.UdopConfig(d_model=64, num_decoder_layers=2, image_size=32, patch_size=8, **_T5)
    )


def _vision_encoder_decoder() -> Any:
    return hf.VisionEncoderDecoderModel(
        hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            hf.ViTConfig(**_VIT), hf.BertConfig(**_SMALL | {"hidden_size": 32})
        )
    )


def _t5gemma2() -> Any:
    text = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 300,
    }
    encoder = {
        "text_config": text,
        "vision_config": {**_VIT},
        "mm_tokens_per_image": 16,
        "image_token_index": IMAGE,
        "boi_token_index": START,
        "eoi_token_index": END,
    }
    return hf.T5Gemma2ForConditionalGeneration(
        hf.T5Gemma2Config(encoder=encoder, decoder=text, image_token_index=IMAGE, eoi_token_index=END)
    )


def _mistral4() -> Any:
    """A text model that the mapping lists."""
    return hf.Mistral4ForCausalLM(
        hf.Mistral4Config(
            hidden_size=64,
            intermediate_size=64,
            moe_intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            n_routed_experts=4,
            num_experts_per_tok=2,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
            vocab_size=200,
        )
    )


def _pi0() -> Any:
    """Writes robot actions."""
    gemma = {
        "model_type": "gemma",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 200,
    }
    vlm = {
        "model_type": "paligemma",
        "image_token_index": IMAGE,
        "projection_dim": 64,
        "text_config": gemma,
        "vision_config": {**_VIT, "model_type": "siglip_vision_model", "vision_use_head": False},
    }
    return hf.PI0ForConditionalGeneration(hf.PI0Config(vlm_config=vlm, dit_config={**gemma}))


def _pp_formulanet() -> Any:
    text = {
        "d_model": 64,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "encoder_attention_heads": 4,
        "decoder_ffn_dim": 64,
        "vocab_size": 200,
    }
    vision = {
        "hidden_size": 32,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "window_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 64,
        "post_conv_in_channels": 16,
        "post_conv_out_channels": 64,
        "post_conv_mid_channels": 32,
        "decoder_hidden_size": 64,
    }
    return hf.PPFormulaNetForConditionalGeneration(hf.PPFormulaNetConfig(text_config=text, vision_config=vision))


def _evolla() -> Any:
    """Reads proteins."""
    protein = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "vocab_size": 30,
    }
    return hf.EvollaForProteinText2Text(
        hf.EvollaConfig(
            **_SMALL | {"num_key_value_heads": 2},
            protein_encoder_config=protein,
            resampler_depth=1,
            resampler_num_latents=4,
            resampler_heads=2,
            resampler_dim_head=8,
            aligner_num_add_layers=1,
            max_position_embeddings=128,
        )
    )


HANDMADE = {
    "git": Handmade("GitForCausalLM", _git, _git_inputs, -1),
    "kosmos-2.5": Handmade("Kosmos2_5ForConditionalGeneration", _kosmos2_5, _kosmos2_5_inputs),
    "diffusion_gemma": Handmade("DiffusionGemmaForBlockDiffusion", _diffusion_gemma, _diffusion_gemma_inputs),
    "blip": Handmade("BlipForConditionalGeneration", _blip),
    "idefics": Handmade("IdeficsForVisionText2Text", _idefics),
    "florence2": Handmade("Florence2ForConditionalGeneration", _florence2),
    "pix2struct": Handmade("Pix2StructForConditionalGeneration", _pix2struct),
    "udop": Handmade("UdopForConditionalGeneration", _udop),
    "vision-encoder-decoder": Handmade("VisionEncoderDecoderModel", _vision_encoder_decoder),
    "t5gemma2": Handmade("T5Gemma2ForConditionalGeneration", _t5gemma2),
    "mistral4": Handmade("Mistral4ForCausalLM", _mistral4),
    "pi0": Handmade("PI0ForConditionalGeneration", _pi0),
    "pp_formulanet": Handmade("PPFormulaNetForConditionalGeneration", _pp_formulanet),
    "evolla": Handmade("EvollaForProteinText2Text", _evolla),
}
