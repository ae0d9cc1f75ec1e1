"""`foveate demo`: the whole story on the model and the images that come with the package."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

import foveate

from .shell import CommandError, JsonOption, note, progress, say, table, writable, write_json

__all__ = ["demo"]

MODEL = "zoo:tiny-llava"
_DATA = ("easy-vqa", "scenes")
_BUDGETS = (0.5, 0.33, 0.2)
_OTHER_RUNS = 50
"""What timing and pictures take, in answers to a batch."""


def demo(
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Questions per data set.")] = 160,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of pictures and results.json.")] = Path(
        "demo"
    ),
    seed: Annotated[int, typer.Option(help="Of the draw of questions.")] = 0,
    json: JsonOption = None,
) -> None:
    """Accuracy against cost for four methods, on a small trained model, offline; with pictures of what was kept.

    Example: foveate demo --samples 100 --out demo/
    """
    from ..evaluate import answer as answering
    from ..evaluate import data as datasets
    from ..evaluate.compare import compare
    from ..view import save

    writable(json)
    if out.exists() and not out.is_dir():
        raise CommandError(f"out {out}: a file; give a folder")
    writable(out / "results.json")
    start = time.perf_counter()
    vlm = answering.load(MODEL)
    questions = {name: datasets.load(name, samples, seed) for name in _DATA}
    recipes = list(_recipes())
    duration = _minutes(vlm, questions)
    note(f"{MODEL}, {samples} questions each from {' and '.join(_DATA)}: about {duration} on this machine.")
    with progress("answers, then times") as advance:
        rows = compare(vlm, questions, recipes, timing_batches=2, progress=advance)
    if broken := [f"{row['id']}: {row['error']}" for row in rows if row["error"]]:
        raise CommandError(f"demo: {broken[0]}")
    headers = [
        "method", "budget", "options", "accuracy easy-VQA", "accuracy scenes", "same answer as full", "visual tokens",
        "FLOPs", "KV (MB)", "prefill (ms)",
    ]  # fmt: skip
    table(
        headers,
        [
            [
                row["method"],
                "1.0" if row["method"] == "full" else f"{row['keep']}",
                " ".join(f"{name}={value}" for name, value in row["options"].items()) or "-",
                *(f"{row['accuracy_by_data'][name]:.3f}" for name in _DATA),
                f"{row['agreement']:.3f}",
                f"{row['visual_tokens_entering']:.1f}",
                f"{row['flops_ratio']:.0%}",
                f"{row['kv_mb']:.3f}",
                "-" if row["prefill_ms"] is None else f"{row['prefill_ms']:.1f}",
            ]
            for row in rows
        ],
        left=3,
    )
    result: dict[str, Any] = {
        "model": MODEL,
        "data": list(_DATA),
        "samples": samples,
        "seed": seed,
        "rows": rows,
    }
    pictures = _pictures(vlm, questions)
    for name, figure in pictures.items():
        save(figure, out / name)
    write_json(out / "results.json", result)
    write_json(json, result)
    say()
    say("budget: share of the visual tokens, averaged over the layers: of those that enter a layer for random, FastV")
    say("and VTW, of those left after it for SparseVLM, as its paper counts. visual tokens: mean that entered a layer.")
    say("FLOPs: decoder prefill against the full model. KV: cache of one sample after the prefill. prefill: median for")
    say("a batch (of 16, given enough samples), vision tower included, methods in turns.")
    worst = max((r * (1 - r) / samples) ** 0.5 for row in rows for r in row["accuracy_by_data"].values())
    say(f"Each accuracy is over {samples} questions: differences below about {2.8 * worst:.2f} are noise.")
    say(f"{time.perf_counter() - start:.0f} s. Pictures: {', '.join(str(out / name) for name in pictures)}")


def _minutes(vlm: Any, questions: Any) -> str:
    """How long the demo will take, from what a few answers of the full model take."""
    from ..evaluate.answer import answer

    few = [sample for part in questions.values() for sample in part[:8]]
    seconds = []
    for _ in range(3):  # the first one warms up, others may be disturbed
        start = time.perf_counter()
        answer(vlm, vlm.inputs(few))
        seconds.append(time.perf_counter() - start)
    runs = sum(map(len, questions.values())) / len(few) * (1 + len(list(_recipes())))
    minutes = min(seconds) * (runs + _OTHER_RUNS) / 60
    return "a minute" if minutes < 1.5 else f"{minutes:.0f} minutes"


def _recipes() -> Iterator[Any]:
    """Every method at the same budget over all layers, so that a row compares with its neighbours."""
    from ..recipe import Recipe

    # The model has 6 layers; a budget over all layers leaves FastV the first one only.
    methods: dict[str, dict[str, Any]] = {
        "random": {},
        "fastv": {"layer": 1, "average": "all_layers"},
        "sparsevlm": {},
        "vtw": {},
    }
    for keep in _BUDGETS:
        for method, options in methods.items():
            yield Recipe(method, options, keep)


def _pictures(vlm: Any, questions: Any) -> dict[str, Any]:
    """File name -> figure: what each method kept for some questions, and one method stage by stage."""
    from ..evaluate.grid import build_reducer
    from ..view import SheetCell, SheetRow, overlay, sheet
    from ..view.seen import as_seen

    budget = _BUDGETS[1]
    shown = [recipe for recipe in _recipes() if recipe.keep == budget]
    reducers = [build_reducer(recipe, vlm) for recipe in shown]
    rows = []
    for sample in _telling(questions):
        (full, _), *others = [_ask(vlm, sample, reducer) for reducer in (None, *reducers)]
        cells = [SheetCell(c.method, trace, said) for c, (said, trace) in zip(shown, others)]
        rows.append(SheetRow(as_seen(sample.image, vlm.processor), sample.question, full, cells))
    first = rows[0]
    sparse = next(cell for cell in first.cells if cell.method == "sparsevlm")
    return {
        "kept.png": sheet(rows, f"What each method keeps at a budget of {budget:.0%} of the visual tokens"),
        "stages.png": overlay(
            first.image,
            sparse.trace,
            title=f"SparseVLM, keep {budget}",
            question=first.question,
            answers=(first.answer, sparse.answer),
            heat=True,
        ),
    }


def _telling(questions: Any) -> list[Any]:
    """Two questions about the first scene that was asked two of this kind, and one about an easy-VQA image."""
    pointed = [sample for sample in questions["scenes"] if sample.kind in ("color", "shape", "where")]
    for _, group in groupby(pointed, key=lambda sample: sample.image_id):
        pair = list(group)[:2]
        if len(pair) == 2:
            break
    else:
        pair = questions["scenes"][:2]
    return [*pair, questions["easy-vqa"][0]]


def _ask(vlm: Any, sample: Any, reducer: Any) -> tuple[str, Any]:
    from ..evaluate.answer import answer

    inputs = vlm.inputs([sample])
    if reducer is None:
        return answer(vlm, inputs).texts[0], None
    with foveate.apply(vlm.model, reducer) as session:
        said = answer(vlm, inputs).texts[0]
    return said, session.trace
