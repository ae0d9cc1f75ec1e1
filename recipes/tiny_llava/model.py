"""The tiny LLaVA: its configuration, how it is initialised, and the heads that only training needs.

A 1.0 M parameter CLIP vision tower (112 px, patch 8), a two-layer projector and a 2.2 M parameter Llama. At this size
and budget the start decides whether training leaves its plateau, so both transformers start "mimetic" (Trockman and
Kolter 2023, "Mimetic Initialization of Self-Attention Layers"): queries and keys that match content.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from foveate.zoo.scenes import GRID, IMAGE_SIZE, PATCH, QUADRANTS

from ..examples import COLOR, DIGIT, LABEL_SIZES, OWNER, PATCHES, SHAPE, UNKNOWN_LABEL
from ..vocabulary import BOS, COLOR_WORDS, DIGIT_WORDS, EOS, IDS, IMAGE, PAD, SHAPE_WORDS, VOCABULARY

__all__ = ["PatchHeads", "Symbols", "build", "look"]

VISION_WIDTH, TEXT_WIDTH, LAYERS, HEADS = 128, 192, 6, 4
MOST_OBJECTS = 9


def build(seed: int) -> LlavaForConditionalGeneration:
    """The untrained model in float32."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=3 * VISION_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=64,
        hidden_act="gelu",  # one fused kernel on a CPU; CLIP's quick_gelu is two
    )
    text = LlamaConfig(
        vocab_size=-(-len(VOCABULARY) // 8) * 8,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        _start_vision(model)
        _start_text(model)
    return model


def _start_vision(model: Any) -> None:
    tower = model.model.vision_tower
    positions = next(module for name, module in tower.named_modules() if name.endswith("position_embedding"))
    # CLIP's own N(0, 0.02) start takes very long to discover which patches are neighbours.
    positions.weight[1:] = 0.4 * _sine_positions(VISION_WIDTH, 0.9 * math.pi, 0.15)
    for module in tower.modules():
        if hasattr(module, "q_proj") and hasattr(module, "out_proj"):
            _match_content(module, module.out_proj, VISION_WIDTH, noise=(0.7, 0.4), identity=(0.7, -0.4))


def _start_text(model: Any) -> None:
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        _match_content(attention, attention.o_proj, TEXT_WIDTH, noise=(0.5, 0.05), identity=(0.7, 0.08))
    model.get_input_embeddings().weight.normal_(0, 0.1)
    nn.init.normal_(model.model.multi_modal_projector.linear_2.weight, 0, 0.1)


def _match_content(
    module: Any, output: nn.Linear, width: int, noise: tuple[float, float], identity: tuple[float, float]
) -> None:
    """Set Wq Wk^T of each head to noise * Z + identity * I, and Wv Wo likewise (second entries)."""
    size = width // HEADS
    for head in range(HEADS):
        rows = slice(head * size, (head + 1) * size)
        u, s, v = torch.linalg.svd(noise[0] * torch.randn(width, width) / width**0.5 + identity[0] * torch.eye(width))
        module.q_proj.weight[rows] = (u[:, :size] * s[:size].sqrt()).T
        module.k_proj.weight[rows] = (v.T[:, :size] * s[:size].sqrt()).T
    u, s, v = torch.linalg.svd(noise[1] * torch.randn(width, width) / width**0.5 + identity[1] * torch.eye(width))
    module.v_proj.weight.copy_((v.T * s.sqrt()).T)
    output.weight.copy_(u * s.sqrt())


def _sine_positions(width: int, fastest: float, slowest: float) -> Tensor:
    """2-D sine-cosine position table (196, width); frequencies in radians per patch."""
    frequencies = torch.exp(torch.linspace(math.log(fastest), math.log(slowest), width // 4))
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (rows, columns)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)


def look(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run the vision tower on pixels (B, 3, 112, 112).

    Returns:
        The patch features that the projector reads (B, 196, D), the CLS state beside them (B, D), and the pooled CLS
        state of the last layer (B, D).
    """
    out = model.model.vision_tower(pixels, output_hidden_states=True)
    features = out.hidden_states[-2]
    return features[:, 1:], features[:, 0], out.pooler_output


class PatchHeads(nn.Module):
    """What each patch shows, and what the CLS token knows of the image. Thrown away after training."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(VISION_WIDTH) for _ in range(2))
        self.patch = nn.Linear(VISION_WIDTH, sum(LABEL_SIZES))
        known = len(SHAPE_WORDS) + len(COLOR_WORDS) + len(DIGIT_WORDS) + MOST_OBJECTS
        self.cls = nn.ModuleList(nn.Linear(VISION_WIDTH, known) for _ in range(2))

    def forward(self, features: Tensor, cls: Tensor, pooled: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Loss and foreground accuracies. features (B, 196, D), cls and pooled (B, D), labels (B, 196, 6)."""
        logits = self.patch(self.norms[0](features)).float().split(LABEL_SIZES, -1)
        foreground = labels[..., OWNER] > 0
        weight = torch.where(foreground, 1.0, 0.25)
        loss, report = torch.zeros(()), {}
        for column, (scores, name) in enumerate(zip(logits, ("shape", "color", "digit", "quadrant", "center"))):
            truth = labels[..., column]
            each = F.cross_entropy(scores.transpose(1, 2), truth, ignore_index=UNKNOWN_LABEL, reduction="none")
            loss = loss + (2.0 if column == DIGIT else 1.0) * (each * weight).sum() / weight.sum()
            shown = foreground & (truth > 0)
            hits = (scores.argmax(-1) == truth) & shown
            report[name] = (hits.sum() / shown.sum().clamp(min=1)).item()
        target, mask = _image_facts(labels)
        # Both CLS states are trained, so that CLS attention means something in the feature layer and in the last one.
        for head, state in zip(self.cls, (self.norms[1](cls), pooled)):
            each = F.binary_cross_entropy_with_logits(head(state).float(), target, reduction="none")
            loss = loss + 2.0 * (each * mask).sum() / mask.sum()
        return loss, report


def _image_facts(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which words are in the image and how many objects, as bits (B, facts), and which bits are known."""
    facts, known = [], []
    for column, words in ((SHAPE, SHAPE_WORDS), (COLOR, COLOR_WORDS), (DIGIT, DIGIT_WORDS)):
        values = labels[..., column]
        present = F.one_hot(values.clamp(min=0), len(words) + 1).amax(1)[:, 1:]
        facts.append(present)
        known.append((values >= 0).all(1, keepdim=True).expand_as(present))
    count = labels[..., OWNER].amax(1).clamp(max=MOST_OBJECTS)
    facts.append(F.one_hot(count, MOST_OBJECTS + 1)[:, 1:])
    known.append(torch.ones_like(facts[-1], dtype=torch.bool))
    return torch.cat(facts, 1).float(), torch.cat(known, 1).float()


class Symbols(nn.Module):
    """Visual tokens made of true labels: the sum of trainable vectors, one per label value and one per position.

    The language model learns on these while the vision tower is still learning to see; the projector is then fitted to
    them. They start as the embeddings of the words that answer questions about them; quadrant and centre start faint,
    lest many strong parts in a token drown the match between a question's word and the object it names (at full
    strength a run was still on its plateau after 440 steps; faint, it left after about 400).
    """

    def __init__(self, word_embeddings: Tensor) -> None:
        super().__init__()
        self.values = nn.ModuleList(nn.Embedding(size, TEXT_WIDTH) for size in LABEL_SIZES)
        self.position = nn.Embedding(PATCHES, TEXT_WIDTH)
        with torch.no_grad():
            table: Any
            for table, words in zip(self.values, (SHAPE_WORDS, COLOR_WORDS, DIGIT_WORDS, QUADRANTS, ("object",))):
                table.weight.normal_(0, 0.03)
                strength = 0.25 if words in (QUADRANTS, ("object",)) else 1.0
                table.weight[1:] = strength * word_embeddings[[IDS[word] for word in words]]
            self.position.weight.copy_(0.06 * _sine_positions(TEXT_WIDTH, 0.5 * math.pi, 0.08))

    def forward(self, labels: Tensor, places: Tensor) -> Tensor:
        """labels (B, K, >= 5) without unknowns, places (B, K) or (K,) patch indices -> tokens (B, K, D)."""
        tokens = self.position(places)
        for column, table in enumerate(self.values):
            tokens = tokens + table(labels[..., column])
        return tokens
