"""What the tiny ViLT answers on held-out questions, and the cards of the model and of its PuMer student."""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch
from transformers import AutoProcessor, ViltForQuestionAnswering

from foveate.ops.pumer import token_counts
from foveate.zoo.easyvqa import easyvqa
from foveate.zoo.scenes import KINDS, Sample, scenes

from ..loop import progress
from .reduced import LAYERS, MERGE, MERGE_TEXT, PRUNE, answer_reduced

__all__ = ["TEST_SEED", "answers", "entering", "flops", "measure", "student_card", "teacher_card"]

TEST_SEED = 999
TEACHER, STUDENT = (Path(__file__).with_name(name) for name in ("card.md", "pumer_card.md"))


@torch.inference_mode()
def answers(folder: Path, samples: Sequence[Sample], few: bool = False, batch: int = 32) -> list[str]:
    """The model's answers, through its own processor and forward, in float32; with `few`, with tokens as PuMer's."""
    model = ViltForQuestionAnswering.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    said: list[str] = []
    for first in range(0, len(samples), batch):
        rows = samples[first : first + batch]
        inputs = processor(
            [row.image for row in rows], [row.question for row in rows], padding=True, return_tensors="pt"
        )
        if few:
            logits = answer_reduced(model, inputs["input_ids"][:, None], inputs["pixel_values"])[:, 0]
        else:
            logits = model(**inputs).logits
        said += [model.config.id2label[index] for index in logits.argmax(-1).tolist()]
    return said


def measure(folder: Path, test_scenes: int, test_easy: int, few: bool = False) -> dict[str, tuple[float, int]]:
    """(accuracy, questions) by kind, of the test splits; "scenes" is all kinds of scene questions together."""
    samples = scenes(test_scenes, TEST_SEED) + easyvqa("test", test_easy)
    right = [said == sample.answer for said, sample in zip(answers(folder, samples, few), samples)]
    found = {}
    for kind in (*KINDS, "easy"):
        hits = [hit for hit, sample in zip(right, samples) if sample.kind == kind]
        found[kind] = (sum(hits) / max(len(hits), 1), len(hits))
    own = [hit for hit, sample in zip(right, samples) if sample.kind != "easy"]
    return {"scenes": (sum(own) / len(own), len(own)), **found}


def entering(text: int, image: int, layers: int = 12) -> list[tuple[int, int]]:
    """(text, image) tokens that enter each layer, and at last those that leave it, with the student's settings."""
    found = [(text, image)]
    for layer in range(layers):
        if layer in LAYERS:
            kept, merged = token_counts(image, PRUNE, MERGE)
            image = kept - merged
            text -= min(round(MERGE_TEXT * text), (text - 1) // 2)
        found.append((text, image))
    return found


def flops(tokens: Sequence[tuple[int, int]], width: int = 128, inner: int = 384) -> float:
    """Multiply-adds of the layers, times two: attention on the tokens that enter, MLP on those that leave."""
    total = 0.0
    for before, after in itertools.pairwise(tokens):
        n, m = sum(before), sum(after)
        total += 2 * (4 * n * width**2 + 2 * n * n * width + 2 * m * width * inner)
    return total


# ------------------------------------------------------------------------------------------------------------ cards
Accuracy = Mapping[str, tuple[float, int]]


def teacher_card(target: Path, run: Path, stages: Iterable[str], found: Accuracy, note: str) -> None:
    """Write the card of the teacher, of which `found` was measured."""
    logs = {name: progress(run, name) for name in stages}
    rows = [[name, str(line["step"]), f"{line['seconds'] / 60:.0f} min"] for name, line in logs.items() if line]
    fields = {
        "stages": _table(["stage", "steps", "wall time"], rows),
        "accuracy": _table(["kind", "accuracy", "n"], ([kind, f"{hit:.3f}", n] for kind, (hit, n) in found.items())),
        "minutes": f"{sum(line['seconds'] for line in logs.values() if line) / 60:.0f}",
        "machine": _machine(),
        "note": note,
    }
    target.write_text(Template(TEACHER.read_text(encoding="utf-8")).substitute(fields), encoding="utf-8")


def student_card(
    target: Path, run: Path, accuracy: tuple[Accuracy, Accuracy, Accuracy], result: Mapping[str, Any], note: str
) -> None:
    """Write the card of the student.

    Args:
        accuracy: of the teacher with all tokens and with few, of the student with few.
        result: what ``foveate train`` wrote.
    """
    full, _, trained = accuracy
    titles = ("tiny-vilt, all tokens", "tiny-vilt, PuMer, untrained", "tiny-vilt-pumer, PuMer")
    found = dict(zip(titles, accuracy))
    gaps = [trained[kind][0] - full[kind][0] for kind in full]
    tokens = entering(9, 197)
    warm = progress(run, "reduced")
    fields = {
        "accuracy": _table(
            ["kind", "n", *found, "student - teacher"],
            (
                [kind, n, *(f"{row[kind][0]:.3f}" for row in found.values()), f"{gap:+.3f}"]
                for (kind, (_, n)), gap in zip(full.items(), gaps)
            ),
        ),
        "tokens": ", ".join(str(image) for _, image in tokens[:-1]),
        "ratio": f"{flops([tokens[0]] * len(tokens)) / flops(tokens):.2f}",
        "warm": str(warm["step"]),
        "warm_minutes": f"{warm['seconds'] / 60:.0f}",
        "steps": str(result["steps"]),
        "batch": str(result["batch"] * result["processes"]),
        "minutes": f"{result['seconds'] / 60:.0f}",
        "machine": _machine(),
        "note": note,
    }
    target.write_text(Template(STUDENT.read_text(encoding="utf-8")).substitute(fields), encoding="utf-8")


def _machine() -> str:
    return f"{os.cpu_count()} cores ({platform.machine()}), no GPU"


def _table(head: list[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
