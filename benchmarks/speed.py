"""What the engine costs: every reduction against the fastest run that its token counts allow.

The ceiling ("reachable") is not the FLOPs ratio, since short sequences run at lower efficiency, but the unpatched
layers on a physically shorter sequence: for removal before layer 0 the unpatched model on the shorter prompt, for
removal inside the decoder a hand-written loop over its layers that cuts the hidden states. Random weights: this
measures speed, never accuracy. Process CPU time of one thread, runs interleaved in random order, medians of paired
ratios.

Parts: `reach` (prefill against the ceiling), `decode` (a token, big layers), `fixed` (what the engine costs a layer,
where layers are so small that nothing else is seen: hidden size 64, 24 layers), `training` (a step with a vocabulary of
32,000: its time, and the bytes saved for the backward pass), `memory` (peak RSS of a prefill, one process each).

    python benchmarks/speed.py --repeats 12 --dtype bfloat16 --json benchmarks/results/speed.json
    PYTHONPATH=../before/src python benchmarks/speed.py    # another checkout, for a comparison
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import foveate
from foveate.engine.compat import CACHE_NAME, returned_cache

VISUAL, TEXT, PREFIX = 576, 64, 20
LENGTH = VISUAL + TEXT
PARTS = ("reach", "decode", "fixed", "training", "memory")


class Fixed(foveate.Reducer):
    """Keeps `count` evenly spaced visual tokens after `stage`: an engine without a method."""

    def __init__(self, stage: int, count: int):
        self.stages, self.count = (stage,), count

    def decide(self, view: foveate.View) -> foveate.Decision:
        slots = view.visual[0].nonzero()[:, 0]
        keep = ~view.visual
        keep[:, slots[torch.linspace(0, len(slots) - 1, self.count).long()]] = True
        return foveate.Decision(keep=keep)


def cases() -> dict[str, foveate.Reducer]:
    """What is measured, by name."""
    return {
        "nothing removed": Fixed(-1, VISUAL),
        "fixed, before layer 0, 64": Fixed(-1, 64),
        "fixed, before layer 0, 144": Fixed(-1, 144),
        "fixed, after layer 1, 64": Fixed(1, 64),
        "fixed, after layer 1, 144": Fixed(1, 144),
        "random, before layer 0, 64": foveate.Random(keep=64),
        "fastv, after layer 1, 64": foveate.FastV(keep=64),
        "fastv, after layer 1, 144": foveate.FastV(keep=144),
        "sparsevlm, layer average 128": foveate.SparseVLM(keep=128),
        "sparsevlm, layer average 192": foveate.SparseVLM(keep=192),
        "vtw, layer 8": foveate.VTW(layer=8),
    }


def decoder(layers: int, dtype: torch.dtype = torch.float32, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "vocab_size": 1000, **options}
    sizes |= {"num_hidden_layers": layers, "num_key_value_heads": sizes["num_attention_heads"]}
    config = LlamaConfig(max_position_embeddings=4096, **sizes)
    return LlamaForCausalLM(config).eval().to(dtype)


def prompt(model: LlamaForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (1, S, D) and visual slots (1, S)."""
    embeds = torch.randn(1, LENGTH, model.config.hidden_size, generator=torch.Generator().manual_seed(1)) * 0.02
    embeds = embeds.to(model.dtype)
    visual = torch.zeros(1, LENGTH, dtype=torch.bool)
    visual[:, PREFIX : PREFIX + VISUAL] = True
    return embeds, visual


def cpu_seconds(run: Callable[[], Any]) -> float:
    gc.disable()
    start = time.process_time()
    run()
    seconds = time.process_time() - start
    gc.enable()
    return seconds


def hand_loop(model: LlamaForCausalLM, embeds: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The unpatched layers on sequences cut to `lengths` tokens: what a fork written for one model would do."""
    decoder, cache = model.model, DynamicCache(config=model.config)
    hidden = embeds[:, : lengths[0]]
    positions = torch.arange(lengths[0])[None]
    rope = decoder.rotary_emb(hidden, positions)
    for layer, length in zip(decoder.layers, lengths):
        if length != hidden.shape[1]:
            index = torch.arange(length)  # a gather, as any selection needs
            hidden, rope = hidden.index_select(1, index), tuple(part.index_select(1, index) for part in rope)
        hidden = layer(hidden, position_embeddings=rope, use_cache=True, **{CACHE_NAME: cache})
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return model.lm_head(decoder.norm(hidden)[:, -1:])


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[Any]]:
    """Results of every run, in random order within a round; the first round warms up."""
    found: dict[str, list[Any]] = {key: [] for key in runs}
    for repeat in range(repeats + 1):
        for key in random.Random(repeat).sample(list(runs), len(runs)):
            result = runs[key]()
            if repeat:
                found[key].append(result)
    return found


def measure_reach(model: LlamaForCausalLM, repeats: int) -> dict[str, Any]:
    """Prefills against their ceilings."""
    embeds, visual = prompt(model)

    def full(inputs: torch.Tensor = embeds) -> Any:
        return model(inputs_embeds=inputs, use_cache=True, logits_to_keep=1)

    def patched(reducer: foveate.Reducer) -> float:
        with foveate.apply(model, reducer, visual=visual):
            return cpu_seconds(full)

    rows = {}
    with torch.inference_mode():
        for name, reducer in cases().items():
            with foveate.apply(model, reducer, visual=visual) as session:
                full()
            lengths = (session.trace.visual_tokens[0] + TEXT).tolist()
            if len(set(lengths)) == 1:
                ceiling = lambda n=lengths[0]: full(embeds[:, :n])  # noqa: E731
            else:
                ceiling = lambda counts=lengths: hand_loop(model, embeds, counts)  # noqa: E731
            runs = {"full": lambda: cpu_seconds(full), "ceiling": lambda c=ceiling: cpu_seconds(c)}
            runs["reduced"] = lambda r=reducer: patched(r)
            times = interleaved(runs, repeats)
            rows[name] = {
                "entering": sum(lengths) / len(lengths) - TEXT,
                "full_ms": 1e3 * min(times["full"]),
                "ceiling_ms": 1e3 * min(times["ceiling"]),
                "reduced_ms": 1e3 * min(times["reduced"]),
                "reach_min": min(times["ceiling"]) / min(times["reduced"]),
                "reach_median": statistics.median(c / r for c, r in zip(times["ceiling"], times["reduced"])),
                "speedup_median": statistics.median(f / r for f, r in zip(times["full"], times["reduced"])),
            }
            print(f"{name:32s} " + "  ".join(f"{k} {v:.3f}" for k, v in rows[name].items()), flush=True)
    return rows


def measure_decode(model: LlamaForCausalLM, repeats: int) -> dict[str, float]:
    """Per-token decode: hooks with nothing removed against the unpatched model; 64 kept against a short prompt."""
    embeds, visual = prompt(model)

    def decode(inputs: torch.Tensor, steps: int = 8) -> float:
        cache = returned_cache(model(inputs_embeds=inputs, use_cache=True, logits_to_keep=1))
        token = torch.zeros(1, 1, dtype=torch.long)

        def run() -> None:
            for _ in range(steps):
                model(input_ids=token, use_cache=True, **{CACHE_NAME: cache})

        return cpu_seconds(run) / steps

    def reduced(reducer: foveate.Reducer) -> float:
        with foveate.apply(model, reducer, visual=visual):
            return decode(embeds)

    with torch.inference_mode():
        runs = {
            "full": lambda: decode(embeds),
            "nothing removed": lambda: reduced(Fixed(-1, VISUAL)),
            "short prompt": lambda: decode(embeds[:, : 64 + TEXT]),
            "64 kept": lambda: reduced(Fixed(-1, 64)),
            "64 kept after layer 1": lambda: reduced(Fixed(1, 64)),
        }
        times = interleaved(runs, repeats)
    paired = lambda a, b: statistics.median(x / y for x, y in zip(times[a], times[b]))  # noqa: E731
    out = {f"{key}, ms per token": 1e3 * statistics.median(values) for key, values in times.items()}
    out["nothing removed / full"] = paired("nothing removed", "full")
    out["64 kept / short prompt"] = paired("64 kept", "short prompt")
    out["64 kept / full"] = paired("64 kept", "full")
    print(json.dumps(out, indent=1), flush=True)
    return out


def measure_fixed(repeats: int) -> dict[str, float]:
    """Microseconds a layer above the plain model on the physically shorter prompt: of a prefill, and of a token."""
    model, steps = decoder(24, hidden_size=64, intermediate_size=128, num_attention_heads=4), 16
    embeds, visual = prompt(model)
    token = torch.zeros(1, 1, dtype=torch.long)

    def run(inputs: torch.Tensor) -> tuple[float, float]:
        found: list[Any] = []
        prefill = cpu_seconds(lambda: found.append(model(inputs_embeds=inputs, use_cache=True, logits_to_keep=1)))
        cache = {CACHE_NAME: returned_cache(found[0])}
        model(input_ids=token, use_cache=True, **cache)
        decode = cpu_seconds(lambda: [model(input_ids=token, use_cache=True, **cache) for _ in range(steps)])
        return prefill, decode / steps

    def reduced(reducer: foveate.Reducer) -> tuple[float, float]:
        with foveate.apply(model, reducer, visual=visual):
            model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
            return run(embeds)

    with torch.inference_mode():
        times = interleaved(
            {
                "short": lambda: run(embeds[:, : 64 + TEXT]),
                "before layer 0": lambda: reduced(Fixed(-1, 64)),
                "full": lambda: run(embeds),
                "nothing removed": lambda: reduced(Fixed(-1, VISUAL)),
            },
            repeats,
        )
    out = {}
    for ours, theirs in (("before layer 0", "short"), ("nothing removed", "full")):
        for number, part in enumerate(("prefill", "token")):
            added = statistics.median(a[number] - b[number] for a, b in zip(times[ours], times[theirs]))
            out[f"{ours}, us per layer and {part}"] = 1e6 * added / 24
    print(json.dumps(out, indent=1), flush=True)
    return out


def measure_training(repeats: int) -> dict[str, float]:
    """A training step of two samples, 64 of 576 visual tokens kept: seconds, and bytes saved for the backward pass."""
    model = decoder(4, hidden_size=512, intermediate_size=1408, num_attention_heads=8, vocab_size=32000).train()
    embeds, visual = prompt(model)
    embeds = embeds.repeat(2, 1, 1)
    labels = torch.full((2, LENGTH), -100)
    labels[:, -32:] = 7
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def step(keep: int | None, inputs: torch.Tensor) -> tuple[float, int]:
        saved: dict[int, int] = {}

        def seen(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        def run() -> None:
            with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
                loss = model(inputs_embeds=inputs, labels=labels[:, -inputs.shape[1] :], use_cache=False).loss
            loss.backward()

        model.zero_grad(set_to_none=True)
        if keep is None:
            return cpu_seconds(run), sum(saved.values())
        with foveate.apply(model, Fixed(-1, keep), visual=visual.repeat(2, 1)):
            return cpu_seconds(run), sum(saved.values())

    found = interleaved(
        {
            "full": lambda: step(None, embeds),
            "short": lambda: step(None, embeds[:, : 64 + TEXT]),
            "64 kept": lambda: step(64, embeds),
        },
        repeats,
    )
    paired = lambda a, b: statistics.median(x[0] / y[0] for x, y in zip(found[a], found[b]))  # noqa: E731
    out = {f"{key}, seconds": statistics.median(x[0] for x in values) for key, values in found.items()}
    out |= {f"{key}, MB saved": values[0][1] / 2**20 for key, values in found.items()}
    out |= {"speed-up": paired("full", "64 kept"), "speed-up, short prompt": paired("full", "short")}
    out |= {"reach": paired("short", "64 kept"), "saved / short": found["64 kept"][0][1] / found["short"][0][1]}
    print(json.dumps(out, indent=1), flush=True)
    return out


def peak_megabytes(layers: int, name: str) -> float:
    """Peak RSS of a fresh process that prefills once, reduced by `name` ("full": not at all)."""
    model = decoder(layers)
    embeds, visual = prompt(model)
    with torch.inference_mode():
        model(inputs_embeds=embeds[:, :8], logits_to_keep=1)
        if name == "full":
            model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
        else:
            with foveate.apply(model, cases()[name], visual=visual):
                model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, 1 thread, torch {torch.__version__}, transformers {transformers.__version__}, {platform.system()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of reach and decode")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        print(peak_megabytes(arguments.layers, arguments.peak))
        return
    result: dict[str, Any] = {"machine": machine(), **vars(arguments), "json": None}
    model = functools.cache(lambda: decoder(arguments.layers, getattr(torch, arguments.dtype)))
    if "reach" in arguments.parts:
        result["reach"] = measure_reach(model(), arguments.repeats)
    if "decode" in arguments.parts:
        result["decode"] = measure_decode(model(), arguments.repeats)
    if "fixed" in arguments.parts:
        result["fixed"] = measure_fixed(3 * arguments.repeats)
    if "training" in arguments.parts:
        result["training"] = measure_training(max(1, arguments.repeats // 2))
    if "memory" in arguments.parts:
        result["peak_mb"] = {}
        for name in ("full", *cases()):
            command = [sys.executable, __file__, "--layers", str(arguments.layers), "--peak", name]
            result["peak_mb"][name] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            print(f"peak {name}: {result['peak_mb'][name]:.0f} MB", flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
