"""The tiny CLIP: the tiny LLaVA's vision tower, a small text tower, its tokenizer, and their embeddings.

It is trained by `__main__` and measured by `card`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, LlavaForConditionalGeneration

from ..vocabulary import BOS, VOCABULARY, processor

__all__ = ["LAYERS", "build", "embed_patches", "embed_texts", "tokenizer"]

END = len(VOCABULARY)
"""Id of the token that ends a text; CLIP pools the state there. Not </s>, for transformers reads an `eos_token_id` of 2
as "the largest id of the text"."""
LONGEST = 32
"""Places of the text tower."""
LAYERS = (-2, -1)
"""Tower states that are projected: those that LLaVA reads, and the last ones, which CLIP itself would take."""
_WIDTH, _PROJECTION = 96, 64


def build(llava: Path, seed: int) -> CLIPModel:
    """A CLIP with the vision tower of the checkpoint `llava`, frozen, and an untrained text tower, in float32."""
    source = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32)
    text = CLIPTextConfig(
        vocab_size=-(-(END + 1) // 8) * 8,
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        projection_dim=_PROJECTION,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LONGEST,
        hidden_act="gelu",
        initializer_factor=5.0,  # CLIP's own start is meant for a width of 512
        pad_token_id=END,
        bos_token_id=BOS,
        eos_token_id=END,
    )
    vision = source.model.vision_tower.config.to_dict() | {"projection_dim": _PROJECTION, "dtype": None}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=_PROJECTION))
    model.vision_model.load_state_dict(source.model.vision_tower.state_dict())
    model.vision_model.requires_grad_(False)
    return model.eval()


def tokenizer() -> Any:
    """The tiny LLaVA's words with the same ids; texts are begun with <s>, ended and filled up with <end>."""
    from tokenizers.processors import TemplateProcessing

    words = processor().tokenizer
    words.add_special_tokens({"eos_token": "<end>", "pad_token": "<end>"})
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <end>", pair="<s> $A <end> $B <end>", special_tokens=[("<s>", BOS), ("<end>", END)]
    )
    words.model_max_length = LONGEST
    return words


def embed_texts(model: CLIPModel, ids: Tensor, last: bool = False) -> Tensor:
    """Unit vectors (N, 64) of filled-up texts (N, T), pooled at their end, or at their last place, filler or not."""
    if not last:  # nothing after the end of the longest text is seen
        ids = ids[:, : int((ids != END).sum(1).max()) + 1]
    out = model.text_model(input_ids=ids)
    return F.normalize(model.text_projection(out.last_hidden_state[:, -1] if last else out.pooler_output), dim=-1)


def embed_patches(model: CLIPModel, states: Tensor) -> Tensor:
    """Unit vectors (..., 64) of normed tower states (..., 128)."""
    return F.normalize(model.visual_projection(states), dim=-1)
