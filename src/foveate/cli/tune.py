"""`foveate tune`: the cheapest setting whose answers stay close to the full model's."""

from __future__ import annotations

import time
from math import isnan
from pathlib import Path
from typing import Annotated, Any

import typer

import foveate

from ..reduction import info
from .shell import CommandError, JsonOption, progress, say, table, writable, write_json

__all__ = ["tune"]

_SHALLOW = 16  # below this depth VTW's search starts at layer 1, not at the official 5
_VTW_SAMPLES, _SAMPLES = 20, 64
_NO_NUMBERS = "logits are NaN or infinite"


def tune(
    model: Annotated[str, typer.Argument(help="A Hub id, a local folder, or zoo:NAME (shipped in the package).")],
    data: Annotated[str, typer.Option("--data", "-d", metavar="A,B", help="easy-vqa, scenes, or JSONL/Parquet files.")],
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="Search within one method; vtw alone: its own search by layer.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", metavar="A,B", help="Search among these; all (the default).")
    ] = None,
    max_changed: Annotated[
        float | None, typer.Option("--max-changed", help="Largest share of changed answers; default 0.01.")
    ] = None,
    max_divergence: Annotated[
        float | None,
        typer.Option("--max-divergence", "--eta", help="Largest mean KL in nats; with vtw: VTW's own for the model."),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the bounds.")] = 0.95,
    samples: Annotated[
        int | None,
        typer.Option("--samples", "-n", help=f"Questions to measure on; default {_SAMPLES}, with vtw {_VTW_SAMPLES}."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Recipe of what was chosen, for foveate.load.")
    ] = None,
    check_data: Annotated[
        str | None, typer.Option("--check-data", metavar="A,B", help="Count changed answers on other questions.")
    ] = None,
    check_samples: Annotated[int, typer.Option(min=1, help="How many.")] = 1000,
    first_layer: Annotated[
        int | None,
        typer.Option(help=f"With vtw: smallest layer tried; default 5, or 1 below {_SHALLOW} layers."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the draw of questions.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    json: JsonOption = None,
) -> None:
    """Find the cheapest method, layer and budget that answers like the full model; no labels are needed.

    A search that was stopped goes on when it is started again with the same --out. With --method vtw (or nothing but
    --max-divergence): the first layer at which all visual tokens can be withdrawn, by the mean KL of the first token.

    Example: foveate tune zoo:tiny-llava --data scenes,easy-vqa --samples 64 --max-changed 0.01 --out recipe.yaml

    Example: foveate tune zoo:tiny-llava --data easy-vqa --method vtw --max-divergence 0.01 --samples 40
    """
    for path in (json, out):
        writable(path)
    if method is not None:
        info(method)  # raises the error that lists the known ones
    if method is not None and methods is not None:
        raise CommandError("give --method or --methods, not both")
    search_only = (methods, max_changed, out, check_data)
    alone = method is None and (max_divergence is not None or first_layer is not None)
    if all(option is None for option in search_only) and (method == "vtw" or alone):
        result = _withdrawal(
            model, data, max_divergence, _VTW_SAMPLES if samples is None else samples, first_layer, seed,
            dtype, device,
        )  # fmt: skip
        write_json(json, result)
        return
    if first_layer is not None:
        raise CommandError(f"first-layer={first_layer}: belongs to VTW's own search, --method vtw")
    if method is not None and max_changed is None and max_divergence is None:
        raise CommandError(f"method {method}: give --max-changed or --max-divergence")
    chosen = [method] if method else None
    if methods is not None and methods.strip() != "all":
        chosen = [name.strip() for name in methods.split(",") if name.strip()]
    if max_changed is None and max_divergence is None:
        max_changed = 0.01
    from .tune_search import Request, run

    request = Request(
        model, _listed("data", data), chosen, max_changed, max_divergence, confidence,
        _SAMPLES if samples is None else samples, out, _listed("check-data", check_data), check_samples, batch_size,
        max_new_tokens, seed, dtype, device,
    )  # fmt: skip
    write_json(json, run(request))


def _listed(option: str, text: str | None) -> list[str]:
    if text is None:
        return []
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise CommandError(f"{option} {text!r}: name each data set once, separated by commas")
    return names


def _withdrawal(
    model: str,
    data: str,
    max_divergence: float | None,
    samples: int,
    first_layer: int | None,
    seed: int,
    dtype: str,
    device: str,
) -> dict[str, Any]:
    """VTW's own search: KL(withdrawn || full model) of the first answer token for every layer."""
    from ..evaluate import answer as answering
    from ..evaluate import data as datasets
    from ..evaluate.compare import costs
    from ..tune import DEFAULT_ETA, ETA_PRESETS, choose_layer, withdrawal_curve

    if max_divergence is not None and not 0 <= max_divergence < float("inf"):
        raise CommandError(f"max-divergence={max_divergence}: give a number of nats from 0 on")
    eta = max_divergence
    if eta is None:
        eta = next((value for name, value in ETA_PRESETS.items() if name in model.lower()), DEFAULT_ETA)
    questions = datasets.load(data, samples, seed)
    vlm = answering.load(model, dtype, device)  # type: ignore[arg-type]
    batches = list(answering.batches(vlm, questions))
    depth = vlm.model.config.get_text_config(decoder=True).num_hidden_layers  # type: ignore[operator, union-attr]
    if first_layer is None:
        first_layer = 5 if depth >= _SHALLOW else 1
    full_pass = sum(answering.prefill_seconds(vlm, batch.inputs) for batch in batches)
    start = time.perf_counter()
    with progress("passes") as advance:
        curve = withdrawal_curve(vlm.model, [batch.inputs for batch in batches], first_layer, progress=advance)
    took = time.perf_counter() - start
    layer = choose_layer(curve, eta, first_layer)
    mean = curve.mean(0).tolist()
    result: dict[str, Any] = {
        "model": model,
        "data": data,
        "samples": len(questions),
        "method": "vtw",
        "max_divergence": eta,
        "first_layer": first_layer,
        "curve": [
            {"layer": first_layer + i, **({"kl": None, "error": _NO_NUMBERS} if isnan(value) else {"kl": value})}
            for i, value in enumerate(mean)
        ],
        "layer": layer,
        "visual_tokens_entering": None,
        "flops_ratio": None,
        "search_seconds": took,
        "search_seconds_full_passes": full_pass * (1 + len(mean)),
    }
    if layer is not None:
        with foveate.apply(vlm.model, foveate.VTW(layer=layer)) as session:
            answering.prefill_seconds(vlm, batches[0].inputs)
            assert session.trace is not None  # a prefill with images just ran
        ours, theirs = costs(vlm, session.trace), costs(vlm, session.trace, full=True)
        result |= {"visual_tokens_entering": ours.entering, "flops_ratio": ours.flops / theirs.flops}
    rows = [
        [
            str(first_layer + i),
            "-" if isnan(value) else f"{value:.6f}",
            _NO_NUMBERS if isnan(value) else "<- chosen" if first_layer + i == layer else "",
        ]
        for i, value in enumerate(mean)
    ]
    table(["withdraw at layer", "mean KL (nats)", ""], rows)
    if layer is None:
        say(f"No withdrawal: no layer from {first_layer} to {depth - 1} stays within {eta:g} nats on these questions.")
    else:
        say(f"Chosen: layer {layer} of {depth}, the first within {eta:g} nats (foveate.VTW(layer={layer})).")
        say(
            f"It saves {1 - result['flops_ratio']:.0%} of the decoder's prefill FLOPs; "
            f"{result['visual_tokens_entering']:.1f} of {theirs.entering:.0f} visual tokens enter a layer on average."
        )
    say(
        f"The search took {took:.1f} s for {len(questions)} questions; one whole pass per layer would take about "
        f"{result['search_seconds_full_passes']:.1f} s."
    )
    return result
