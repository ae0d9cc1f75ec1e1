"""`foveate methods` and `foveate flops`: what needs no model."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

import foveate

from ..reduction import info, options
from .shell import (
    CommandError,
    JsonOption,
    KeepOption,
    MethodOption,
    OptionsOption,
    method_and_options,
    say,
    table,
    writable,
    write_json,
)

__all__ = ["flops", "methods"]


def methods(json: JsonOption = None) -> None:
    """List every method: paper, where it acts, what it needs, its options.

    Example: foveate methods
    """
    writable(json)
    rows, listed = [], []
    for name in foveate.names():
        about, defaults = info(name), options(name)
        required = [option for option, default in defaults.items() if default is dataclasses.MISSING]
        optional = {option: default for option, default in defaults.items() if default is not dataclasses.MISSING}
        shown = [*(f"{option}=?" for option in required), *(f"{k}={v}" for k, v in optional.items())]
        guided = "question" if about.text_guided else "-"
        rows.append([name, about.paper, about.acts, about.needs, guided, " ".join(shown)])
        listed.append(
            {
                "name": name,
                "paper": about.paper,
                "acts": about.acts,
                "needs": about.needs,
                "text_guided": about.text_guided,
                "required": required,
                "options": {option: _jsonable(default) for option, default in optional.items()},
            }
        )
    table(["method", "paper", "acts", "needs", "guided by", "options (=? must be given)"], rows, left=6)
    write_json(json, listed)


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value if isinstance(value, bool | int | float | str | None) else repr(value)


def flops(
    geometry: Annotated[
        str, typer.Argument(help="A preset (llava-1.5-7b, qwen2.5-vl-7b, ...) or a local config.json.")
    ],
    method: MethodOption,
    keep: KeepOption = None,
    option: OptionsOption = None,
    text_tokens: Annotated[
        int | None, typer.Option(help="Tokens that are not visual; the preset's own by default.")
    ] = None,
    visual_tokens: Annotated[
        int | None, typer.Option(help="Visual tokens of the prompt; by default the preset's own, or one image.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """What a method saves in the decoder's prefill, on paper: no weights, no image.

    Example: foveate flops llava-1.5-7b --method sparsevlm --keep 192

    Example: foveate flops path/to/config.json --visual-tokens 1320 --method fastv --keep 0.25
    """
    from ..measure import report

    reducer, options = method_and_options(method, keep, option)
    writable(json)
    if text_tokens is not None and text_tokens < 1:
        raise CommandError(f"text-tokens={text_tokens}: a prompt has at least one token besides the image")
    if visual_tokens is not None and visual_tokens < 1:
        raise CommandError(f"visual-tokens={visual_tokens}: without visual tokens there is nothing to reduce")
    try:
        result = report(geometry, reducer, text_tokens=text_tokens, visual_tokens=visual_tokens)
    except ValueError as error:
        raise CommandError(str(error)) from error
    rows = [
        ["decoder prefill, TMACs", *_beside(result["tmacs_full"], result["tmacs"], ".3f")],
        ["decoder prefill, TFLOPs", *_beside(result["tflops_full"], result["tflops"], ".3f")],
        ["KV cache, MB (16 bit)", *_beside(result["kv_mb_full"], result["kv_mb"], ".1f")],
    ]
    named = " ".join([f"keep={result['keep']}", *(f"{name}={value}" for name, value in options.items())])
    table(["", "full model", method, "saved"], rows, title=f"{result['geometry']}, {method} {named}")
    say(
        f"Visual tokens, mean over the layers: {result['visual_tokens_entering']:.1f} entering, "
        f"{result['visual_tokens_after']:.1f} left after."
    )
    if (result["tflops"], result["kv_mb"]) == (result["tflops_full"], result["kv_mb_full"]):
        say("Nothing is removed: the budget leaves all visual tokens in place.")
    say(f"Formula: {result['formula']}. What papers print as FLOPs are MACs.")
    write_json(json, {**result, "options": options})


def _beside(full: float, reduced: float, form: str) -> tuple[str, str, str]:
    return format(full, form), format(reduced, form), f"{1 - reduced / full:.1%}"
