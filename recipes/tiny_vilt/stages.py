"""The stages that train the tiny ViLT: what it sees, then what is asked of it.

All questions of an image share one sequence while training: each sees the image and itself, and the image sees the
first of them only, so that the first is exactly what ViLT computes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.zoo import path, scenes

from .. import examples
from ..examples import CENTER, OWNER, PATCHES, Example, pixels
from ..loop import Place, Report, Stage, load_stage
from ..tiny_llava.model import PatchHeads
from .model import ANSWERS, LOWER, PAD, build, encode, name_words, parts, start_from_tower

__all__ = ["STAGES", "Packed", "answer", "load_model", "pack"]

QUESTIONS = 12
_GROUND_LAYER = LOWER + 2
_BLOCKED = -1e4


@dataclass(frozen=True)
class Packed:
    """Questions of a batch of images, N in all.

    Attributes:
        ids, positions, segments: int64 (B, T); segment 0 is padding, 1 the first question of an image.
        rows, starts: int64 (N,), where the [CLS] of each question is.
        answers: int64 (N,), indices of `ANSWERS`.
        asked: bool (N, 196), patches of what the question is about.
        kinds: the kind of each question.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    rows: Tensor
    starts: Tensor
    answers: Tensor
    asked: Tensor
    kinds: list[str]

    def score(self, logits: Tensor) -> dict[str, tuple[int, int]]:
        """(right, asked) by kind; "first" counts each image's first question."""
        found: dict[str, tuple[int, int]] = {}
        first = self.segments[self.rows, self.starts] == 1
        for kind, one, hit in zip(self.kinds, first.tolist(), (logits.argmax(-1) == self.answers).tolist()):
            for key in (f"ask-{kind}", "ask-first") if one else (f"ask-{kind}",):
                right, count = found.get(key, (0, 0))
                found[key] = right + hit, count + 1
        return found


def pack(drawn: list[Example]) -> Packed:
    """Pack the questions of each image."""
    rows, places, answers, asked, kinds = [], [], [], [], []
    for number, example in enumerate(drawn):
        row: list[tuple[int, int, int]] = []
        for segment, question in enumerate(example.questions, 1):
            places.append((number, len(row)))
            row += [(token, place, segment) for place, token in enumerate(encode(question.text))]
            answers.append(ANSWERS.index(question.answer))
            asked.append(np.isin(example.labels[:, OWNER], [index + 1 for index in question.about]))
            kinds.append(question.kind)
        rows.append(row)
    longest = max(map(len, rows))
    table = torch.tensor([row + [(PAD, 0, 0)] * (longest - len(row)) for row in rows])
    ids, positions, segments = table.unbind(-1)
    image, start = torch.tensor(places).unbind(-1)
    about = torch.from_numpy(np.stack(asked))
    return Packed(ids, positions, segments, image, start, torch.tensor(answers), about, kinds)


# --------------------------------------------------------------------------------------------------------- forwards
def embed_image(model: Any, images: Tensor) -> Tensor:
    """(B, 197, D), CLS first, patches in their order. ViLT's own forward shuffles them, which changes no answer."""
    embeddings = model.vilt.embeddings
    patches = embeddings.patch_embeddings(images).flatten(2).transpose(1, 2)
    tokens = torch.cat([embeddings.cls_token.expand(len(images), -1, -1), patches], 1) + embeddings.position_embeddings
    return tokens + embeddings.token_type_embeddings.weight[1]


def embed_text(model: Any, packed: Packed) -> Tensor:
    """(B, T, D)"""
    embeddings = model.vilt.embeddings
    types = torch.zeros_like(packed.ids)
    words = embeddings.text_embeddings(input_ids=packed.ids, token_type_ids=types, position_ids=packed.positions)
    return words + embeddings.token_type_embeddings.weight[0]


def run(layers: Iterable[Any], states: Tensor, mask: Tensor | None = None) -> Tensor:
    """Run ViLT layers; `mask` is added to the scores."""
    for layer in layers:
        states = layer(states, mask)[0]
    return states


def joint_mask(segments: Tensor, image: int, first: bool) -> Tensor:
    """(B, 1, T + image, T + image): text sees its segment and the image; the image itself and perhaps segment 1."""
    same = segments[:, :, None] == segments[:, None, :]
    whole = F.pad(same, (0, image, 0, image), value=True)
    text = segments.shape[1]
    whole[:, text:, :text] = (segments == 1)[:, None] if first else False
    return torch.where(whole, 0.0, _BLOCKED)[:, None]


def classify(model: Any, states: Tensor, packed: Packed) -> Tensor:
    """Logits (N, answers) from the state of each [CLS]."""
    base = model.vilt
    chosen = base.layernorm(states[packed.rows, packed.starts])
    return model.classifier(torch.tanh(base.pooler.dense(chosen))).float()


def answer(
    model: Any, states: Tensor, mask: Tensor, packed: Packed, chosen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the upper layers.

    Args:
        states: (B, T + 1 + K, D), text before image.
        chosen: patches that are there (B, K); None for all of them in order.

    Returns:
        Logits (N, answers); the grounding loss: one head of one layer should look where the question is about.
    """
    layers, text = model.vilt.encoder.layer, packed.ids.shape[1]
    states = run(layers[LOWER:_GROUND_LAYER], states, mask)
    states, maps = layers[_GROUND_LAYER](states, mask, True)
    seen = maps[packed.rows, 0, packed.starts, text + 1 :].float()  # (N, K)
    wanted = packed.asked if chosen is None else packed.asked.gather(1, chosen[packed.rows])
    some = wanted.any(1)
    mass = (seen * wanted).sum(1) / seen.sum(1).clamp(min=1e-6)
    ground = -mass[some].clamp(min=1e-4).log().mean()
    return classify(model, run(layers[_GROUND_LAYER + 1 :], states, mask), packed), ground


def answer_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """Cross-entropy, and faintly the binary one that ViLT is fine-tuned with."""
    target = F.one_hot(answers, len(ANSWERS)).float()
    binary = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1).mean()
    return F.cross_entropy(logits, answers) + 0.1 * binary


# ----------------------------------------------------------------------------------------------------------- stages
def _labels(drawn: list[Example]) -> Tensor:
    return torch.from_numpy(np.stack([example.labels for example in drawn]))


def _patches(heads: PatchHeads, states: Tensor, drawn: list[Example]) -> tuple[Tensor, dict[str, float]]:
    return heads(states[:, 1:], states[:, 0], states[:, 0], _labels(drawn))


def _scene(rng: np.random.Generator, objects: tuple[int, int], easy_share: float) -> Example:
    if rng.random() < easy_share:
        return examples.easy(rng, QUESTIONS)
    scene = scenes.paint(rng, scenes.place(rng, objects), "train")
    asked = scenes.ask(rng, scene.things, QUESTIONS)
    return Example(scene.pixels, examples.labels(scene.things, scene.owner), asked)


def see(place: Place, steps: int, batch: int = 8) -> None:
    """The lower layers learn again what every patch shows, without the norm that came before them in training."""
    place.connect("see")
    model, heads = build(place.seed).train(), PatchHeads()
    rng = place.rng("see-start", 0)
    start_from_tower(model, path("tiny-llava"), [examples.rendered(rng, 0) for _ in range(64)])

    def loss(rng: np.random.Generator, step: int) -> tuple[Tensor, Report]:
        drawn = [examples.rendered(rng, 0, crowded=True) for _ in range(batch)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = run(model.vilt.encoder.layer[:LOWER], embed_image(model, pixels(drawn)))
            return _patches(heads, states, drawn)

    modules = {"lower": parts(model)["lower"], "heads": heads}
    Stage("see", steps, modules, {"lower": 4e-4, "heads": 2e-3}, loss).run(place)


def _seeing(place: Place) -> tuple[Any, PatchHeads]:
    """The model after stage "see", its words named after what it sees."""
    model, heads = build(place.seed).train(), PatchHeads()
    load_stage(place.folder, "see", {"lower": parts(model)["lower"], "heads": heads})
    drawn = [examples.rendered(np.random.default_rng([place.seed, number]), 0) for number in range(128)]
    with torch.no_grad():
        states = run(model.vilt.encoder.layer[:LOWER], embed_image(model, pixels(drawn)))
    name_words(model, states[:, 1:], drawn)
    return model, heads


def ask(place: Place, steps: int, batch: int = 12) -> None:
    """The upper layers learn to answer from a few tokens: one per object, then 48. The lower layers stand still."""
    place.connect("ask")
    model, _ = _seeing(place)
    layers = model.vilt.encoder.layer

    def loss(rng: np.random.Generator, step: int) -> tuple[Tensor, Report]:
        done = step / steps
        count = 8 if done < 0.9 else 48
        objects = (1, 3) if done < 0.2 else (2, 4) if done < 0.45 else (2, 5)
        drawn = [_scene(rng, objects, 0.0 if done < 0.45 else 0.2) for _ in range(batch)]
        packed = pack(drawn)
        chosen = _choose(rng, drawn, count)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                seen = run(layers[:LOWER], embed_image(model, pixels(drawn)))
            few = torch.cat([seen[:, :1], seen[:, 1:].gather(1, chosen[..., None].expand(-1, -1, seen.shape[-1]))], 1)
            words = run(layers[:LOWER], embed_text(model, packed), joint_mask(packed.segments, 0, False))
            mask = joint_mask(packed.segments, few.shape[1], False)
            logits, ground = answer(model, torch.cat([words, few], 1), mask, packed, chosen)
            answers = answer_loss(logits, packed.answers)
        return answers + 0.3 * ground, {"answers": answers.item(), "ground": ground.item(), **packed.score(logits)}

    Stage("ask", steps, parts(model), {"upper": 1e-3}, loss, decay=0.02).run(place)


def _choose(rng: np.random.Generator, drawn: list[Example], count: int) -> Tensor:
    """`count` patches per image (B, count), ascending: centres, then background (8) or other foreground (48)."""
    labels = np.stack([example.labels for example in drawn])
    foreground = labels[..., OWNER] > 0
    chance = rng.random(foreground.shape)
    score = 0.5 * chance - foreground if count < 16 else 0.9 * chance + foreground
    score[labels[..., CENTER] > 0] = 3
    return torch.from_numpy(np.sort(np.argsort(-score, axis=1)[:, :count], axis=1))


def joint(place: Place, steps: int, batch: int = 5, extra: int = 1) -> None:
    """Everything together on all 196 patches; `extra` crowded pictures keep the digits in mind."""
    place.connect("joint")
    model, heads = build(place.seed).train(), PatchHeads()
    modules: dict[str, nn.Module] = {**parts(model), "heads": heads}
    load_stage(place.folder, "ask", parts(model))
    load_stage(place.folder, "see", {"heads": heads})
    layers = model.vilt.encoder.layer

    def loss(rng: np.random.Generator, step: int) -> tuple[Tensor, Report]:
        asked = [examples.rendered(rng, QUESTIONS) for _ in range(batch)]
        more = [examples.rendered(rng, 0, crowded=True) for _ in range(extra)]
        packed = pack(asked)
        text = packed.ids.shape[1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = torch.cat([embed_text(model, packed), embed_image(model, pixels(asked))], 1)
            mask = joint_mask(packed.segments, PATCHES + 1, True)
            states = run(layers[:LOWER], states, mask)
            seen, _ = _patches(heads, states[:, text:], asked)
            crowd, report = _patches(heads, run(layers[:LOWER], embed_image(model, pixels(more))), more)
            seen = (batch * seen + extra * crowd) / (batch + extra)
            logits, ground = answer(model, states, mask, packed)
            answers = answer_loss(logits, packed.answers)
        numbers = {"answers": answers.item(), "seen": seen.item(), "ground": ground.item()}
        return answers + 0.2 * seen + 0.3 * ground, {**numbers, **report, **packed.score(logits)}

    Stage("joint", steps, modules, {"lower": 2e-4, "heads": 2e-4, "upper": 4e-4}, loss).run(place)


def load_model(folder: Path, seed: int, stage: str = "joint") -> Any:
    """The model that a finished stage left, in float32."""
    model = build(seed)
    load_stage(folder, stage, parts(model))
    return model.eval()


STAGES = {"see": see, "ask": ask, "joint": joint}
