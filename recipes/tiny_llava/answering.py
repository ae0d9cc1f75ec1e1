"""Questions as packed token sequences, and the language model's loss on them.

All questions of an image share one sequence: each sees the image and itself, never another question. Positions of each
start again after the image, so every question is exactly what it would be alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from foveate.zoo.scenes import Question

from ..examples import PATCHES
from ..vocabulary import ASSISTANT, BOS, EOS, PAD, USER, encode

__all__ = ["Packed", "answer_loss", "pack"]

PREFIX = (BOS, USER)
_NO_TARGET = -100
_END_WEIGHT = 0.1  # ending after the answer is learnt at once


@dataclass(frozen=True)
class Packed:
    """Packed questions of a batch: `ids`, `positions`, `segments` and `targets` are int64 (B, T); segment 0 is padding.

    `kinds` names the kind of question for each answer target, in row-major order.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    targets: Tensor
    kinds: list[str]


def pack(batch: list[list[Question]]) -> Packed:
    """Pack the questions of each image."""
    rows, kinds = [], []
    for questions in batch:
        row: list[tuple[int, int, int, int]] = []
        for segment, question in enumerate(questions, 1):
            (answer,) = encode(question.answer)
            tokens = [*encode(question.text), ASSISTANT, answer]
            expected = [_NO_TARGET] * (len(tokens) - 2) + [answer, EOS]
            first = len(PREFIX) + PATCHES
            row += [(token, first + place, segment, expected[place]) for place, token in enumerate(tokens)]
            kinds.append(question.kind)
        rows.append(row)
    longest = max(map(len, rows))
    filler = (PAD, 0, 0, _NO_TARGET)
    table = torch.tensor([row + [filler] * (longest - len(row)) for row in rows])
    ids, positions, segments, targets = table.unbind(-1)
    return Packed(ids, positions, segments, targets, kinds)


def answer_loss(
    model: LlavaForConditionalGeneration, visual: Tensor, places: Tensor, packed: Packed
) -> tuple[Tensor, dict[str, tuple[int, int]]]:
    """Cross-entropy of the answers.

    Args:
        visual: projected visual tokens (B, K, D).
        places: their patch indices (B, K), which give their positions.

    Returns:
        The loss and, per kind of question, (right, asked).
    """
    batch, count, _ = visual.shape
    embed = model.get_input_embeddings()
    prefix = embed(torch.tensor(PREFIX)).expand(batch, -1, -1)
    embeds = torch.cat([prefix.to(visual.dtype), visual, embed(packed.ids).to(visual.dtype)], 1)
    start = torch.arange(len(PREFIX)).expand(batch, -1)
    positions = torch.cat([start, places + len(PREFIX), packed.positions], 1)
    out = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=_mask(packed.segments, len(PREFIX) + count),
        position_ids=positions,
        use_cache=False,
    )
    states = out.last_hidden_state[:, len(PREFIX) + count :]
    chosen = packed.targets != _NO_TARGET
    truth = packed.targets[chosen]
    logits = model.lm_head(states[chosen]).float()
    weight = torch.where(truth == EOS, _END_WEIGHT, 1.0)
    loss = (F.cross_entropy(logits, truth, reduction="none") * weight).sum() / weight.sum()
    right = (logits.argmax(-1) == truth)[truth != EOS].tolist()
    score: dict[str, tuple[int, int]] = {}
    for kind, hit in zip(packed.kinds, right):
        hits, asked = score.get(kind, (0, 0))
        score[kind] = hits + hit, asked + 1
    return loss, score


def _mask(segments: Tensor, shared: int) -> Tensor:
    """bool (B, 1, S, S): causal; a question sees the `shared` first tokens and itself."""
    whole = F.pad(segments, (shared, 0))
    size = whole.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    seen = (whole[:, None, :] == whole[:, :, None]) | (torch.arange(size) < shared)
    return (seen & causal)[:, None]
