"""Made-up folders of a sweep: real questions, invented answers whose accuracy follows the budget."""

import json
from dataclasses import replace

import numpy as np

from foveate.evaluate.data import load
from foveate.evaluate.grid import FULL
from foveate.evaluate.results import rows
from foveate.evaluate.runner import Record
from foveate.recipe import Recipe

SKILL = {"random": 0.30, "averagepool": 0.22, "downsample": 0.18}
VISUAL = 196


def write_lines(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


def make(folder, methods, keeps=(0.5, 0.2), samples=40, seeds=(0, 1), finished=True, question=None, options=None):
    """Write a folder as `foveate sweep` leaves it, and return the rows of its result.

    Args:
        question: replaces the first question and its image id.
        options: of some methods, by name.
        finished: False: killed half-way, in the middle of a line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked = load("scenes", samples, 0)
    if question is not None:
        asked[0] = replace(asked[0], question=question, kind=question, image_id=question)
    recipes = [
        Recipe(method, (options or {}).get(method, {}), keep, seed)
        for method in methods
        for keep in keeps
        for seed in (seeds if method == "random" else [None])
    ]
    rng = np.random.default_rng(0)
    luck = rng.random(samples)  # a hard question is hard for everyone
    records, said = [], {}
    for number, recipe in enumerate([FULL, *recipes]):
        loss = 0.0 if recipe.is_full else SKILL.get(recipe.method, 0.02 * (number % 7)) * (1 - recipe.keep)
        inside = recipe.method in ("fastv", "sparsevlm", "vtw", "dart", "pyramiddrop")
        share = 1.0 if recipe.is_full else recipe.keep + (0.1 if inside else 0.0)
        for i, sample in enumerate(asked):
            right = 0.85 * luck[i] + 0.15 * rng.random() > 0.15 + loss
            said[recipe.id, i] = sample.answer if right else "nothing"
            records.append(
                Record(
                    recipe=recipe.id,
                    sample=i,
                    predicted=said[recipe.id, i],
                    score=float(right),
                    same=said[recipe.id, i] == said[FULL.id, i],
                    kl=loss,
                    visual_tokens=VISUAL,
                    entering=VISUAL * share,
                    after=VISUAL * share,
                    flops=1e9 * (0.1 + 0.9 * share),
                    flops_total=1e9 * (0.4 + 0.9 * share),
                    kv_bytes=1e6 * (0.1 + 0.9 * share),
                )
            )
    plan = {
        "version": 1,
        "model": "zoo:tiny-llava",
        "data": ["scenes"],
        "samples": samples,
        "seed": 0,
        "metric": "exact",
        "max_new_tokens": 8,
        "batch_size": 16,
        "recipes": [each.to_json() for each in (FULL, *recipes)],
        "refused": [{"id": "pumer", "reason": "works inside <ViLT>, METER & BridgeTower"}],
        "machine": {"cpu": "a CPU", "threads": 1, "torch": "2", "transformers": "5", "python": "3"},
        "command": "foveate sweep zoo:tiny-llava --data scenes",
    }
    (folder / "sweep.json").write_text(json.dumps(plan))
    write_lines(
        folder / "samples.jsonl",
        [
            {"sample": i, "data": "scenes", "image_id": s.image_id, "kind": s.kind, "question": s.question,
             "answer": s.answer}
            for i, s in enumerate(asked)
        ],
    )  # fmt: skip
    if not finished:
        write_lines(folder / "answers.jsonl", [record.to_json() for record in records[: len(records) // 2]])
        with (folder / "answers.jsonl").open("a") as file:
            file.write('{"recipe": "rand')
        return []
    write_lines(folder / "answers.jsonl", [record.to_json() for record in records])
    times = {}
    for recipe in [FULL, *recipes]:
        ms = 100 * (0.5 + 0.5 * (1.0 if recipe.is_full else recipe.keep)) + len(recipe.method)
        times[recipe.id] = {"prefill_ms": ms, "q1": ms - 2, "q3": ms + 3, "runs": 5}
    (folder / "times.json").write_text(json.dumps(times))
    found = rows(recipes, asked, ["scenes"] * samples, {"scenes": "exact"}, records, times)
    (folder / "result.json").write_text(
        json.dumps({"model": plan["model"], "data": plan["data"], "samples": samples, "rows": found})
    )
    return found
