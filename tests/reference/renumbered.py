"""Twins for positions that are counted anew: a Llama written out by hand, and a prompt that really is shorter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.reference.plans import all_removed

__all__ = ["decoder_inputs", "renumbered_greedy", "shorter_prompt"]


@torch.no_grad()
def decoder_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """(B, S, D): embeddings with the image features in place, as the decoder of an unpatched model receives them."""
    seen: list[Tensor] = []

    def record(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(kwargs["inputs_embeds"].clone())

    handle = model.get_decoder().register_forward_pre_hook(record, with_kwargs=True)
    model(**inputs)
    handle.remove()
    return seen[0]


def shorter_prompt(embeddings: Tensor, mask: Tensor, removed: Mapping[int, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """What `generate` takes for a prompt in which the removed tokens never were.

    Returns:
        `inputs_embeds` (B, n, D) and `attention_mask` (B, n), padded on the left; and the (B, S) bool that chose them.
    """
    keep = mask.bool() & ~all_removed(removed)
    rows = [embeddings[row, keep[row]] for row in range(len(keep))]
    length = max(map(len, rows))
    short = embeddings.new_zeros(len(rows), length, embeddings.shape[-1])
    attended = torch.zeros(len(rows), length, dtype=torch.long)
    for row, states in enumerate(rows):
        short[row, length - len(states) :] = states
        attended[row, length - len(states) :] = 1
    return {"inputs_embeds": short, "attention_mask": attended}, keep


class _Row:
    """One row in a Llama decoder. Every layer's next position is the number of keys that this layer stores."""

    def __init__(self, model: PreTrainedModel):
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        self.keys: list[Tensor | None] = [None] * len(self.decoder.layers)
        self.values: list[Tensor | None] = [None] * len(self.decoder.layers)

    def layer(self, i: int, states: Tensor) -> Tensor:
        """(n, D) -> (n, D)."""
        layer = self.decoder.layers[i]
        attention, config = layer.self_attn, self.decoder.config
        n, dim = len(states), attention.head_dim
        stored = 0 if self.keys[i] is None else self.keys[i].shape[1]
        normed = layer.input_layernorm(states)
        query = attention.q_proj(normed).view(n, config.num_attention_heads, dim).transpose(0, 1)
        key = attention.k_proj(normed).view(n, config.num_key_value_heads, dim).transpose(0, 1)
        value = attention.v_proj(normed).view(n, config.num_key_value_heads, dim).transpose(0, 1)
        cos, sin = self.decoder.rotary_emb(states[None], torch.arange(stored, stored + n)[None])
        query, key = _rotated(query, cos[0], sin[0]), _rotated(key, cos[0], sin[0])
        if stored:
            key, value = torch.cat([self.keys[i], key], 1), torch.cat([self.values[i], value], 1)
        self.keys[i], self.values[i] = key, value
        shared = config.num_attention_heads // config.num_key_value_heads
        logits = query @ key.repeat_interleave(shared, 0).transpose(1, 2) * dim**-0.5
        future = torch.arange(stored + n)[None] > torch.arange(stored, stored + n)[:, None]
        weights = logits.masked_fill(future, float("-inf")).softmax(-1)
        mixed = (weights @ value.repeat_interleave(shared, 0)).transpose(0, 1).reshape(n, -1)
        states = states + attention.o_proj(mixed)
        return states + layer.mlp(layer.post_attention_layernorm(states))

    def run(self, states: Tensor, removed: Mapping[int, Tensor]) -> Tensor:
        """(n, D) -> (V,): logits of the last token. `removed`: {stage: (n,) bool}."""
        slots = torch.arange(len(states))
        for i in range(len(self.decoder.layers)):
            if i - 1 in removed:
                stays = ~removed[i - 1][slots]
                states, slots = states[stays], slots[stays]
            states = self.layer(i, states)
        return self.head(self.decoder.norm(states[-1]))


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat([-second, first], -1) * sin


@torch.no_grad()
def renumbered_greedy(
    model: PreTrainedModel, inputs: Mapping[str, Any], removed: Mapping[int, Tensor], steps: int
) -> Tensor:
    """Logits (B, steps, V) of greedy decoding on a model whose decoder is a Llama, row after row, without padding."""
    embeddings, rows = decoder_inputs(model, inputs), []
    for b, mask in enumerate(inputs["attention_mask"].bool()):
        row = _Row(model)
        logits = [row.run(embeddings[b, mask], {stage: gone[b, mask] for stage, gone in removed.items()})]
        for _ in range(steps - 1):
            token = logits[-1].argmax()
            logits.append(row.run(model.get_input_embeddings()(token)[None], {}))
        rows.append(torch.stack(logits))
    return torch.stack(rows)
