"""Every method at four budgets on the trained model of the package: accuracy, agreement, compute.

Trained weights (`zoo:tiny-llava`, 196 visual tokens, 6 decoder layers), held-out questions: half easy-VQA's test split,
half rendered scenes. FLOPs are those of the whole prefill, vision tower and head included, counted by torch on a batch
with eager attention (torch does not count SDPA on a CPU). Ranks on a small model need not hold for LLaVA-1.5.

    python benchmarks/methods.py --samples 400 --json benchmarks/results/methods.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate import zoo
from foveate.evaluate.answer import VLM, batches, load
from foveate.evaluate.compare import Contestant, compare
from foveate.evaluate.data import load as load_data
from foveate.reduction import Reducer

BUDGETS = (0.33, 0.22, 0.11, 0.05)
SEEDS = (0, 1, 2)


def makers(vlm: VLM) -> dict[str, Callable[[float], Reducer]]:
    """Methods by name, from a fraction of the visual tokens."""
    companion = {"clip": str(zoo.path("tiny-clip")), "tokenizer": vlm.tokenizer} if "tiny-clip" in zoo.names() else None
    found: dict[str, Callable[[float], Reducer]] = {
        f"random, seed {seed}": lambda keep, seed=seed: foveate.Random(keep=keep, seed=seed) for seed in SEEDS
    }
    found |= {
        "averagepool": lambda keep: foveate.AveragePool(keep=keep),
        "downsample": lambda keep: foveate.Downsample(keep=keep),
        "divprune": lambda keep: foveate.DivPrune(keep=keep),
        "fopru": lambda keep: foveate.FoPru(keep=keep),
        "prumerge": lambda keep: foveate.PruMerge(keep=keep),
        "prumerge+": lambda keep: foveate.PruMergePlus(keep=keep),
        "visionzip": lambda keep: foveate.VisionZip(keep=keep),
        "vispruner": lambda keep: foveate.VisPruner(keep=keep),
        "tome": lambda keep: foveate.ToMe(keep=keep),
        "pitome": lambda keep: foveate.PiToMe(keep=keep),
        "cdpruner, llm": lambda keep: foveate.CDPruner(keep=keep),
        "recoverable, llm": lambda keep: foveate.Recoverable(keep=keep),
        "fastv, layer 1": lambda keep: foveate.FastV(keep=keep, layer=1),
        "dart, layer 1": lambda keep: foveate.DART(keep=keep, layer=1),
        "pyramiddrop": lambda keep: foveate.PyramidDrop(keep=keep),
        "sparsevlm": lambda keep: foveate.SparseVLM(keep=keep),
        "vtw": lambda keep: foveate.VTW(keep=keep),
        "chain: visionzip, vtw": lambda keep: foveate.Chain(foveate.VisionZip(keep=keep), foveate.VTW(layer=4)),
    }
    if companion is not None:
        found["cdpruner, tiny-clip"] = lambda keep: foveate.CDPruner(keep=keep, negate=False, **companion)
        found["recoverable, tiny-clip"] = lambda keep: foveate.Recoverable(keep=keep, **companion)
    return found


def counted_flops(eager: VLM, inputs: dict[str, Any], reducer: Reducer | None) -> float:
    """FLOPs of one whole prefill, as torch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if reducer is None:
            eager.model(**inputs)
        else:
            with foveate.apply(eager.model, reducer):
                eager.model(**inputs)
    return float(counter.get_total_flops())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:tiny-llava")
    parser.add_argument("--samples", type=int, default=400, help="questions, half of each data set")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    vlm, eager = load(arguments.model), load(arguments.model)
    eager.model.set_attn_implementation("eager")
    half = arguments.samples // 2
    data = {"easy-vqa": load_data("easy-vqa", half, 1), "scenes": load_data("scenes", half, 1)}
    probe = next(batches(eager, data["scenes"], 16)).inputs
    full_flops = counted_flops(eager, probe, None)
    contestants, ratios, refused = [], [1.0], {}
    for name, make in makers(vlm).items():
        for keep in BUDGETS:
            try:
                reducer = make(keep)
                ratios.append(counted_flops(eager, probe, reducer) / full_flops)
                contestants.append(Contestant(name, reducer, keep))
            except (foveate.OptionError, foveate.UnsupportedError) as error:
                refused[f"{name} at {keep}"] = str(error)
    rows = compare(vlm, data, contestants, batch_size=16, timing_batches=2, timing_repeats=3)
    result = {
        "model": arguments.model,
        "samples": arguments.samples,
        "seconds": time.monotonic() - start,
        "refused": refused,
        "rows": [{**row.to_json(), "flops_ratio_with_tower": ratio} for row, ratio in zip(rows, ratios, strict=True)],
    }
    for row in result["rows"]:
        parts = "  ".join(f"{name} {value:.3f}" for name, value in row["accuracy_by_data"].items())
        print(
            f"{row['method']:24s} keep {row['keep']:<5} accuracy {row['accuracy']:.3f}  {parts}  "
            f"agreement {row['agreement']:.3f}  entering {row['visual_tokens_entering']:6.1f}  "
            f"FLOPs with tower {row['flops_ratio_with_tower']:.3f}  prefill {row['prefill_ms'] or 0:.0f} ms"
        )
    print(json.dumps(refused, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
