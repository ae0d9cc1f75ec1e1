"""The stage that readies the tiny ViLT for PuMer, before ``foveate train pumer`` makes the student of it.

Reduction as PuMer's, but for all questions of an image at once: the image tokens are ranked by the attention of all of
its questions together, pruned and merged once; the text of each question merges for itself. An image is then reduced a
little less to the point than for one question alone, and costs a twelfth of twelve.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.ops.pumer import reduce_image, reduce_text

from .. import examples
from ..examples import Example, pixels
from ..loop import Place, Report, Stage, load_stage
from .model import ANSWERS, HEADS, PAD, build, encode, parts
from .stages import QUESTIONS, answer_loss, embed_image

__all__ = ["LAYERS", "MERGE", "MERGE_TEXT", "PRUNE", "answer_reduced", "grid", "reduced"]

LAYERS, PRUNE, MERGE, MERGE_TEXT = (2, 5, 8), 0.1, 0.3, 0.2
"""PuMer's released settings for ViLT on VQAv2, which the student is trained with."""

_BLOCKED = -1e4


def grid(drawn: list[Example], questions: int = QUESTIONS) -> tuple[Tensor, Tensor, list[str]]:
    """Token ids (B, Q, L), filled up; answers (B, Q), -100 where an image has fewer questions; kinds of those asked."""
    rows = [[encode(question.text) for question in example.questions] for example in drawn]
    ids = torch.full((len(drawn), questions, max(len(text) for row in rows for text in row)), PAD)
    answers = torch.full((len(drawn), questions), -100)
    for b, (row, example) in enumerate(zip(rows, drawn)):
        for q, (text, question) in enumerate(zip(row, example.questions)):
            ids[b, q, : len(text)] = torch.tensor(text)
            answers[b, q] = ANSWERS.index(question.answer)
    return ids, answers, [question.kind for example in drawn for question in example.questions]


def answer_reduced(model: Any, ids: Tensor, images: Tensor) -> Tensor:
    """Logits (B, Q, answers) of questions (B, Q, L) about images (B, 3, 112, 112), with tokens reduced.

    The image sees the first question, every question the image and itself. With one question this is `foveate.PuMer`.
    """
    embeddings, base = model.vilt.embeddings, model.vilt
    batch, questions, _ = ids.shape
    used = (ids != PAD).flatten(0, 1)
    text = embeddings.text_embeddings(input_ids=ids.flatten(0, 1)) + embeddings.token_type_embeddings.weight[0]
    image = embed_image(model, images)
    width = image.shape[-1]
    mask = _mask(used.view(batch, questions, -1), image.shape[1])
    for index, layer in enumerate(base.encoder.layer):
        states = torch.cat([text.reshape(batch, -1, width), image], 1)
        length = states.shape[1] - image.shape[1]
        normed = layer.layernorm_before(states)
        seen, *maps = layer.attention(normed, mask, index in LAYERS)
        states = states + seen
        text, image = states[:, :length].reshape(batch * questions, -1, width), states[:, length:]
        if index in LAYERS:
            with torch.no_grad():
                key = layer.attention.attention.key(normed).unflatten(2, (HEADS, -1)).mean(2).float()
                rows = maps[0][:, :, :length, length:].float().mean(1) * used.view(batch, length, 1)
                everything = torch.ones(image.shape[:2], dtype=torch.bool)
                fewer = reduce_image(rows.sum(1), key[:, length:], everything, PRUNE, MERGE)
                shorter = reduce_text(key[:, :length].reshape(batch * questions, -1, key.shape[2]), used, MERGE_TEXT)
            image = fewer.apply(image)
            if shorter is not None:
                text, used = shorter.apply(text), shorter.mask
            mask = _mask(used.view(batch, questions, -1), image.shape[1])
        states = torch.cat([text.reshape(batch, -1, width), image], 1)
        states = layer.output(layer.intermediate(layer.layernorm_after(states)), states)
        length = states.shape[1] - image.shape[1]
        text, image = states[:, :length].reshape(batch * questions, -1, width), states[:, length:]
    pooled = torch.tanh(base.pooler.dense(base.layernorm(text[:, 0])))
    return model.classifier(pooled).float().view(batch, questions, -1)


def _mask(used: Tensor, image: int) -> Tensor:
    """What is added to the scores, (B, 1, S, S), for text in use (B, Q, L) before `image` tokens."""
    batch, questions, length = used.shape
    number = torch.arange(questions).repeat_interleave(length)
    same = (number[:, None] == number) & used.view(batch, 1, -1)
    whole = F.pad(same, (0, image, 0, image), value=True)
    text = questions * length
    whole[:, text:, :text] = (used.view(batch, -1) & (number == 0))[:, None]
    return torch.where(whole, 0.0, _BLOCKED)[:, None]


def reduced(place: Place, steps: int, batch: int = 6) -> None:
    """The whole model learns to answer with its tokens reduced."""
    place.connect("reduced")
    model = build(place.seed).train()
    load_stage(place.folder, "joint", parts(model))

    def loss(rng: np.random.Generator, step: int) -> tuple[Tensor, Report]:
        drawn = [examples.rendered(rng, QUESTIONS) for _ in range(batch)]
        ids, answers, kinds = grid(drawn)
        asked = answers >= 0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = answer_reduced(model, ids, pixels(drawn))[asked]
        truth = answers[asked]
        hits = (logits.argmax(-1) == truth).tolist()
        found: dict[str, tuple[int, int]] = {}
        for kind, hit in zip(kinds, hits):
            right, count = found.get(f"ask-{kind}", (0, 0))
            found[f"ask-{kind}"] = right + hit, count + 1
        return answer_loss(logits, truth), {"all": (sum(hits), len(hits)), **found}

    Stage("reduced", steps, parts(model), {"lower": 3e-4, "upper": 4e-4}, loss).run(place)
