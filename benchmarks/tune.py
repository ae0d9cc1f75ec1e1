"""Does the bound of `foveate tune` hold? Its upper bound from few questions against the truth on many others.

Collects, on held-out questions of `zoo:tiny-llava` (trained weights), the full model's margins and the gaps of 33
settings (line by line, gone on with if there), then plays the search many times: 64 questions are drawn, every setting
gets its bound from them, and the cheapest within the limit is taken; the rest of the questions says what is true.

    python benchmarks/tune.py --collect 1024 --file runs/tune-gaps.jsonl
    python benchmarks/tune.py --file runs/tune-gaps.jsonl --draws 100 --json benchmarks/results/tune.json
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import foveate
from foveate.evaluate.answer import batches, load
from foveate.evaluate.compare import costs
from foveate.evaluate.data import load as load_data
from foveate.recipe import Recipe
from foveate.tune import Reference, changed_share

SEED = 11
LIMITS = (0.01, 0.02, 0.03, 0.05)


def settings() -> Iterator[Recipe]:
    """Settings around the interesting bounds: few that change nothing, few that are hopeless."""
    layered = {
        "fastv": {1: (0.5,), 2: (0.25, 0.5), 3: (0.1, 0.25, 0.5), 4: (0.1, 0.3)},
        "dart": {2: (0.5,), 3: (0.25, 0.5)},
        "random": {-1: (0.5, 0.65, 0.8), 3: (0.1, 0.3)},
    }
    for method, layers in layered.items():
        for layer, keeps in layers.items():
            yield from (Recipe(method, {"keep": keep, "layer": layer}) for keep in keeps)
    before = {
        "visionzip": (0.5, 0.8), "divprune": (0.35, 0.5, 0.8), "cdpruner": (0.5, 0.8), "sparsevlm": (0.5, 0.8),
        "pyramiddrop": (0.5, 0.8), "tome": (0.6, 0.8),
    }  # fmt: skip
    for method, keeps in before.items():
        yield from (Recipe(method, {"keep": keep}) for keep in keeps)
    yield from (Recipe("vtw", {"layer": layer}) for layer in (2, 3, 4, 5))


def collect(model: str, count: int, file: Path) -> None:
    """Append what is missing: one line per batch with the margins and, by setting, gaps and FLOPs."""
    vlm = load(model)
    halves = [load_data(name, count // 2, SEED) for name in ("easy-vqa", "scenes")]
    samples = [(name, sample) for name, half in zip(("easy-vqa", "scenes"), halves) for sample in half]
    random.Random(0).shuffle(samples)
    done = len(file.read_text().splitlines()) if file.exists() else 0
    file.parent.mkdir(parents=True, exist_ok=True)
    for number, batch in enumerate(batches(vlm, [sample for _, sample in samples], 32)):
        if number < done:
            continue
        reference = Reference(vlm.model, batch.inputs, 8, prefix=5)
        row: dict[str, Any] = {"data": [samples[i][0] for i in batch.indices], "margins": reference.margins.tolist()}
        row["settings"] = {}
        for setting in settings():
            outcome = reference.measure(setting.build())
            ratio = costs(vlm, outcome.trace).flops / costs(vlm, outcome.trace, full=True).flops
            row["settings"][setting.id] = [outcome.gaps.tolist(), ratio]
        with file.open("a") as out:
            out.write(json.dumps(row) + "\n")


def study(file: Path, draws: int, samples: int, confidence: float = 0.95) -> dict[str, Any]:
    """Coverage of the bound by setting, and of the choice by limit, for both data sets together and each alone."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    margins = torch.tensor([value for row in rows for value in row["margins"]])
    names = [name for row in rows for name in row["data"]]
    keys = sorted(rows[0]["settings"], key=lambda key: rows[0]["settings"][key][1])
    gaps = {key: torch.tensor([v for row in rows for v in row["settings"][key][0]]) for key in keys}
    saved = torch.tensor([1 - rows[0]["settings"][key][1] for key in keys])
    result: dict[str, Any] = {"questions": len(margins), "drawn": samples, "draws": draws, "settings": len(keys)}
    for data in ("both", "easy-vqa", "scenes"):
        pool = torch.tensor([i for i, name in enumerate(names) if data in ("both", name)])
        truth = torch.tensor([float((gaps[key][pool] < 0).double().mean()) for key in keys])
        generator = torch.Generator().manual_seed(0)
        shares, uppers, counts = [], [], []
        for _ in range(draws):
            chosen = pool[torch.randperm(len(pool), generator=generator)[:samples]]
            pairs = [changed_share(margins[chosen], gaps[key][chosen], confidence) for key in keys]
            shares.append([share for share, _ in pairs])
            uppers.append([upper for _, upper in pairs])
            counts.append([float((gaps[key][chosen] < 0).double().mean()) for key in keys])
        share, upper, count = torch.tensor(shares), torch.tensor(uppers), torch.tensor(counts)
        result[data] = {
            "questions": len(pool),
            "true_share_mean": float(truth.mean()),
            "estimate_mean": float(share.mean()),
            "rmse_estimate": float((share - truth).square().mean().sqrt()),
            "rmse_counting": float((count - truth).square().mean().sqrt()),
            "bound_holds": float((upper >= truth).double().mean()),
            "choices": [_choices(limit, upper, truth, saved) for limit in LIMITS],
        }
    return result


def _choices(limit: float, upper: torch.Tensor, truth: torch.Tensor, saved: torch.Tensor) -> dict[str, float]:
    """What the cheapest setting within the limit is really like; settings are in the order of their cost."""
    good = upper <= limit
    first = good.double().argmax(1)
    none = ~good.any(1)
    wrong = (truth[first] > limit) & ~none
    best = saved[truth <= limit]
    return {
        "limit": limit,
        "nothing_chosen": float(none.double().mean()),
        "limit_broken": float(wrong.double().mean()),
        "saved_mean": float(torch.where(none, 0.0, saved[first]).mean()),
        "saved_if_all_were_known": float(best.max()) if len(best) else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:tiny-llava")
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--collect", type=int, help="questions, half of each data set; without: the study")
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.collect:
        collect(arguments.model, arguments.collect, arguments.file)
        return
    result = {"model": arguments.model, "foveate": foveate.__version__, "confidence": arguments.confidence}
    result |= study(arguments.file, arguments.draws, arguments.samples, arguments.confidence)
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
