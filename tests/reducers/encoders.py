"""Tiny ViLT, METER and BridgeTower models with inputs; images of one size, texts of several lengths."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BridgeTowerConfig, ViltConfig
from transformers.models.bridgetower import modeling_bridgetower as bridgetower
from transformers.models.vilt import modeling_vilt as vilt

from foveate import models as meter

WIDTH, SIDE, PATCH = 32, 48, 8
TOKENS = (SIDE // PATCH) ** 2 + 1
LENGTHS = [11, 6, 9]
SMALL = {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 64}


def _vilt(name: str, **options: Any) -> nn.Module:
    config = ViltConfig(
        **SMALL, num_hidden_layers=6, image_size=SIDE, patch_size=PATCH, vocab_size=50, num_labels=7,
        modality_type_vocab_size=3, num_images=2, pad_token_id=1, **options,
    )  # fmt: skip
    return getattr(vilt, name)(config)


def meter_config(**options: Any) -> meter.MeterConfig:
    return meter.MeterConfig(
        **SMALL, num_hidden_layers=4, modality_type_vocab_size=3, num_labels=7,
        vision_config={**SMALL, "num_hidden_layers": 2, "image_size": SIDE, "patch_size": PATCH},
        text_config={**SMALL, "num_hidden_layers": 2, "vocab_size": 50, "max_position_embeddings": 30},
        **options,
    )  # fmt: skip


def _bridgetower(name: str) -> nn.Module:
    # The heads of its tower are as many as hidden_size // 64.
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64}
    config = BridgeTowerConfig(
        hidden_size=64, num_attention_heads=4, num_hidden_layers=4,
        text_config={**sizes, "num_hidden_layers": 5, "vocab_size": 50, "max_position_embeddings": 30,
                     "layer_norm_eps": 1e-5, "pad_token_id": 1, "type_vocab_size": 1},
        vision_config={"hidden_size": 64, "num_hidden_layers": 5, "image_size": SIDE, "patch_size": PATCH},
        contrastive_hidden_size=16, logit_scale_init_value=2.66,
    )  # fmt: skip
    return getattr(bridgetower, name)(config)


ENCODERS = [
    "ViltModel", "ViltForQuestionAnswering", "ViltForImagesAndTextClassification", "ViltForImageAndTextRetrieval",
    "MeterModel", "MeterForQuestionAnswering", "MeterForImagesAndTextClassification", "MeterForVisualEntailment",
    "MeterForImageAndTextRetrieval", "BridgeTowerModel", "BridgeTowerForImageAndTextRetrieval",
    "BridgeTowerForContrastiveLearning",
]  # fmt: skip


@functools.cache
def encoder(name: str) -> nn.Module:
    """A model, shared by all tests of a process; its attention is sharp enough for the choice of tokens to matter."""
    torch.manual_seed(5)
    if name.startswith("Vilt"):
        model = _vilt(name)
    elif name.startswith("Meter"):
        model = getattr(meter, name)(meter_config())
    else:
        model = _bridgetower(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            elif key.endswith("bias"):
                parameter.normal_(0, 0.05)
    return model.eval()


def inputs(model: nn.Module, rows: int = 3) -> dict[str, Tensor]:
    """Texts padded on the right with token 1, images of one size (two for NLVR2)."""
    generator = torch.Generator().manual_seed(7)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()[:rows]
    ids = torch.randint(3, 50, mask.shape, generator=generator).masked_fill(mask == 0, 1)
    images = (2,) if "ImagesAndText" in type(model).__name__ else ()
    pixels = torch.randn(rows, *images, 3, SIDE, SIDE, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def one_row(prompt: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """A single pair without padding."""
    words = prompt["attention_mask"][row].bool()
    alone = {name: value[row : row + 1] for name, value in prompt.items()}
    return alone | {name: alone[name][:, words] for name in ("input_ids", "attention_mask")}


def answer(model: nn.Module, prompt: dict[str, Tensor], **options: Any) -> Tensor:
    """Logits, or what a bare model pools. ViLT shuffles its patches at random."""
    torch.manual_seed(3)
    output = model(**prompt, **options)
    return output.logits if getattr(output, "logits", None) is not None else output.pooler_output
