"""The five stages: vision and language apart, the projector between them, everything together, then answers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from .. import examples
from ..examples import CENTER, COLOR, LABEL_SIZES, OWNER, PATCHES, UNKNOWN_LABEL, Example, pixels
from ..loop import Place, Report, Stage, load_stage
from .answering import answer_loss, pack
from .model import PatchHeads, Symbols, build, look

__all__ = ["STAGES", "fit", "joint", "language", "load_model", "polish", "vision"]

QUESTIONS = 12
"""Questions per image while training."""


def _labels(batch: list[Example]) -> Tensor:
    return torch.from_numpy(np.stack([example.labels for example in batch]))


def _fresh(place: Place) -> Any:
    model = build(place.seed)
    # Eager attention is the faster one here: the fused kernel's backward is slow on a CPU.
    model.model.vision_tower.set_attn_implementation("eager")
    return model.train()


# ------------------------------------------------------------------------------------------------------- vision
def vision(place: Place, steps: int, batch: int = 8) -> None:
    """The vision tower learns what every patch shows and, by its CLS token, what the image shows."""
    place.connect("vision")
    model, heads = _fresh(place), PatchHeads()

    def loss(rng: np.random.Generator, step: int) -> tuple[Tensor, Report]:
        drawn = [examples.rendered(rng, 0, crowded=True) for _ in range(batch)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return heads(*look(model, pixels(drawn)), _labels(drawn))

    modules = {"tower": model.model.vision_tower, "heads": heads}
    Stage("vision", steps, modules, {"tower": 1e-3, "heads": 1e-3}, loss).run(place)


# ------------------------------------------------------------------------------------------------------- language
def language(place: Place, steps: int, batch: int = 16) -> None:
    """The language model learns to answer from symbols: 8 tokens (one per object) at first, then 48, then all 196.

    With many tokens per object from the start, earlier attempts were still on their plateau after 300 to 500 steps.
    """
    place.connect("language")
    model = _fresh(place)
    symbols = Symbols(model.get_input_embeddings().weight)

    def loss(rng: np.random.Generator, step: int) -> tuple[Tensor, Report]:
        done = step / steps
        count = 8 if done < 0.5 else 48 if done < 0.9 else PATCHES
        objects = (1, 3) if done < 0.15 else (2, 4) if done < 0.3 else (2, 5)
        size = batch if count < PATCHES else batch // 2
        easy_share = 0.0 if done < 0.5 else 0.2
        drawn = [examples.symbolic(rng, QUESTIONS, objects, easy_share) for _ in range(size)]
        labels, places = _symbol_tokens(rng, drawn, count)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = symbols(labels, places)
            noise = torch.from_numpy(rng.standard_normal(tuple(tokens.shape), dtype=np.float32))
            return answer_loss(model, tokens + 0.02 * noise, places, pack([example.questions for example in drawn]))

    modules = {"model": model.model.language_model, "symbols": symbols}
    Stage("language", steps, modules, {"model": 1e-3, "symbols": 1e-3}, loss, decay=0.02).run(place)


def _symbol_tokens(rng: np.random.Generator, drawn: list[Example], count: int) -> tuple[Tensor, Tensor]:
    """Choose `count` patches per image, centres always, and disturb their labels (not while one token is one object).

    Returns labels (B, count, 5) and patch indices (B, count), ascending.
    """
    labels = np.stack([example.labels for example in drawn])
    foreground, center = labels[..., OWNER] > 0, labels[..., CENTER] > 0
    one_each = count < 16
    chance = rng.random(foreground.shape)
    score = 0.5 * chance - foreground if one_each else 0.9 * chance + foreground
    score[center] = 3
    places = np.sort(np.argsort(-score, axis=1)[:, :count], axis=1)
    chosen = np.take_along_axis(labels, places[..., None], 1)[..., : len(LABEL_SIZES)]
    if not one_each:
        for column, size in enumerate(LABEL_SIZES):
            wrong = rng.random(chosen.shape[:2]) < {COLOR: 0.02, CENTER: 0.01}.get(column, 0.06)
            chosen[..., column] = np.where(wrong, rng.integers(0, size, wrong.shape), chosen[..., column])
    return torch.from_numpy(chosen), torch.from_numpy(places)


# ------------------------------------------------------------------------------------------------------- together
def fit(place: Place, steps: int, batch: int = 8) -> None:
    """Vision tower and projector learn to produce the symbols that the language model was raised on."""
    place.connect("fit")
    model, heads = _fresh(place), PatchHeads()
    symbols = Symbols(model.get_input_embeddings().weight)
    load_stage(place.folder, "vision", {"tower": model.model.vision_tower, "heads": heads})
    load_stage(place.folder, "language", {"symbols": symbols})
    projector = model.model.multi_modal_projector

    def loss(rng: np.random.Generator, step: int) -> tuple[Tensor, Report]:
        drawn = [examples.rendered(rng, 0) for _ in range(batch)]
        labels = _labels(drawn)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features, cls, pooled = look(model, pixels(drawn))
            seen, report = heads(features, cls, pooled, labels)
            distance = _distance(symbols, projector(features), labels)
        return distance + 0.3 * seen, {**report, "distance": distance.item()}

    modules = {"tower": model.model.vision_tower, "heads": heads, "projector": projector}
    Stage("fit", steps, modules, {"tower": 3e-4, "heads": 3e-4, "projector": 2e-3}, loss).run(place)


def joint(place: Place, steps: int, batch: int = 5, extra: int = 3) -> None:
    """Everything together on real pixels and all 196 tokens; `extra` crowded pictures keep the digits in mind."""
    place.connect("joint")
    model, heads = _fresh(place), PatchHeads()
    symbols = Symbols(model.get_input_embeddings().weight)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    load_stage(place.folder, "fit", {"tower": tower, "heads": heads, "projector": projector})
    load_stage(place.folder, "language", {"model": model.model.language_model, "symbols": symbols})
    symbols.requires_grad_(False)
    places = torch.arange(PATCHES).expand(batch, -1)

    def loss(rng: np.random.Generator, step: int) -> tuple[Tensor, Report]:
        asked = [examples.rendered(rng, QUESTIONS) for _ in range(batch)]
        drawn = asked + [examples.rendered(rng, 0, crowded=True) for _ in range(extra)]
        labels = _labels(drawn)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features, cls, pooled = look(model, pixels(drawn))
            seen, report = heads(features, cls, pooled, labels)
            tokens = projector(features)
            distance = _distance(symbols, tokens, labels)
            answers, score = answer_loss(model, tokens[:batch], places, pack([example.questions for example in asked]))
        kinds = {f"ask-{kind}": value for kind, value in score.items()}
        parts = {"answers": answers.item(), "seen": seen.item(), "distance": distance.item()}
        return answers + 0.3 * seen + 0.1 * distance, {**parts, **report, **kinds}

    modules = {"tower": tower, "heads": heads, "projector": projector, "model": model.model.language_model}
    # Twice these rates first undid, for a few hundred steps, what the parts had learnt apart.
    rates = {"tower": 1.5e-4, "heads": 1.5e-4, "projector": 2e-4, "model": 2e-4}
    Stage("joint", steps, modules, rates, loss).run(place)


def polish(place: Place, steps: int, batch: int = 6) -> None:
    """The language model learns to read all 196 tokens of a tower that no longer changes.

    With few tokens left it knew more digits than with all of them: what was missing was not sight.
    """
    place.connect("polish")
    model = _fresh(place)
    tower, projector, language_model = (
        model.model.vision_tower,
        model.model.multi_modal_projector,
        model.model.language_model,
    )
    load_stage(place.folder, "joint", {"tower": tower, "projector": projector, "model": language_model})
    places = torch.arange(PATCHES).expand(batch, -1)

    def loss(rng: np.random.Generator, step: int) -> tuple[Tensor, Report]:
        drawn = [examples.rendered(rng, QUESTIONS) for _ in range(batch)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                features, _, _ = look(model, pixels(drawn))
            packed = pack([example.questions for example in drawn])
            answers, score = answer_loss(model, projector(features), places, packed)
        return answers, {f"ask-{kind}": value for kind, value in score.items()}

    modules = {"tower": tower, "projector": projector, "model": language_model}
    Stage("polish", steps, modules, {"projector": 1.5e-4, "model": 3e-4}, loss).run(place)


def _distance(symbols: Symbols, tokens: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of projected tokens (B, 196, D) from their symbols; objects and background weigh the same."""
    foreground = labels[..., OWNER] > 0
    known = (labels != UNKNOWN_LABEL).all(-1)
    with torch.no_grad():
        target = symbols(labels.clamp(min=0), torch.arange(PATCHES)).float()
    each = (tokens.float() - target).pow(2).mean(-1)
    return (each[known & foreground].mean() + each[known & ~foreground].mean()) / target.pow(2).mean()


def load_model(folder: Path, seed: int) -> LlavaForConditionalGeneration:
    """The trained model of a finished run, in float32."""
    model = build(seed)
    parts = model.model
    modules = {"tower": parts.vision_tower, "projector": parts.multi_modal_projector, "model": parts.language_model}
    load_stage(folder, "polish", modules)
    return model.eval()


STAGES = {"vision": vision, "language": language, "fit": fit, "joint": joint, "polish": polish}
