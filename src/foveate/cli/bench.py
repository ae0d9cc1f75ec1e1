"""`foveate bench`: where the time of an answer goes, with and without reduction, measured on this machine."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import foveate

from .shell import (
    CommandError,
    JsonOption,
    OptionsOption,
    RecipeOption,
    method_and_options,
    progress,
    say,
    table,
    writable,
    write_json,
)

__all__ = ["bench"]

_GIGA, _MEGA = 1e9, 1e6
_TIMES = ("vision", "reduce", "decoder", "prefill", "decode", "total", "prefill_cpu", "total_cpu")
_RANDOM = "random weights: these numbers are speed and memory, never accuracy"


def bench(
    model: Annotated[
        str | None, typer.Argument(help="A Hub id, a local folder, or zoo:NAME (shipped in the package).")
    ] = None,
    geometry: Annotated[
        str | None,
        typer.Option("--geometry", "-g", metavar="PRESET", help="Instead of MODEL: random weights of a real size."),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers of --geometry; all by default.")] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", "-m", metavar="M[,...]", help="Names from `foveate methods`; default sparsevlm."),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            "--keep", "-k", metavar="N|F[,...]", help="Visual tokens per image (192) or their fraction (0.33)."
        ),
    ] = None,
    option: OptionsOption = None,
    recipe: RecipeOption = None,
    image: Annotated[
        Path | None, typer.Option("--image", "-i", help="Image to ask about; a drawn scene by default.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Prompts at once.")] = 1,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens of the prompt besides the image.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of every answer.")] = 16,
    repeats: Annotated[int, typer.Option("--repeats", "-r", min=1, help="Counted rounds.")] = 5,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
    counted_flops: Annotated[
        bool, typer.Option("--counted-flops", help="Also let torch count the FLOPs (eager attention).")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Measure vision, reduce, prefill and decode time, FLOPs, KV cache and peak memory against the unreduced model.

    Several methods and budgets, separated by commas, take turns in one run.

    Example: foveate bench zoo:tiny-llava --method fastv,sparsevlm --keep 0.33

    Example: foveate bench --geometry llava-1.5-7b --layers 4 --method fastv --keep 144
    """
    from ..evaluate.answer import check_device

    if (model is None) == (geometry is None):
        raise CommandError("bench: give either MODEL or --geometry PRESET")
    if layers is not None and geometry is None:
        raise CommandError(f"layers={layers}: only a --geometry can be cut to fewer layers")
    if image is not None and geometry is not None:
        raise CommandError(f"image {image}: a --geometry is measured on noise, not on an image")
    methods, described = _methods(method, keep, option, recipe)
    writable(json)
    kind = _kind(dtype)
    check_device(device)
    with _threads(threads):
        if geometry is not None:
            vlm, inputs, about = _random(geometry, layers, batch, prompt_tokens, new_tokens, kind, device)
        else:
            vlm, inputs, about = _loaded(str(model), image, batch, prompt_tokens, kind, device)
        from ..measure.bench import bench as measure

        machine = _machine(device)
        with progress("answers") as advance:
            rows = measure(vlm, inputs, methods, new_tokens, repeats, counted_flops, advance)
    result = {
        **about,
        "command": " ".join(["foveate", *sys.argv[1:]]),
        "machine": machine,
        "dtype": dtype,
        "device": device,
        "batch": batch,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "new_tokens": new_tokens,
        "repeats": repeats,
        "rows": [_to_json(row, rows, described.get(row.name, {}), batch * new_tokens) for row in rows],
    }
    _show(result["rows"], result)
    write_json(json, result)


# --------------------------------------------------------------------------------------------------- what is measured
def _methods(
    method: str | None, keep: str | None, option: list[str] | None, recipe: Path | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reducers by the name of their column, and how each was asked for. A recipe takes its turn beside the methods."""
    reducers: dict[str, Any] = {}
    described: dict[str, Any] = {}
    if recipe is not None:
        reducer, options = method_and_options(None, None, None, recipe)
        reducers[recipe.stem], about = reducer, foveate.recipe.describe(reducer)
        described[recipe.stem] = {
            "method": about.get("method", "chain"), "keep": getattr(reducer, "keep", None), "options": options,
        }  # fmt: skip
        if method is None:
            if keep is not None or option:
                raise CommandError(
                    f"recipe {recipe}: has its own budget and options; --keep and --option need --method"
                )
            return reducers, described
    method = method or "sparsevlm"
    budgets = [budget.strip() for budget in keep.split(",")] if keep is not None else [None]
    for name in (part.strip() for part in method.split(",")):
        for budget in budgets:
            reducer, options = method_and_options(name, budget, option)
            title = name if budget is None else f"{name} {budget}"
            if title in reducers:
                raise CommandError(f"method {title}: is given twice")
            reducers[title] = reducer
            described[title] = {"method": name, "keep": getattr(reducer, "keep", None), "options": options}
    return reducers, described


def _random(
    name: str, layers: int | None, batch: int, prompt_tokens: int | None, new_tokens: int, kind: Any, device: str
) -> tuple[Any, Any, dict[str, Any]]:
    """Model, inputs and description of a geometry. Refuses before anything large is made."""
    from ..measure.memory import free_bytes
    from ..measure.random_models import random_model

    try:
        drawn = random_model(name, layers, prompt_tokens)
    except ValueError as error:
        raise CommandError(str(error)) from error
    depth, needed = drawn.geometry.layers, drawn.weight_bytes(kind) + drawn.working_bytes(kind, batch, new_tokens)
    free = free_bytes(device)
    if free is not None and needed > free:
        raise CommandError(
            f"geometry {name}: {depth} layers in {_name(kind)} need about {needed / _GIGA:.1f} GB, "
            f"{free / _GIGA:.1f} GB are free on {device}; use fewer --layers, a smaller --batch or --dtype bfloat16"
        )
    note = f"{drawn.geometry.name}, {depth} decoder layers, whole vision tower; {_RANDOM}"
    about = {"model": None, "geometry": drawn.geometry.name, "layers": depth, "random_weights": True, "note": note}
    return drawn.build(kind, device), drawn.inputs(kind, device, batch), about


def _loaded(
    name: str, image: Path | None, batch: int, prompt_tokens: int | None, kind: Any, device: str
) -> tuple[Any, Any, dict[str, Any]]:
    """Model, inputs and description of a real model, asked the same question in each row."""
    from ..engine.families.parts import resolve
    from ..evaluate import answer as answering
    from ..evaluate import data as datasets
    from ..measure.prompt import with_text_tokens

    sample = datasets.load("scenes", 1, 0)[0]
    if image is not None:
        sample = datasets.Sample(datasets.open_image(image), "What is in this image?", "", "", str(image))
    vlm = answering.load(name, _name(kind), device)  # type: ignore[arg-type]
    inputs = vlm.inputs([sample] * batch)
    if prompt_tokens is not None:
        visual = resolve(vlm.model).find_placeholders(inputs["input_ids"], None)
        assert visual is not None  # ids were given
        try:
            inputs = with_text_tokens(inputs, visual, prompt_tokens)
        except ValueError as error:
            raise CommandError(f"prompt-tokens={prompt_tokens}: {error}") from error
    about = {"model": name, "geometry": None, "random_weights": False, "note": f"{name}, image: {image or 'a scene'}"}
    return vlm.model, inputs, about


def _kind(dtype: str) -> Any:
    import torch

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        raise CommandError(f"dtype {dtype}: known are {', '.join(kinds)}")
    return kinds[dtype]


def _name(kind: Any) -> str:
    return str(kind).removeprefix("torch.")


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch
    import transformers

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": named or platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "foveate": foveate.__version__,
    }


# ------------------------------------------------------------------------------------------------------------ results
def _to_json(row: Any, rows: list[Any], described: dict[str, Any], answer_tokens: int) -> dict[str, Any]:
    """A row as it is written. Times are milliseconds, ratios against the unreduced model of the same repeat."""
    if row.error:
        return {"name": row.name, **described, "error": row.error}
    full, limit = rows[0], rows[-1]
    flops = None if row.flops is None else {**row.flops._asdict(), "total": row.flops.total}
    return {
        "name": row.name,
        **described,
        "error": None,
        "visual_tokens_entering": row.entering,
        "visual_tokens_after": row.after,
        "ms": {what: row.spread(what).to_json() for what in _TIMES},
        "tokens_per_second": 1000 * answer_tokens / row.spread("total").median,
        "flops": flops,
        "flops_counted": row.counted,
        "kv_bytes": row.kv_bytes,
        "cache_bytes_at_end": row.runs[0].cache_bytes,
        "peak_bytes": row.peak.peak,
        "peak_bytes_added": row.peak.added,
        "speedup_prefill": row.speedup(full).to_json(),
        "speedup_prefill_cpu": row.speedup(full, "prefill_cpu").to_json(),
        "speedup_total": row.speedup(full, "total").to_json(),
        "limit_prefill": limit.speedup(full).to_json(),
        "still_to_gain_prefill": limit.speedup(row).to_json(),
    }


def _show(rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """The table, and in words what Amdahl's law leaves."""
    machine = result["machine"]
    say(result["note"])
    say(
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} thread(s), {result['dtype']}, "
        f"batch {result['batch']}, {result['prompt_tokens']} prompt + {result['new_tokens']} new tokens; "
        f"medians (quartiles) of {result['repeats']}, in turns"
    )
    failed = [row["error"] for row in rows if row["error"]]
    rows = [row for row in rows if not row["error"]]
    lines = [
        _line("visual tokens entering a layer", rows, lambda row: f"{row['visual_tokens_entering']:.1f}"),
        _line("visual tokens after a layer", rows, lambda row: f"{row['visual_tokens_after']:.1f}"),
        _line("vision, ms", rows, lambda row: _middle(row["ms"]["vision"])),
        _line("reduce, ms", rows, lambda row: _middle(row["ms"]["reduce"])),
        _line("rest of the prefill, ms", rows, lambda row: _middle(row["ms"]["decoder"])),
        _line("prefill, ms", rows, lambda row: _spread(row["ms"]["prefill"])),
        _line("prefill, CPU ms", rows, lambda row: _spread(row["ms"]["prefill_cpu"])),
        _line("decode, ms per token", rows, lambda row: _spread(row["ms"]["decode"])),
        _line("tokens per second", rows, lambda row: f"{row['tokens_per_second']:.3g}"),
        _line("prefill, GFLOPs", rows, lambda row: _in(row["flops"] and row["flops"]["total"], _GIGA, ".2f")),
        _line("  of it vision", rows, lambda row: _in(row["flops"] and _vision(row["flops"]), _GIGA, ".2f")),
        _line("  counted by torch", rows, lambda row: _in(row["flops_counted"], _GIGA, ".2f")),
        _line("KV cache, MB", rows, lambda row: _in(row["kv_bytes"], _MEGA, ".3f")),
        _line("peak memory, MB", rows, lambda row: _in(row["peak_bytes"], _MEGA, ".0f")),
        _line("  above the model", rows, lambda row: _in(row["peak_bytes_added"], _MEGA, ".1f")),
        _line("prefill faster, times", rows, lambda row: _spread(row["speedup_prefill"], ".2f")),
        _line("  by CPU time", rows, lambda row: _spread(row["speedup_prefill_cpu"], ".2f")),
        _line("answer faster, times", rows, lambda row: _spread(row["speedup_total"], ".2f")),
        _line("still to gain, times", rows, lambda row: _spread(row["still_to_gain_prefill"], ".2f")),
    ]
    if machine["gpu"]:
        lines = [line for line in lines if "CPU" not in line[0]]
    if rows[0]["flops_counted"] is None:
        lines = [line for line in lines if "counted" not in line[0]]
    table(["", *(row["name"] for row in rows)], lines)
    for error in failed:
        say(f"Failed: {error}.")
    limit = rows[-1]["speedup_prefill"]["median"]
    say(
        f"Without any visual token in the decoder the prefill would be {limit:.2f} times as fast: tower, text and head "
        f"are {1 / limit:.0%} of it. That is the limit of all methods that leave the tower alone."
    )
    for row in rows[1:-1]:
        fewer = rows[0]["visual_tokens_entering"] / max(row["visual_tokens_entering"], 1e-9)
        say(
            f"{row['name']}: {fewer:.1f} times fewer visual tokens enter a layer, prefill "
            f"{row['speedup_prefill']['median']:.2f} times as fast; a perfect and free reducer would still gain "
            f"{row['still_to_gain_prefill']['median']:.2f}."
        )


def _line(title: str, rows: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> list[str]:
    return [title, *map(cell, rows)]


def _middle(spread: dict[str, float]) -> str:
    return f"{spread['median']:.1f}"


def _spread(spread: dict[str, float], form: str = ".1f") -> str:
    return f"{spread['median']:{form}} ({spread['q1']:{form}}-{spread['q3']:{form}})"


def _vision(flops: dict[str, int]) -> int:
    return flops["vision"] + flops["connector"]


def _in(value: int | None, unit: float, form: str) -> str:
    return "-" if value is None else format(value / unit, form)
