"""What the trained model gets right, whole and with few visual tokens.

A small forward of its own with real removal (tokens are gathered away, position ids stay), independent of the engine:
it measures whether the *model* tells good choices of tokens from bad ones. Two places of removal: before the language
model, and after one of its decoder layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from foveate.zoo.scenes import Sample

from ..examples import PATCHES
from ..vocabulary import ASSISTANT, BOS, USER, encode

__all__ = ["AFTER", "BEFORE", "Bench", "margin"]

BEFORE = ("random", "CLS attention, feature layer", "CLS attention, last layer", "all objects", "asked objects")
"""Choices before the language model."""
AFTER = ("random", "CLS attention, last layer", "last token", "question tokens, mean", "question tokens, max")
"""Choices after a decoder layer; the last three read that layer's attention."""
_PREFIX = 2  # <s> USER:


@dataclass(frozen=True)
class _Batch:
    """Questions of equal length: `index` (B,) into the samples, `ids` (B, T) from the question to ASSISTANT."""

    index: Tensor
    ids: Tensor


@dataclass(frozen=True)
class _State:
    """`hidden` (B, S, D) leaving a layer, and `rows` (B, H, T, 196): its attention from the question to the image."""

    hidden: Tensor
    rows: Tensor


class Bench:
    """A checkpoint and a list of samples, encoded once, answered many times.

    Args:
        folder: a checkpoint folder of this architecture.
        samples: questions; samples of one image must share the `image` object to be encoded once.
    """

    @torch.no_grad()
    def __init__(self, folder: str | Path, samples: list[Sample]) -> None:
        self.samples = samples
        self.kinds = np.array([sample.kind for sample in samples])
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        images = {id(sample.image): sample.image for sample in samples}
        rows = {key: row for row, key in enumerate(images)}
        self.image = torch.tensor([rows[id(sample.image)] for sample in samples])
        self._encode(folder, list(images.values()))
        self.targets = torch.tensor([encode(sample.answer)[0] for sample in samples])
        self.asked = torch.stack([_flat(sample.asked) for sample in samples])
        self.objects = torch.stack([_flat(sample.owner) > 0 for sample in samples])
        self.batches = list(self._batches())
        self.states: dict[tuple[int, int], _State] = {}

    def _encode(self, folder: str | Path, images: list) -> None:
        tower = self.model.model.vision_tower
        tower.set_attn_implementation("eager")  # the only one that returns attention
        prepare = AutoProcessor.from_pretrained(folder).image_processor
        tokens, feature_cls, last_cls = [], [], []
        for first in range(0, len(images), 32):
            pixels = prepare(images[first : first + 32], return_tensors="pt")["pixel_values"]
            out = tower(pixels, output_hidden_states=True, output_attentions=True)
            tokens.append(self.model.model.multi_modal_projector(out.hidden_states[-2][:, 1:]))
            feature_cls.append(out.attentions[-2].mean(1)[:, 0, 1:])
            last_cls.append(out.attentions[-1].mean(1)[:, 0, 1:])
        self.tokens, self.feature_cls, self.last_cls = map(torch.cat, (tokens, feature_cls, last_cls))

    def _batches(self) -> Iterator[_Batch]:
        by_length: dict[int, list[tuple[int, list[int]]]] = {}
        for index, sample in enumerate(self.samples):
            ids = [*encode(sample.question), ASSISTANT]
            by_length.setdefault(len(ids), []).append((index, ids))
        for rows in by_length.values():
            for first in range(0, len(rows), 64):
                chosen = rows[first : first + 64]
                yield _Batch(torch.tensor([row[0] for row in chosen]), torch.tensor([row[1] for row in chosen]))

    # ------------------------------------------------------------------------------------------------- answers
    def full(self) -> np.ndarray:
        """Right or wrong with all tokens, bool (N,)."""
        return self.pruned("random", PATCHES)

    @torch.no_grad()
    def pruned(self, choice: str, keep: int, layer: int = -1, seed: int = 0) -> np.ndarray:
        """Right or wrong when `keep` visual tokens leave decoder layer `layer`, bool (N,).

        Args:
            choice: one of `BEFORE` or `AFTER`; the latter's last three read the attention of `layer`.
            layer: decoder layer, from 0; -1 removes before the first one.
            seed: of the random choice, and of how ties are broken.
        """
        scores = self._scores(choice, seed)
        right = np.zeros(len(self.samples), bool)
        for number, batch in enumerate(self.batches):
            state = self._state(number, layer)
            rated = _rate(choice, state.rows) if scores is None else scores[batch.index]
            chosen = self._finish(batch, state, rated.topk(keep, dim=1).indices.sort(dim=1).values, layer)
            right[batch.index] = (chosen == self.targets[batch.index]).numpy()
        return right

    def _scores(self, choice: str, seed: int) -> Tensor | None:
        """Per-token scores (N, 196) of a choice; None if it needs the decoder's attention."""
        noise = torch.rand(len(self.samples), PATCHES, generator=torch.Generator().manual_seed(seed))
        return {
            "random": noise,
            "CLS attention, feature layer": self.feature_cls[self.image],
            "CLS attention, last layer": self.last_cls[self.image],
            "all objects": self.objects + 0.01 * noise,
            "asked objects": self.asked + 0.1 * self.objects + 0.01 * noise,
        }.get(choice)

    # ------------------------------------------------------------------------------------------------- forward
    def _state(self, number: int, layer: int) -> _State:
        """What leaves decoder layer `layer` with nothing removed; computed once."""
        if (number, layer) not in self.states:
            before = self._state(number, layer - 1) if layer >= 0 else None
            self.states[number, layer] = self._embed(number) if before is None else self._step(number, before, layer)
        return self.states[number, layer]

    def _embed(self, number: int) -> _State:
        batch, embed = self.batches[number], self.model.get_input_embeddings()
        rows = len(batch.index)
        prefix = embed(torch.tensor([BOS, USER])).expand(rows, -1, -1)
        hidden = torch.cat([prefix, self.tokens[self.image[batch.index]], embed(batch.ids)], 1)
        return _State(hidden, torch.zeros(rows, 0))

    def _step(self, number: int, before: _State, layer: int) -> _State:
        decoder, asked = self.model.model.language_model, self.batches[number].ids.shape[1]
        positions = torch.arange(before.hidden.shape[1]).expand(len(before.hidden), -1)
        rotary = decoder.rotary_emb(before.hidden, positions)
        module = decoder.layers[layer]
        rows = _attention(module, before.hidden, rotary, asked)[..., _PREFIX:-asked]
        return _State(module(before.hidden, position_embeddings=rotary, position_ids=positions), rows)

    def _finish(self, batch: _Batch, state: _State, kept: Tensor, layer: int) -> Tensor:
        """Answers (B,) of the remaining layers, given only the visual tokens `kept` (B, K) at their own positions."""
        decoder = self.model.model.language_model
        rows, size = state.hidden.shape[:2]
        tail = torch.arange(size - batch.ids.shape[1], size).expand(rows, -1)
        slots = torch.cat([torch.arange(_PREFIX).expand(rows, -1), kept + _PREFIX, tail], 1)
        hidden = state.hidden.gather(1, slots[..., None].expand(-1, -1, state.hidden.shape[-1]))
        rotary = decoder.rotary_emb(hidden, slots)
        for module in decoder.layers[layer + 1 :]:
            hidden = module(hidden, position_embeddings=rotary, position_ids=slots)
        return self.model.lm_head(decoder.norm(hidden[:, -1])).argmax(-1)


def margin(better: np.ndarray, worse: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """Mean difference in accuracy and its standard error, paired by question and clustered by image.

    `better` and `worse` are (N,) of right/wrong, or of the mean over several draws.
    """
    difference = better.astype(float) - worse.astype(float)
    mean = difference.mean()
    _, cluster = np.unique(clusters, return_inverse=True)
    sums = np.bincount(cluster, difference - mean)
    return float(mean), float(np.sqrt((sums**2).sum()) / len(difference))


def _flat(grid: np.ndarray | None) -> Tensor:
    return torch.zeros(PATCHES, dtype=torch.long) if grid is None else torch.from_numpy(grid.reshape(-1).astype(int))


def _rate(choice: str, rows: Tensor) -> Tensor:
    """Scores (B, K) from the attention of the question's rows (B, H, T, K); the last row is ASSISTANT."""
    if choice == "last token":
        return rows[:, :, -1].mean(1)
    question = rows[:, :, :-1]
    return question.mean((1, 2)) if choice.endswith("mean") else question.amax((1, 2))


def _attention(layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], count: int) -> Tensor:
    """Attention of the last `count` rows of a Llama layer, (B, H, count, S)."""
    module, normed = layer.self_attn, layer.input_layernorm(hidden)
    shape = (*normed.shape[:2], -1, module.head_dim)
    query, key = (projection(normed).view(shape).transpose(1, 2) for projection in (module.q_proj, module.k_proj))
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    scores = query[:, :, -count:] @ key.transpose(2, 3) * module.scaling
    size = hidden.shape[1]
    future = torch.ones(count, size, dtype=torch.bool).triu(size - count + 1)
    return scores.masked_fill(future, float("-inf")).softmax(-1)
