"""`foveate run`: one image, one question, with and without reduction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import foveate

from ..evaluate.data import Sample, open_image
from .shell import (
    CommandError,
    JsonOption,
    KeepOption,
    OptionsOption,
    RecipeOption,
    method_and_options,
    say,
    table,
    writable,
    write_json,
)

__all__ = ["run"]


def run(
    model: Annotated[str, typer.Argument(help="A Hub id, a local folder, or zoo:NAME (shipped in the package).")],
    image: Annotated[Path, typer.Option("--image", "-i", help="Image file.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to ask about it.")],
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="A name from `foveate methods`; default: sparsevlm.")
    ] = None,
    keep: KeepOption = None,
    option: OptionsOption = None,
    recipe: RecipeOption = None,
    overlay: Annotated[Path | None, typer.Option("--overlay", metavar="FILE", help="Picture of what was kept.")] = None,
    heat: Annotated[bool, typer.Option("--heat", help="With the scores by which the method chose.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed prefills, each with and without reduction.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    json: JsonOption = None,
) -> None:
    """Answer one question with and without reduction, side by side, with what it saved.

    Example: foveate run zoo:tiny-llava --image photo.png --prompt "what shape is red?" --method fastv --keep 0.33
    """
    from ..evaluate import answer as answering
    from ..evaluate.compare import costs, prefill_times
    from ..view import overlay as draw
    from ..view import save
    from ..view.seen import as_seen

    if method is None and recipe is None:
        method = "sparsevlm"
    reducer, options = method_and_options(method, keep, option, recipe)
    method = method or foveate.recipe.describe(reducer).get("method", "chain")
    picture = open_image(image)
    writable(json)
    writable(overlay)
    if not prompt.strip():
        raise CommandError("prompt: is empty")
    vlm = answering.load(model, dtype, device)  # type: ignore[arg-type]
    sample = Sample(image=picture, question=prompt, answer="", kind="", image_id=str(image))
    inputs = vlm.inputs([sample])
    with foveate.apply(vlm.model, reducer) as session:
        said = answering.answer(vlm, inputs, max_new_tokens)
        trace = session.trace
    full = answering.answer(vlm, inputs, max_new_tokens).checked(f"model {model}: its").texts[0]
    reduced = said.checked(f"method {method}: the reduced model's").texts[0]
    if trace is None:
        raise CommandError(f"model {model}: the prompt holds no visual token, so nothing was reduced")
    batch = answering.Batch([0], [sample], inputs)
    ms_full, ms = prefill_times(vlm, [batch], [None, reducer], repeats)
    ours, theirs = costs(vlm, trace), costs(vlm, trace, full=True)
    if overlay is not None:
        title = f"{method}{'' if keep is None else f', keep {keep}'}"
        try:
            shown = as_seen(picture, vlm.processor)
            save(draw(shown, trace, title=title, question=prompt, answers=(full, reduced), heat=heat), overlay)
        except (ValueError, OSError) as error:
            raise CommandError(f"overlay {overlay}: {error}") from error
    result: dict[str, Any] = {
        "model": model,
        "image": str(image),
        "prompt": prompt,
        "method": method,
        "options": options,
        "keep": getattr(reducer, "keep", None),
        "answer": reduced,
        "answer_full": full,
        "visual_tokens": theirs.visual_tokens,
        "visual_tokens_entering": ours.entering,
        "visual_tokens_after": ours.after,
        "visual_tokens_by_layer": trace.visual_tokens[0].tolist(),
        "flops_ratio": ours.flops / theirs.flops,
        "kv_mb": ours.kv_bytes / 1e6,
        "kv_mb_full": theirs.kv_bytes / 1e6,
        "prefill_ms": ms,
        "prefill_ms_full": ms_full,
    }
    rows = [
        ["answer", full or "(nothing)", reduced or "(nothing)", "same" if full == reduced else "differs"],
        ["visual tokens entering a layer", *_beside(theirs.entering, ours.entering, ".1f")],
        ["visual tokens after a layer", *_beside(theirs.after, ours.after, ".1f")],
        ["decoder prefill, GFLOPs", *_beside(theirs.flops / 1e9, ours.flops / 1e9, ".3f")],
        ["KV cache, MB", *_beside(theirs.kv_bytes / 1e6, ours.kv_bytes / 1e6, ".3f")],
        ["prefill, ms (median, vision included)", *_beside(ms_full, ms, ".1f")],
    ]
    table(["", "full model", method, "reduced / full"], rows)
    say("Visual tokens are means over the decoder layers.")
    if min(ours.entering, ours.after) >= theirs.visual_tokens:
        say(f"Nothing was removed: the prompt has {theirs.visual_tokens:.0f} visual tokens, and all of them were kept.")
    if overlay is not None:
        say(f"Picture: {overlay}")
    write_json(json, result)


def _beside(full: float, reduced: float, form: str) -> tuple[str, str, str]:
    return format(full, form), format(reduced, form), f"{reduced / full:.0%}" if full else "-"
