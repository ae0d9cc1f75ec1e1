"""What choosing costs: time, kernels, waits, memory of every selector, and reach, how near it comes to a short prompt.

"Selector" is all that a method adds to a plain run: what it reads in the vision tower and in the decoder, laying that
onto the slots of the prompt, and its decisions. It is timed where it happens, in prefills that are left as soon as the
method has decided for the last time, and given as a share of the unreduced prefill of the decoder. "Reach", for methods
before the decoder: the plain decoder on a physically shorter prompt against everything the reduction takes, selector
included, and without the selector (the engine alone).

A LLaVA (576 visual tokens) and a LLaVA-NeXT (2,880 in five tiles, and 48 row ends) with random weights: the last two
layers of a tower as wide as CLIP-L, a decoder of 16 layers of width 1024. ToMe and PiToMe inside the tower: all 24
layers. Process CPU time of one thread, runs interleaved in random order, medians. Random weights measure speed, never
accuracy.

    python benchmarks/selection.py --json benchmarks/results/selection.json
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch.profiler import ProfilerActivity, profile

import foveate
from foveate.engine.decoder.forward_pass import ForwardPass
from foveate.engine.families.parts import resolve
from foveate.engine.layout import build_layout
from foveate.engine.vision.merging import TowerReduction
from foveate.engine.vision.reader import VisionReader
from foveate.ops.attention import attention_received, attention_rows
from foveate.reduction import BEFORE_LAYERS, Patches, Reducer, View, bind
from speed import machine

IMAGE, PREFIX, TEXT = 900, 20, 44

ADDED = {
    VisionReader: ("_attending", "_leaving", "patches", "projector"),
    ForwardPass: ("listen",),
    TowerReduction: ("_begin", "_enter", "_attending", "_before_mlp", "_after_mlp", "_leave", "_done", "groups"),
}
"""Engine methods that run for a method's sake alone."""


@dataclass(frozen=True)
class Size:
    """A model and its image.

    Attributes:
        keep: visual tokens that stay.
        tiles: squares of 24 x 24 patches that the tower is shown.
        newlines: learnt row ends.
    """

    keep: int
    tiles: int = 1
    newlines: int = 0

    @property
    def visual(self) -> int:
        return 576 * self.tiles + self.newlines


SIZES = {"576": Size(192), "2880": Size(640, tiles=5, newlines=48)}
LONG = {"4624": 68, "16384": 128}
"""Side of one image."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def cases(size: Size, layers: int) -> dict[str, Reducer]:
    """Methods by name."""
    keep = size.keep
    return {
        "random": foveate.Random(keep=keep),
        "vtw": foveate.VTW(layer=layers // 2),
        "fastv": foveate.FastV(keep=keep),
        "pyramiddrop": foveate.PyramidDrop(keep=keep),
        "dart": foveate.DART(keep=keep),
        "sparsevlm": foveate.SparseVLM(keep=keep),
        "averagepool": foveate.AveragePool(keep=keep),
        "divprune": foveate.DivPrune(keep=keep),
        "cdpruner, llm": foveate.CDPruner(keep=keep),
        "fopru": foveate.FoPru(keep=keep),
        "prumerge": foveate.PruMerge(keep=keep),
        "prumerge+": foveate.PruMergePlus(keep=keep),
        "visionzip": foveate.VisionZip(keep=keep),
        "vispruner": foveate.VisPruner(keep=keep),
        "recoverable, llm": foveate.Recoverable(keep=keep),
        "tome, output": foveate.ToMe(keep=keep, where="output"),
        "pitome, output": foveate.PiToMe(keep=keep, where="output"),
    }


BEFORE = (
    "random", "averagepool", "divprune", "cdpruner, llm", "fopru", "prumerge", "prumerge+", "visionzip", "vispruner",
    "recoverable, llm", "tome, output", "pitome, output",
)  # fmt: skip
"""Methods that are done before decoder layer 0."""
INSIDE = ("vtw", "fastv", "pyramiddrop", "dart", "sparsevlm")
PARTS = ("selectors", "reach", "memory", "tower", "long", "launches")


# -------------------------------------------------------------------------------------------------------- the models
@functools.cache
def model_of(name: str, layers: int) -> Any:
    """A LLaVA or LLaVA-NeXT with random weights."""
    torch.manual_seed(0)
    text = hf.LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=1000, max_position_embeddings=4096,
    )  # fmt: skip
    tower = hf.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    options = {"vision_config": tower, "text_config": text, "image_token_index": IMAGE, "image_seq_length": 576}
    if SIZES[name].tiles == 1:
        return hf.LlavaForConditionalGeneration(hf.LlavaConfig(**options)).eval()
    config = hf.LlavaNextConfig(**options, image_grid_pinpoints=[[672, 672]])
    return hf.LlavaNextForConditionalGeneration(config).eval()


def prompt_of(name: str) -> dict[str, torch.Tensor]:
    """Words, an image, words."""
    size, generator = SIZES[name], torch.Generator().manual_seed(1)
    words = torch.randint(3, IMAGE, (PREFIX + TEXT,), generator=generator).tolist()
    ids = [*words[:PREFIX], *[IMAGE] * size.visual, *words[PREFIX:]]
    pixels = torch.randn(size.tiles, 3, 336, 336, generator=generator)
    found = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if size.tiles == 1:
        return {**found, "pixel_values": pixels}
    return {**found, "pixel_values": pixels[None], "image_sizes": torch.tensor([[672, 672]])}


# --------------------------------------------------------------------------------------------------------- measuring
class _Decided(Exception):
    """Nothing more is measured in this prefill."""


@dataclass
class Clock:
    """CPU seconds of one run."""

    total: float = 0.0
    tower: float = 0.0
    selector: float = 0.0
    in_tower: float = 0.0
    """What of the selector ran while the tower did."""
    parts: dict[str, float] = field(default_factory=dict)
    tower_runs: bool = False
    decisions: int = 0

    @property
    def decoder(self) -> float:
        """All but the plain tower."""
        return self.total - self.tower + self.in_tower


def _timed(function: Callable, clock: Clock, name: str) -> Callable:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds = time.process_time() - start
            clock.selector += seconds
            clock.parts[name] = clock.parts.get(name, 0.0) + seconds
            clock.in_tower += seconds * clock.tower_runs
            clock.decisions += name == "decide"

    return run


@contextmanager
def watched(clock: Clock, reducer: Reducer | None = None) -> Iterator[None]:
    """Time all that runs for a method's sake."""
    parts = ADDED if reducer is None else {**ADDED, type(reducer): ("decide",)}
    originals = [(cls, name, getattr(cls, name)) for cls, names in parts.items() for name in names]
    for cls, name, function in originals:
        setattr(cls, name, _timed(function, clock, name.strip("_")))
    try:
        yield
    finally:
        for cls, name, function in originals:
            setattr(cls, name, function)


def prefill(model: Any, prompt: dict[str, torch.Tensor], clock: Clock) -> None:
    """One run. The projector counts as a part of the tower: a shorter prompt is handed projected tokens, too."""
    started: list[float] = []

    def begins(*_: Any) -> None:
        started.append(time.process_time())
        clock.tower_runs = True

    def ends(*_: Any) -> None:
        if clock.tower_runs:  # merging methods project once more, later
            clock.tower_runs = False
            clock.tower += time.process_time() - started.pop()

    # First in, last out, so that the tower's time has the selector's share in it, too.
    hooks = [
        model.model.vision_tower.register_forward_pre_hook(begins, prepend=True),
        model.model.multi_modal_projector.register_forward_hook(ends),
    ]
    gc.disable()
    start = time.process_time()
    with suppress(_Decided):
        model(**prompt, use_cache=True, logits_to_keep=1)
    clock.total = time.process_time() - start
    gc.enable()
    for hook in hooks:
        hook.remove()


def full(model: Any, prompt: dict[str, torch.Tensor]) -> float:
    """CPU seconds of the unreduced decoder."""
    clock = Clock()
    prefill(model, prompt, clock)
    return clock.decoder


def select(model: Any, prompt: dict[str, torch.Tensor], reducer: Reducer) -> Clock:
    """A prefill up to the last decision."""
    clock = Clock()
    with watched(clock, reducer), foveate.apply(model, reducer) as session:

        def leave(*_: Any) -> None:
            if clock.decisions == len(session.reducer.stages):
                raise _Decided

        hooks = [layer.register_forward_pre_hook(leave) for layer in model.model.language_model.layers]
        prefill(model, prompt, clock)
        for hook in hooks:
            hook.remove()
    assert clock.decisions == len(session.reducer.stages)
    return clock


def shorter(model: Any, length: int) -> float:
    """CPU seconds of the plain decoder on a prompt of `length` tokens."""
    embeds = 0.02 * torch.randn(1, length, 1024, generator=torch.Generator().manual_seed(2))
    start = time.process_time()
    model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
    return time.process_time() - start


def _shuffled(names: Iterable[str], seed: int) -> list[str]:
    order = list(names)
    random.Random(seed).shuffle(order)
    return order


@torch.inference_mode()
def selectors(name: str, layers: int, repeats: int, only: list[str]) -> dict[str, Any]:
    """Every method, `repeats` times, a full run before each round."""
    model, prompt = model_of(name, layers), prompt_of(name)
    methods = {n: m for n, m in cases(SIZES[name], layers).items() if not only or n in only}
    clocks: dict[str, list[Clock]] = {method: [] for method in methods}
    plain = []
    for repeat in range(repeats):
        plain.append(full(model, prompt))
        for method in _shuffled(methods, repeat):
            clocks[method].append(select(model, prompt, methods[method]))
    rows = {}
    for method, found in clocks.items():
        share = statistics.median(clock.selector / whole for clock, whole in zip(found, plain))
        parts = {p: 1e3 * statistics.median(c.parts.get(p, 0.0) for c in found) for p in found[0].parts}
        rows[method] = {"ms": 1e3 * statistics.median(c.selector for c in found), "share": share, "parts_ms": parts}
        dearest = ", ".join(f"{p} {ms:.1f}" for p, ms in sorted(parts.items(), key=lambda item: -item[1])[:3])
        print(f"{name:>5} {method:18s} {rows[method]['ms']:7.1f} ms  {100 * share:5.2f} %  ({dearest})", flush=True)
    return {"prefill_ms": 1e3 * statistics.median(plain), "rows": rows}


@torch.inference_mode()
def reach(name: str, layers: int, repeats: int, only: list[str]) -> dict[str, Any]:
    """Methods before the decoder against the plain decoder on a shorter prompt."""
    size, model, prompt = SIZES[name], model_of(name, layers), prompt_of(name)
    methods = {n: m for n, m in cases(size, layers).items() if n in (only or BEFORE) and n in BEFORE}
    found: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
    for repeat in range(repeats):
        for method in _shuffled(methods, repeat):
            clock = Clock()
            with watched(clock, methods[method]), foveate.apply(model, methods[method]) as session:
                prefill(model, prompt, clock)
            assert session.trace is not None
            ceiling = shorter(model, int(session.trace.visual_tokens[0, 0]) + PREFIX + TEXT)
            found[method].append((ceiling / clock.decoder, ceiling / (clock.decoder - clock.selector)))
    rows = {}
    for method, pairs in found.items():
        whole, engine = (statistics.median(values) for values in zip(*pairs))
        rows[method] = {"reach": whole, "reach_engine": engine}
        print(f"{name:>5} {method:18s} reach {whole:.3f}, engine alone {engine:.3f}", flush=True)
    return rows


@torch.inference_mode()
def towers(repeats: int) -> dict[str, Any]:
    """ToMe and PiToMe in all 24 layers of a tower like CLIP-L: its time, and the merging's share of the plain one's."""
    torch.manual_seed(0)
    config = hf.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    tower, pixels = hf.CLIPVisionModel(config).eval(), torch.randn(1, 3, 336, 336)
    methods = {
        "tome": foveate.ToMe(keep=192),
        "pitome": foveate.PiToMe(keep=192),
        "downsample": foveate.Downsample(192),
    }
    found: dict[str, list[tuple[float, float]]] = {method: [] for method in methods}
    for repeat in range(repeats):
        start = time.process_time()
        tower(pixels)
        plain = time.process_time() - start
        for method in _shuffled(methods, repeat):
            clock = Clock()
            with watched(clock), foveate.apply(tower, methods[method]):
                start = time.process_time()
                tower(pixels)
                found[method].append(((time.process_time() - start) / plain, clock.selector / plain))
    rows = {}
    for method, pairs in found.items():
        whole, merging = (statistics.median(values) for values in zip(*pairs))
        rows[method] = {"tower_ratio": whole, "merging_share": merging}
        print(f"tower {method:18s} {whole:.2f} of the plain tower's time, merging {100 * merging:.1f} %", flush=True)
    return rows


# ------------------------------------------------------------------------------------------- one long image, no tower
WIDTH, HEADS = 1024, 16


def decoder_of(layers: int, dtype: torch.dtype) -> Any:
    """A decoder of the size of the others, fed with states."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, vocab_size=1000, max_position_embeddings=32768,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval().to(dtype)


def _draw(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Vectors around 200 centres, as patches of an image are alike in groups."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(200, shape[-1], generator=generator)
    group = torch.randint(200, shape[:-1], generator=generator)
    return (centres[group] + 0.7 * torch.randn(*shape, generator=generator)).to(dtype)


@torch.inference_mode()
def outside(side: int, reducer: Reducer, dtype: torch.dtype) -> tuple[float, int]:
    """CPU seconds of a method before the decoder, and the bytes that it held at its peak; see the top."""
    tokens, words = side * side, PREFIX + TEXT
    anatomy = resolve(model_of("576", 1))
    method = bind(reducer, anatomy)
    visual = torch.zeros(1, tokens + words, dtype=torch.bool)
    visual[:, PREFIX : PREFIX + tokens] = True
    hidden = torch.cat([_draw(dtype, 1, words, WIDTH, seed=1), _draw(dtype, 1, tokens, WIDTH)], 1)
    hidden = torch.cat([hidden[:, :PREFIX], hidden[:, words:], hidden[:, PREFIX:words]], 1)
    info = {"image_features": [hidden[0, :tokens]], "pixel_values": torch.zeros(1, 3, 8, 8)}
    query, key = (_draw(dtype, 1, HEADS, tokens + 1, WIDTH // HEADS, seed=seed) for seed in (2, 3))
    features = _draw(dtype, 1, tokens, WIDTH, seed=4)
    slots = PREFIX + torch.arange(tokens)[None]
    rows, grid = torch.zeros(1, dtype=torch.long), torch.full((1, 2), side)

    def choose() -> None:
        vision = {}
        for layer, spec in method.vision_taps.items():
            attention = None
            if spec.attention == "received":
                attention = attention_received(query, key, 0.125)[..., 1:]
            elif spec.attention:
                attention = attention_rows(query, key, rows[:, None], None, None, 0.125, None)[:, :, 0, 1:]
            read = {
                "key": key[:, :, 1:].transpose(1, 2),
                "query": query[:, :, 1:].transpose(1, 2),
                "features": features,
            }
            read = {name: value for name, value in read.items() if getattr(spec, name)}
            vision[layer] = Patches(rows, slots, grid, attention, **read, complete=True)
        everything = torch.ones_like(visual)
        layout = build_layout(anatomy, visual, info)
        method.decide(View(BEFORE_LAYERS, hidden, everything, visual, everything, vision=vision, layout=layout))

    gc.collect()
    start = time.process_time()
    choose()
    seconds = time.process_time() - start
    return seconds, held_by(choose)


def held_by(run: Callable[[], Any]) -> int:
    """Most bytes that were allocated at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@torch.inference_mode()
def inside(side: int, reducer: Reducer, decoder: Any) -> float:
    """CPU seconds that a method takes inside a decoder."""
    tokens = side * side
    visual = torch.zeros(1, tokens + PREFIX + TEXT, dtype=torch.bool)
    visual[:, PREFIX : PREFIX + tokens] = True
    embeds, clock = _draw(decoder.dtype, *visual.shape, WIDTH), Clock()
    with watched(clock, reducer), foveate.apply(decoder, reducer, visual=visual):
        decoder(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
    return clock.selector


@torch.inference_mode()
def long(name: str, repeats: int, only: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """Every method on one long image."""
    side, rows = LONG[name], {}
    tokens = side * side
    one = decoder_of(1, dtype)
    embeds = _draw(dtype, 1, tokens + PREFIX + TEXT, WIDTH)
    start = time.process_time()
    one(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
    whole = 16 * (time.process_time() - start)
    print(f"{name:>5} unreduced decoder {whole:.1f} s (one layer, times 16), {dtype}".replace("torch.", ""), flush=True)
    methods = cases(Size(tokens // 5), 4)
    decoder = decoder_of(4, dtype) if not only or set(only) & set(INSIDE) else None
    for method, reducer in methods.items():
        if only and method not in only:
            continue
        held = 0
        if method in INSIDE:
            seconds = inside(side, reducer, decoder)
        else:
            found = [outside(side, reducer, dtype) for _ in range(repeats)]
            seconds, held = statistics.median(s for s, _ in found), found[0][1]
        rows[method] = {"ms": 1e3 * seconds, "share": seconds / whole, "held_mb": held / 2**20}
        peak = f", holds {held / 2**20:.0f} MB" if held else ""
        print(f"{name:>5} {method:18s} {1e3 * seconds:8.1f} ms  {100 * seconds / whole:5.2f} %{peak}", flush=True)
    return {"prefill_ms": 1e3 * whole, "rows": rows}


# ----------------------------------------------------------------------------------------------- kernels and waits
def launches(only: list[str]) -> dict[str, Any]:
    """Kernels and waits of every method at 576 tokens."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.launching import METHODS, on_pretended_device

    rows = {}
    for method, make in METHODS.items():
        if only and method not in only:
            continue
        found = on_pretended_device(make())
        rows[method] = {"kernels": found.kernels.total(), "waits": found.waits.total()}
        print(f"  576 {method:18s} {rows[method]['kernels']:5d} kernels, {rows[method]['waits']} waits", flush=True)
    return rows


# ------------------------------------------------------------------------------------------------------- peak memory
@torch.inference_mode()
def peak_megabytes(name: str, layers: int, method: str) -> float:
    """Peak RSS of this process after one prefill; "full": not reduced."""
    model, prompt = model_of(name, layers), prompt_of(name)
    shorter(model, 8)
    if method == "full":
        model(**prompt, use_cache=True, logits_to_keep=1)
    else:
        with foveate.apply(model, cases(SIZES[name], layers)[method]):
            model(**prompt, use_cache=True, logits_to_keep=1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peaks(name: str, layers: int, only: list[str]) -> dict[str, float]:
    """Peak RSS of a fresh process for each method."""
    found = {}
    for method in ["full", *(m for m in cases(SIZES[name], layers) if not only or m in only)]:
        command = [sys.executable, __file__, "--layers", str(layers), "--sizes", name, "--peak", method]
        found[method] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"{name:>5} {method:18s} peak {found[method]:.0f} MB, x{found[method] / found['full']:.3f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--methods", nargs="+", default=[], help="only these")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--layers", type=int, default=16, help="of the decoder")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--long", nargs="+", choices=list(LONG), default=list(LONG), help="tokens of the long image")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the long images")
    parser.add_argument("--quick", action="store_true", help="576 tokens, four decoder layers, one repeat, no memory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        print(peak_megabytes(arguments.sizes[0], arguments.layers, arguments.peak))
        return
    if arguments.quick:
        arguments.sizes, arguments.layers, arguments.repeats = ["576"], 4, 1
        arguments.parts = ["selectors", "reach", "tower"]
    result: dict[str, Any] = {"machine": machine(), "layers": arguments.layers, "repeats": arguments.repeats}
    for name in arguments.sizes if set(arguments.parts) & {"selectors", "reach", "memory"} else ():
        found = result.setdefault(name, {})
        if "selectors" in arguments.parts:
            found["selectors"] = selectors(name, arguments.layers, arguments.repeats, arguments.methods)
            print(f"{name:>5} unreduced decoder {found['selectors']['prefill_ms']:.0f} ms", flush=True)
        if "reach" in arguments.parts:
            found["reach"] = reach(name, arguments.layers, arguments.repeats, arguments.methods)
        if "memory" in arguments.parts:
            found["peak_mb"] = peaks(name, arguments.layers, arguments.methods)
    if "tower" in arguments.parts:
        result["tower"] = towers(arguments.repeats)
    for name in arguments.long if "long" in arguments.parts else ():
        result.setdefault("long", {})[name] = long(name, arguments.repeats, arguments.methods, DTYPES[arguments.dtype])
    if "launches" in arguments.parts:
        result["launches"] = launches(arguments.methods)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
