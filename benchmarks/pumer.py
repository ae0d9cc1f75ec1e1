"""PuMer's throughput and memory against the same model with all its tokens, and against a plain SDPA ViLT.

Models: `zoo:tiny-vilt` (trained), a ViLT-B/32-shaped and a METER-shaped one at 384 pixels (random weights: speed only).
"meter-layers" is METER's six co-attention layers alone, its towers answered from memory. Texts have 40 tokens without
padding (tiny-vilt: 9). Process CPU time of one thread, runs interleaved in random order, medians of paired ratios;
FLOPs are counted while the model runs. Peaks are those of fresh processes: what a call adds to resident memory.

    python benchmarks/pumer.py --json benchmarks/results/pumer.json
    python benchmarks/pumer.py --models vilt-b32 --batches 8 --repeats 3 --no-memory
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    ViltConfig,
    ViltForImagesAndTextClassification,
    ViltForQuestionAnswering,
)

import foveate
from foveate import zoo
from foveate.models import MeterConfig, MeterForImagesAndTextClassification, MeterForQuestionAnswering

WORDS = 40
PRESETS = ("vqav2", "snli-ve", "nlvr2")
BATCHES = {"tiny-vilt": (8, 32, 128), "vilt-b32": (8, 32, 64), "meter-layers": (8, 16), "meter": (2,)}
"""The largest is the one that a thread here runs in reasonable time; memory would allow more."""
MEMORY_BATCHES = {"tiny-vilt": (8, 32, 256), "vilt-b32": (8, 32, 128), "meter-layers": (2, 8), "meter": ()}


@dataclass
class Case:
    """A model and a batch for it; `call` runs one forward."""

    model: nn.Module
    inputs: dict[str, Tensor]

    def call(self) -> Any:
        return self.model(**self.inputs)


class Answered(nn.Module):
    """Stands for a tower: answers every call with what the tower once said."""

    def __init__(self, states: Tensor, norm: nn.Module | None = None):
        super().__init__()
        self.post_layernorm = norm
        self._out = SimpleNamespace(last_hidden_state=states)

    def forward(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
        return self._out


def case(name: str, preset: str, batch: int, dtype: torch.dtype) -> Case:
    """A model by name, in the shape of the preset's task: "nlvr2" has two images."""
    torch.manual_seed(0)
    two = preset == "nlvr2" and name != "tiny-vilt"
    images = (batch, 2) if two else (batch,)
    pixels = torch.randn(*images, 3, 384, 384, dtype=dtype)
    words = {"input_ids": torch.randint(5, 1000, (batch, WORDS)), "attention_mask": torch.ones(batch, WORDS).long()}
    if name == "tiny-vilt":
        model = ViltForQuestionAnswering.from_pretrained(zoo.path("tiny-vilt"), dtype=dtype)
        words = {"input_ids": torch.randint(4, 60, (batch, 9)), "attention_mask": torch.ones(batch, 9).long()}
        pixels = torch.randn(batch, 3, 112, 112, dtype=dtype)
        words["pixel_mask"] = torch.ones(batch, 112, 112).long()
    elif name == "vilt-b32":
        config = ViltConfig(max_image_length=-1, num_images=2, modality_type_vocab_size=3 if two else 2, num_labels=100)
        config.max_position_embeddings = WORDS
        model = (ViltForImagesAndTextClassification if two else ViltForQuestionAnswering)(config).to(dtype)
        words["pixel_mask"] = torch.ones(*images, 384, 384).long()
    else:
        vision = CLIPVisionConfig(patch_size=16, image_size=384, num_hidden_layers=11)
        layers_only = name == "meter-layers"
        if layers_only:
            vision.num_hidden_layers = 1
        config = MeterConfig(
            vision_config=vision, text_config={"num_hidden_layers": 1} if layers_only else None,
            modality_type_vocab_size=3 if two else 2, num_labels=100,
        )  # fmt: skip
        model = (MeterForImagesAndTextClassification if two else MeterForQuestionAnswering)(config).to(dtype)
        if layers_only:
            base = model.meter
            base.text_model = Answered(torch.randn(batch, WORDS, 768, dtype=dtype))
            base.vision_model = Answered(torch.randn(batch, 577, 768, dtype=dtype), base.vision_model.post_layernorm)
    return Case(model.eval(), {**words, "pixel_values": pixels})


@contextmanager
def plain_sdpa(model: nn.Module) -> Iterator[None]:
    """ViLT's attention through SDPA, as one would write it today; nothing is padded here, so there is no mask."""

    def forward(module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        shape = (*hidden_states.shape[:2], -1, module.attention_head_size)
        q, k, v = (f(hidden_states).view(shape).transpose(1, 2) for f in (module.query, module.key, module.value))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return (out.transpose(1, 2).reshape(hidden_states.shape),)

    patched = [layer.attention.attention for layer in model.base_model.encoder.layer]
    for module in patched:
        module.__dict__["forward"] = lambda *args, m=module, **kwargs: forward(m, *args, **kwargs)
    try:
        yield
    finally:
        for module in patched:
            del module.__dict__["forward"]


def modes(one: Case, preset: str) -> dict[str, Callable[[], Any]]:
    """What is compared: context managers by name. METER's full model runs SDPA already."""
    found: dict[str, Callable[[], Any]] = {"full": nullcontext}
    if hasattr(one.model.base_model, "encoder"):
        found["sdpa"] = lambda: plain_sdpa(one.model)
    found["pumer"] = lambda: foveate.apply(one.model, foveate.PuMer(task=preset))
    return found


def cpu_seconds(run: Callable[[], Any]) -> float:
    gc.disable()
    start = time.process_time()
    run()
    seconds = time.process_time() - start
    gc.enable()
    return seconds


@torch.inference_mode()
def throughput(name: str, preset: str, batch: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    one = case(name, preset, batch, dtype)
    runs, flops, tokens = modes(one, preset), {}, []
    for mode, manager in runs.items():
        # The counter knows the products of the plain attention, not the fused kernel of CPUs.
        with manager() as session, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            one.call()
        flops[mode] = counter.get_total_flops()
        if mode == "pumer":
            tokens = session.trace.visual_tokens[0].tolist()
    times: dict[str, list[float]] = {mode: [] for mode in runs}
    for repeat in range(repeats + 1):
        order = list(runs)
        random.Random(repeat).shuffle(order)
        for mode in order:
            with runs[mode]():
                seconds = cpu_seconds(one.call)
            if repeat:
                times[mode].append(seconds)
    row = {"model": name, "preset": preset, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
    row |= {f"{mode}_per_second": batch / statistics.median(values) for mode, values in times.items()}
    row["flops_ratio"] = flops["full"] / flops["pumer"]
    for mode in runs:
        if mode != "pumer":
            row[f"speedup_over_{mode}"] = statistics.median(a / b for a, b in zip(times[mode], times["pumer"]))
    return {**row, "visual_tokens_entering": tokens, "repeats": repeats}


@torch.inference_mode()
def peak_megabytes(name: str, preset: str, batch: int, dtype: torch.dtype, mode: str) -> float:
    """Resident memory that one call adds at its peak, as the kernel counts it; for a fresh process."""
    one = case(name, preset, batch, dtype)
    small = {key: value[:1] for key, value in one.inputs.items()}
    with modes(one, preset)[mode]():
        if name != "meter-layers":
            one.model(**small)  # first-call costs are not the batch's
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far, that of loading, is forgotten
        before = _status("VmRSS")
        one.call()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """KiB, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Peaks of full and reduced runs by batch, each in its own process."""
    rows = []
    for name in arguments.models:
        for batch in (4,) if arguments.quick else MEMORY_BATCHES[name]:
            row: dict[str, Any] = {"model": name, "preset": arguments.presets[0], "batch": batch, "dtype": "float32"}
            for mode in ("full", "sdpa", "pumer") if "vilt" in name else ("full", "pumer"):
                command = [sys.executable, __file__, "--peak", name, row["preset"], str(batch), mode]
                row[f"{mode}_mb"] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            rows.append(row)
            shown = [f"{value:.0f}" if isinstance(value, float) else str(value) for value in row.values()]
            print("peak    " + "  ".join(shown), flush=True)
    return rows


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, 1 thread, torch {torch.__version__}, transformers {transformers.__version__}, {platform.system()}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(BATCHES), default=list(BATCHES))
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--batches", nargs="+", type=int, help="instead of each model's own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="batch 2, one repeat, without METER's towers")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = _options()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.peak:
        name, preset, batch, mode = arguments.peak
        print(peak_megabytes(name, preset, int(batch), torch.float32, mode))
        return
    if arguments.quick:
        arguments.repeats = 1
        arguments.models = [name for name in arguments.models if name != "meter"]
    result: dict[str, Any] = {"machine": machine(), "repeats": arguments.repeats, "throughput": [], "memory": []}
    for name in arguments.models:
        for preset in arguments.presets:
            for batch in arguments.batches or ((2,) if arguments.quick else BATCHES[name]):
                row = throughput(name, preset, batch, getattr(torch, arguments.dtype), arguments.repeats)
                result["throughput"].append(row)
                shown = {key: f"{value:.2f}" if isinstance(value, float) else value for key, value in row.items()}
                print("  ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
    if arguments.memory:
        result["memory"] = memory(arguments)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
