"""What the tiny ViLT answers on held-out questions, and the cards of the model and of its PuMer student."""

from __future__ import annotations

import itertools
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch
from transformers import AutoProcessor, ViltForQuestionAnswering

from ...ops.pumer import token_counts
from ..easyvqa import easyvqa
from ..scenes import KINDS, Sample, scenes
from .loop import progress

__all__ = ["TEST_SEED", "answers", "entering", "flops", "measure", "student_card", "teacher_card"]

TEST_SEED = 999
TEACHER, STUDENT = (Path(__file__).with_name(name) for name in ("vilt_card.md", "vilt_pumer_card.md"))
LAYERS, PRUNE, MERGE, MERGE_TEXT = (2, 5, 8), 0.1, 0.3, 0.2
"""PuMer's released settings for ViLT on VQAv2, which the student was trained with."""


@torch.inference_mode()
def answers(folder: Path, samples: Sequence[Sample], batch: int = 32) -> list[str]:
    """The model's answers, through its own processor and forward, in float32."""
    model = ViltForQuestionAnswering.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    said: list[str] = []
    for first in range(0, len(samples), batch):
        rows = samples[first : first + batch]
        inputs = processor(
            [row.image for row in rows], [row.question for row in rows], padding=True, return_tensors="pt"
        )
        said += [model.config.id2label[index] for index in model(**inputs).logits.argmax(-1).tolist()]
    return said


def measure(folder: Path, test_scenes: int, test_easy: int) -> dict[str, tuple[float, int]]:
    """(accuracy, questions) by kind, of the test splits; "scenes" is all kinds of scene questions together."""
    samples = scenes(test_scenes, TEST_SEED) + easyvqa("test", test_easy)
    right = [said == sample.answer for said, sample in zip(answers(folder, samples), samples)]
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
def teacher_card(
    target: Path, run: Path, stages: Iterable[str], folder: Path, note: str, counts: tuple[int, int]
) -> None:
    """Measure the exported model in `folder` and write its card."""
    logs = {name: progress(run, name) for name in stages}
    found = measure(folder, *counts)
    (run / "accuracy.json").write_text(json.dumps(found, indent=1) + "\n")
    rows = [[name, str(line["step"]), f"{line['seconds'] / 60:.0f} min"] for name, line in logs.items() if line]
    fields = {
        "stages": _table(["stage", "steps", "wall time"], rows),
        "accuracy": _table(["kind", "accuracy", "n"], ([kind, f"{hit:.3f}", n] for kind, (hit, n) in found.items())),
        "minutes": f"{sum(line['seconds'] for line in logs.values() if line) / 60:.0f}",
        "machine": _machine(),
        "note": note,
    }
    target.write_text(Template(TEACHER.read_text(encoding="utf-8")).substitute(fields), encoding="utf-8")


def student_card(target: Path, result: Mapping[str, Any], note: str) -> None:
    """The student's card, from what ``foveate train`` measured."""
    columns = {
        "teacher, all tokens": "accuracy_teacher",
        "teacher, PuMer, untrained": "before",
        "student, PuMer": "accuracy",
    }
    sets = [name for name in result["accuracy"] if name != "all"]
    tokens = entering(9, 197)
    fields = {
        "accuracy": _table(
            ["", *(f"{name} (n = {result['eval_samples']})" for name in sets)],
            ([title, *(f"{result[key][name]:.3f}" for name in sets)] for title, key in columns.items()),
        ),
        "tokens": ", ".join(str(image) for _, image in tokens[:-1]),
        "ratio": f"{flops([tokens[0]] * len(tokens)) / flops(tokens):.2f}",
        "steps": str(result["steps"]),
        "batch": str(result["batch"]),
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
