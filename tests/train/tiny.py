"""Tiny ViLT and METER folders with processors, and local data sets of coloured squares, for all tests of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BertTokenizer, CLIPImageProcessorPil, ViltConfig
from transformers.models.vilt import modeling_vilt as vilt
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

from foveate import models as meter

SIDE, PATCH = 32, 8
COLORS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["what", "color", "is", "the", "square", "?", "this", "a", "picture", "of", "both", "are", "same"]
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


def tokenizer() -> BertTokenizer:
    words = [*SPECIAL, *WORDS, *COLORS, "yes", "no"]
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)})


def vilt_folder(folder: Path, name: str = "ViltForQuestionAnswering", labels: list[str] | None = None, **options: Any):
    """A random model, its attention sharp enough for the choice of tokens to matter."""
    torch.manual_seed(5)
    if labels is not None:
        options |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    config = ViltConfig(
        **SMALL, num_hidden_layers=6, image_size=SIDE, patch_size=PATCH, vocab_size=40, max_position_embeddings=16,
        num_images=2, **{"modality_type_vocab_size": 2, **options},
    )  # fmt: skip
    model = getattr(vilt, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    ViltImageProcessorPil(size={"shortest_edge": SIDE}, size_divisor=PATCH).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def meter_folder(folder: Path, name: str, **options: Any) -> Path:
    torch.manual_seed(6)
    config = meter.MeterConfig(
        **SMALL, num_hidden_layers=4,
        vision_config={**SMALL, "num_hidden_layers": 1, "image_size": SIDE, "patch_size": PATCH},
        text_config={**SMALL, "num_hidden_layers": 1, "vocab_size": 40, "max_position_embeddings": 20,
                     "pad_token_id": 0},
        **options,
    )  # fmt: skip
    getattr(meter, name)(config).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size=size, do_center_crop=False).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def squares(folder: Path, task: str = "vqa", rows: int = 40) -> Path:
    """A JSONL file of the task, its images beside it."""
    folder.mkdir(exist_ok=True)
    for name, color in COLORS.items():
        Image.new("RGB", (SIDE, SIDE), color).save(folder / f"{name}.png")
    names = list(COLORS)
    lines = []
    for number in range(rows):
        one, other = names[number % 4], names[number // 4 % 4]
        lines.append({
            "vqa": {"image": f"{one}.png", "question": "what color is the square?", "answer": one},
            "nlvr2": {"images": [f"{one}.png", f"{other}.png"], "text": "both are the same", "label": one == other},
            "ve": {"image": f"{one}.png", "text": f"this is {other}", "label": "yes" if one == other else "no"},
            "retrieval": {"image": f"{one}.png", "text": f"a picture of {one}"},
        }[task])  # fmt: skip
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
