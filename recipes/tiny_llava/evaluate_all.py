"""The measurements of the model card: accuracy by kind, under pruning, and the margins between choices."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from foveate.zoo import path
from foveate.zoo.easyvqa import easyvqa
from foveate.zoo.scenes import KINDS, Sample, scenes

from ..loop import progress
from .evaluate import AFTER, BEFORE, Bench, margin

__all__ = ["evaluate_all", "measure"]

TEST_SEED, VALIDATION_SEED = 999, 555
SCENES, EASY = 560, 1000
"""Scenes of five questions each (so that every kind is asked 200 times), and easy-VQA questions."""
PRUNED = 1500
"""How many of the scene questions are asked again with few tokens."""
BUDGETS = (64, 22, 8)
DRAWS = 3
LAYERS = (0, 1)
EASY_CHOICES = ("random", "CLS attention, last layer", "asked objects")
REMOVED = 22
"""The budget of the table by kind: 22 of 196 tokens, 11 %."""
STATED = (22, 8)
"""The budgets at which margins are stated."""


def evaluate_all(
    folder: Path, run: Path, stages: Iterable[str], scene_count: int = SCENES, easy_count: int = EASY
) -> dict[str, Any]:
    """Measure on the test splits and keep the result in ``run/results.json``."""
    results = measure(folder, scenes(scene_count, TEST_SEED), easyvqa(count=easy_count, seed=TEST_SEED))
    results["training"] = {name: progress(run, name) for name in stages}
    results["machine"] = f"{os.cpu_count()} cores, {platform.machine()}, no GPU"
    (run / "results.json").write_text(json.dumps(results, indent=1))
    return results


def measure(folder: Path, own: list[Sample], easy: list[Sample]) -> dict[str, Any]:
    """Accuracy by kind on scenes and easy-VQA; accuracy under pruning and margins on scenes."""
    whole, easy_bench = Bench(folder, own), Bench(folder, easy)
    right = whole.full()
    accuracy = {"overall": _summary(right)}
    accuracy |= {kind: _summary(right[whole.kinds == kind]) for kind in KINDS}
    accuracy["easy-vqa"] = _summary(easy_bench.full())
    bench, full = Bench(folder, own[:PRUNED]), right[:PRUNED]
    before = _table(bench, BEFORE, -1)
    after = {layer: _table(bench, AFTER, layer) for layer in LAYERS}
    easy_before = _table(easy_bench, EASY_CHOICES, -1)
    return {
        "accuracy": accuracy,
        "questions": len(own),
        "pruned": len(bench.samples),
        "full": float(full.mean()),
        "foreground": float(bench.objects.float().mean()),
        "before": _means(before),
        "after": {str(layer): _means(table) for layer, table in after.items()},
        "easy": _means(easy_before),
        "kinds": _by_kind(bench, full, before, after),
        "margins": _margins(bench, full, before, after),
    }


Table = dict[str, dict[int, np.ndarray]]
"""Per choice and budget: (N,) right or wrong, the mean of several draws for the random choice."""


def _table(bench: Bench, choices: tuple[str, ...], layer: int) -> Table:
    table: Table = {}
    for choice in choices:
        draws = range(DRAWS if choice == "random" else 1)
        table[choice] = {
            keep: np.mean([bench.pruned(choice, keep, layer, seed) for seed in draws], axis=0) for keep in BUDGETS
        }
    return table


def _means(table: Table) -> dict[str, dict[str, float]]:
    return {choice: {str(keep): float(right.mean()) for keep, right in row.items()} for choice, row in table.items()}


def _by_kind(bench: Bench, full: np.ndarray, before: Table, after: dict[int, Table]) -> dict[str, dict[str, float]]:
    """Accuracy by kind of question at `REMOVED` tokens."""
    rows = {"all 196 tokens": full} | {f"before: {choice}": row[REMOVED] for choice, row in before.items()}
    rows |= {f"after layer 0: {choice}": row[REMOVED] for choice, row in after[0].items()}
    return {name: {kind: float(row[bench.kinds == kind].mean()) for kind in KINDS} for name, row in rows.items()}


def _margins(bench: Bench, full: np.ndarray, before: Table, after: dict[int, Table]) -> list[dict[str, Any]]:
    """Differences in accuracy with their standard errors, at the budgets `STATED`."""
    clusters = bench.image.numpy()
    cls, oracle = "CLS attention, last layer", "asked objects"
    questions = ("question tokens, mean", "question tokens, max")
    margins = []
    for keep in STATED:
        row = {choice: table[keep] for choice, table in before.items()} | {"all tokens": full}
        pairs = [("before", row, *names) for names in (("all tokens", oracle), (oracle, cls), (cls, "random"))]
        for layer, table in after.items():
            row = {choice: right[keep] for choice, right in table.items()}
            pairs += [(f"after layer {layer}", row, *names) for names in ((q, cls) for q in questions)]
            pairs.append((f"after layer {layer}", row, cls, "random"))
        for where, right, better, worse in pairs:
            mean, error = margin(right[better], right[worse], clusters)
            line = {"keep": keep, "where": where, "better": better, "worse": worse}
            margins.append(line | {"margin": mean, "error": error})
    return margins


def _summary(right: np.ndarray) -> dict[str, float]:
    return {"accuracy": float(right.mean()), "n": len(right)}


def main() -> None:
    """Measure a checkpoint: ``python -m recipes.tiny_llava.evaluate_all [FOLDER] [--split test|validation]``."""
    parser = argparse.ArgumentParser(description="Measure a checkpoint of the zoo.")
    parser.add_argument("folder", type=Path, nargs="?", default=path("tiny-llava"))
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--easy", type=int, default=EASY)
    options = parser.parse_args()
    seed = TEST_SEED if options.split == "test" else VALIDATION_SEED
    own = scenes(options.scenes, seed, split=options.split)
    easy = easyvqa("test" if options.split == "test" else "train", options.easy, seed)
    Console().print_json(json.dumps(measure(options.folder, own, easy)))


if __name__ == "__main__":
    main()
