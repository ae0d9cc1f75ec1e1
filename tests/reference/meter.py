"""METER in plain PyTorch, with the parameter names of the official code, for checkpoints in its layouts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import RobertaConfig, RobertaModel

__all__ = ["OfficialMeter"]


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        y = self.mlp.c_fc(self.ln_2(x))
        return x + self.mlp.c_proj(y * torch.sigmoid(1.702 * y))


class _Tower(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, image: int, patch: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((image // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*[_Block(width, heads) for _ in range(layers)])

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer.resblocks(self.ln_pre(x).transpose(0, 1)).transpose(0, 1))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.self, self.output = heads, nn.Module(), nn.Module()
        for name in ("query", "key", "value"):
            setattr(self.self, name, nn.Linear(width, width))
        self.output.dense, self.output.LayerNorm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, other: Tensor, mask: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(2, (self.heads, -1)).transpose(1, 2)

        query, key, value = split(self.self.query(x)), split(self.self.key(other)), split(self.self.value(other))
        logits = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5 + (1 - mask[:, None, None].float()) * -1e4
        out = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return self.output.LayerNorm(self.output.dense(out) + x)


class _CrossLayer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.attention, self.crossattention = _Attention(width, heads), _Attention(width, heads)
        self.intermediate, self.output = nn.Module(), nn.Module()
        self.intermediate.dense = nn.Linear(width, inner)
        self.output.dense, self.output.LayerNorm = nn.Linear(inner, width), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, other: Tensor, mask: Tensor, other_mask: Tensor) -> Tensor:
        x = self.crossattention(self.attention(x, x, mask), other, other_mask)
        return self.output.LayerNorm(self.output.dense(gelu(self.intermediate.dense(x))) + x)


class _Pooler(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x[:, 0]).tanh()


class OfficialMeter(nn.Module):
    """Tiny: width 32, 4 heads; `pumer`: the image looks at the text after the text's layer."""

    def __init__(self, pumer: bool, labels: int = 7, image: int = 48, images: int = 1):
        super().__init__()
        width, heads, self.pumer = 32, 4, pumer
        tower = _Tower(width, heads, 2, image, 8)
        if pumer:
            self.vit_model = tower
        else:
            self.vit_model = nn.Module()
            self.vit_model.visual = tower
            self.vit_model.token_embedding = nn.Embedding(5, 3)
            self.vit_model.positional_embedding = nn.Parameter(torch.zeros(4, 3))
            self.vit_model.ln_final = nn.LayerNorm(3)
        self.text_transformer = RobertaModel(
            RobertaConfig(
                vocab_size=50, hidden_size=width, num_attention_heads=heads, num_hidden_layers=2, intermediate_size=48,
                max_position_embeddings=30, type_vocab_size=1, layer_norm_eps=1e-5,
            ),
            add_pooling_layer=not pumer,
        )  # fmt: skip
        self.cross_modal_text_transform, self.cross_modal_image_transform = (nn.Linear(width, width) for _ in range(2))
        self.token_type_embeddings = nn.Embedding(images + 1, width)
        for side in ("text", "image"):
            layers = nn.ModuleList([_CrossLayer(width, heads, 40) for _ in range(3)])
            setattr(self, f"cross_modal_{side}_layers", layers)
            setattr(self, f"cross_modal_{side}_pooler", _Pooler(width))
        self.vqa_classifier = nn.Sequential(
            nn.Linear(2 * width * images, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, labels)
        )

    def pooled(self, ids: Tensor, mask: Tensor, pixels: Tensor, kind: int = 1) -> Tensor:
        tower = self.vit_model if self.pumer else self.vit_model.visual
        text = self.cross_modal_text_transform(self.text_transformer(ids, attention_mask=mask).last_hidden_state)
        image = self.cross_modal_image_transform(tower(pixels))
        kinds = self.token_type_embeddings.weight
        text, image = text + kinds[0], image + kinds[kind]
        seen = torch.ones(image.shape[:2])
        for text_layer, image_layer in zip(self.cross_modal_text_layers, self.cross_modal_image_layers):
            new = text_layer(text, image, mask, seen)
            image = image_layer(image, new if self.pumer else text, seen, mask)
            text = new
        return torch.cat([self.cross_modal_text_pooler(text), self.cross_modal_image_pooler(image)], -1)

    def checkpoint(self, head: str = "vqa_classifier") -> dict[str, Tensor]:
        """Weights as the official code saves them."""
        state = {name.replace("vqa_classifier", head): value for name, value in self.state_dict().items()}
        if not self.pumer:
            return state
        return {name if name.startswith(head) else f"meter.{name}": value for name, value in state.items()}
