"""`foveate tune`: the cheapest setting whose answers stay close to the full model's."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

import foveate

from .shell import CommandError, JsonOption, MethodOption, progress, say, table, writable, write_json

__all__ = ["tune"]

_SHALLOW = 16  # below this depth the search starts at layer 1, not at the official 5


def tune(
    model: Annotated[str, typer.Argument(help="A Hub id, a local folder, or zoo:NAME (shipped in the package).")],
    data: Annotated[str, typer.Option("--data", "-d", help="easy-vqa, scenes, or a JSONL/Parquet file.")],
    method: MethodOption = "vtw",
    max_divergence: Annotated[
        float | None,
        typer.Option("--max-divergence", "--eta", help="Largest mean KL in nats; default: VTW's own for the model."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Questions to measure on.")] = 20,
    first_layer: Annotated[
        int | None,
        typer.Option(help=f"Smallest layer tried; default 5, or 1 for models of fewer than {_SHALLOW} layers."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw of questions.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    json: JsonOption = None,
) -> None:
    """Find the first layer at which all visual tokens can be withdrawn (VTW).

    Measured is KL(withdrawn || full model) of the first answer token, averaged over the questions.

    Example: foveate tune zoo:tiny-llava --data easy-vqa --method vtw --max-divergence 0.01 --samples 40
    """
    from ..evaluate import answer as answering
    from ..evaluate import data as datasets
    from ..evaluate.compare import costs
    from ..tune import DEFAULT_ETA, ETA_PRESETS, choose_layer, withdrawal_curve

    if method not in foveate.names():
        foveate.build(method)  # raises the error that lists the known ones
    if method != "vtw":
        raise CommandError(f"method {method}: only vtw can be tuned so far")
    if max_divergence is not None and not 0 <= max_divergence < float("inf"):
        raise CommandError(f"max-divergence={max_divergence}: give a number of nats from 0 on")
    writable(json)
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
        "method": method,
        "max_divergence": eta,
        "first_layer": first_layer,
        "curve": [{"layer": first_layer + i, "kl": value} for i, value in enumerate(mean)],
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
        [str(first_layer + i), f"{value:.6f}", "<- chosen" if first_layer + i == layer else ""]
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
    write_json(json, result)
