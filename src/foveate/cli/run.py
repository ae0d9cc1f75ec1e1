"""`foveate run`: one image or video, one question, with and without reduction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import foveate

from ..evaluate.data import Sample, VideoSample, open_image
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
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What to ask about it.")] = None,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="Image file.")] = None,
    video: Annotated[
        Path | None,
        typer.Option("--video", help="Video file, animated image, folder of images, or .npy of (T, H, W, 3)."),
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of the video that the model is shown, evenly.")] = 8,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="A name from `foveate methods`; default: sparsevlm.")
    ] = None,
    keep: KeepOption = None,
    option: OptionsOption = None,
    recipe: RecipeOption = None,
    overlay: Annotated[
        Path | None,
        typer.Option("--overlay", metavar="FILE", help="Picture of what was kept; of a video a film strip."),
    ] = None,
    heat: Annotated[bool, typer.Option("--heat", help="With the scores by which the method chose.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed prefills, each with and without reduction.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    json: JsonOption = None,
) -> None:
    """Answer one question with and without reduction, side by side, with what it saved.

    Example: foveate run zoo:tiny-llava --image photo.png --prompt "what shape is red?" --method fastv --keep 0.33

    Example: foveate run MODEL --video clip.mp4 --frames 16 --prompt "what moves?" --method vidcom2 --overlay strip.png
    """
    from ..evaluate import answer as answering
    from ..evaluate.compare import costs, prefill_times
    from ..evaluate.videos import open_video
    from ..view import film_strip, save
    from ..view import overlay as draw
    from ..view.overlay import picture_kind
    from ..view.seen import as_seen, frames_as_seen

    if (image is None) == (video is None):
        raise CommandError("give --image or --video" if image is None else "--image and --video: give one of them")
    if prompt is None:
        raise CommandError("give --prompt")
    if method is None and recipe is None:
        method = "sparsevlm"
    reducer, options = method_and_options(method, keep, option, recipe)
    method = method or foveate.recipe.describe(reducer).get("method", "chain")
    clip = open_video(video, frames) if video is not None else None
    picture = clip.frames[len(clip.frames) // 2] if clip is not None else open_image(image or "")
    writable(json)
    writable(overlay)
    if overlay is not None:
        try:
            picture_kind(overlay)
        except ValueError as error:
            raise CommandError(f"--overlay: {error}") from error
    if not prompt.strip():
        raise CommandError("prompt: is empty")
    vlm = answering.load(model, dtype, device)  # type: ignore[arg-type]
    sample = Sample(image=picture, question=prompt, answer="", kind="", image_id=str(image or video))
    if clip is not None:
        sample = VideoSample(**vars(sample), video=clip)
        if len(clip.frames) == 1 and not vlm.sees_videos:
            raise CommandError(f"video {video}: one frame is an image to a model that takes no videos; use --image")
        if heat:
            raise CommandError("--heat: the scores of a video are not drawn")
    inputs = vlm.inputs([sample])
    with vlm.apply(reducer, [sample], inputs) as session:
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
            told: dict[str, Any] = {"title": title, "question": prompt, "answers": (full, reduced)}
            if clip is None:
                drawn = draw(as_seen(picture, vlm.processor), trace, heat=heat, **told)
            else:
                drawn = film_strip(frames_as_seen(clip.frames, vlm), trace, seconds=clip.seconds, **told)
            save(drawn, overlay)
        except (ValueError, OSError) as error:
            raise CommandError(f"overlay {overlay}: {error}") from error
    result: dict[str, Any] = {
        "model": model,
        "image": None if image is None else str(image),
        **_of_video(video, clip, trace),
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
    if clip is not None and not vlm.sees_videos:
        say(f"The model takes no videos: its {len(clip.frames)} frames went in as images.")
    if min(ours.entering, ours.after) >= theirs.visual_tokens:
        say(f"Nothing was removed: the prompt has {theirs.visual_tokens:.0f} visual tokens, and all of them were kept.")
    if overlay is not None:
        say(f"Picture: {overlay}")
    write_json(json, result)


def _of_video(path: Path | None, clip: Any, trace: Any) -> dict[str, Any]:
    """What the result says of a video besides: its frames, and how many tokens of each time step stayed."""
    from ..view.strip import shots

    if clip is None:
        return {}
    try:
        steps = [{"frame": shot.frame, "kept": shot.kept, "total": shot.total} for shot in shots(clip.frames, trace)]
    except ValueError:  # nobody knows which token is of which frame
        steps = []
    return {"video": str(path), "frames": list(clip.indices), "seconds": clip.seconds, "visual_tokens_by_step": steps}


def _beside(full: float, reduced: float, form: str) -> tuple[str, str, str]:
    return format(full, form), format(reduced, form), f"{reduced / full:.0%}" if full else "-"
