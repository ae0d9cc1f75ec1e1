"""The search of `foveate tune`: questions in, table and recipe out."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import foveate

from .shell import CommandError, plain, progress, say, table

__all__ = ["Request", "run"]

_SHOWN = 25
_STATES = {"passed": "<- chosen", "active": "costs more, not judged"}


@dataclass
class Request:
    """What the command line asks for, see `foveate tune --help`."""

    model: str
    data: list[str]
    methods: list[str] | None
    max_changed: float | None
    max_divergence: float | None
    confidence: float
    samples: int
    out: Path | None
    check_data: list[str]
    check_samples: int
    batch_size: int
    max_new_tokens: int
    seed: int
    dtype: str
    device: str


def run(request: Request) -> dict[str, Any]:
    """Search, show, write the recipe; returns what `--json` writes."""
    from ..evaluate import answer as answering
    from ..evaluate.sweep import fingerprint
    from ..tune import Bounds, Journal, families, round_sizes, search

    bounds = Bounds(request.max_changed, request.max_divergence, request.confidence)
    questions = _questions(request.data, request.samples, request.seed)
    others = _others(request, questions)
    families(2, request.methods)  # an unknown method is refused before the model is loaded
    vlm = answering.load(request.model, request.dtype, request.device)  # type: ignore[arg-type]
    depth = vlm.model.config.get_text_config(decoder=True).num_hidden_layers  # type: ignore[operator, union-attr]
    grid = families(depth, request.methods)
    rounds, start = [], 0
    for size in round_sizes(len(questions)):
        rounds.append(list(_batches(vlm, questions, range(start, start + size), request.batch_size)))
        start += size
    out = request.out
    beside = out is not None and (out.is_file() or not out.exists())  # nothing is put beside a device
    journal = Journal(
        out.with_name(out.name + ".journal") if out is not None and beside else None,
        {
            "weights": fingerprint(vlm.model), "model": request.model, "data": request.data, "seed": request.seed,
            "samples": len(questions), "batch_size": request.batch_size, "max_new_tokens": request.max_new_tokens,
            "dtype": request.dtype, "foveate": foveate.__version__,
        },
    )  # fmt: skip
    if len(journal):
        say(f"Going on with {journal.path}: {len(journal)} batches are measured already.")
    began = time.perf_counter()
    with progress("questions") as advance:
        result = search(vlm.model, rounds, grid, bounds, request.max_new_tokens, journal, advance)
    chosen = result.chosen
    _show(result, bounds)
    report: dict[str, Any] = {
        "model": request.model,
        "data": request.data,
        "samples": len(questions),
        "bounds": {
            "max_changed": bounds.max_changed, "max_divergence": bounds.max_divergence, "confidence": bounds.confidence
        },
        "chosen": None if chosen is None else _row(chosen),
        "candidates": [_row(trial) for trial in result.trials],
        "evaluations": result.evaluations,
        "evaluations_exhaustive": len(result.trials) * len(questions),
        "search_prefills": result.prefills,
        "search_prefills_exhaustive": result.prefills_exhaustive,
        "search_seconds": result.seconds,
        "seconds": time.perf_counter() - began,
    }  # fmt: skip
    if others:
        report["check"] = _check(request, vlm, others, chosen)
    if request.out is not None:
        _write(request, bounds, report, chosen)
        journal.remove()
    return report


# ---------------------------------------------------------------------------------------------------------- questions
def _questions(data: Sequence[str], count: int, seed: int) -> list[Any]:
    """`count` questions in random order, as many of each data set."""
    from ..evaluate import data as datasets

    if count < 1:
        raise CommandError(f"samples={count}: at least 1 is needed")
    shares = [count // len(data) + (i < count % len(data)) for i in range(len(data))]
    drawn = [sample for name, share in zip(data, shares) if share for sample in datasets.load(name, share, seed)]
    random.Random(seed).shuffle(drawn)
    return drawn


def _batches(
    vlm: Any, samples: Sequence[Any], numbers: Sequence[int], size: int
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    for start in range(0, len(numbers), size):
        chosen = list(numbers[start : start + size])
        yield chosen, vlm.inputs([samples[i] for i in chosen])


def _picture(sample: Any) -> bytes:
    return sample.image.tobytes()


def _others(request: Request, asked: Sequence[Any]) -> list[Any]:
    """The questions of `--check-data` about images that the search does not see."""
    if not request.check_data:
        return []
    seen = {_picture(sample) for sample in asked}
    wanted = request.check_samples
    pool = _questions(request.check_data, wanted + 8 * len(asked), request.seed + 1)
    fresh = [sample for sample in pool if _picture(sample) not in seen][:wanted]
    if not fresh:
        raise CommandError(f"check-data {','.join(request.check_data)}: only questions about images of the search")
    return fresh


def _check(request: Request, vlm: Any, fresh: Sequence[Any], chosen: Any) -> dict[str, Any]:
    """Count what the choice changes on questions the search has not seen."""
    from ..tune import Reference, binomial_interval

    if chosen is None:
        say("Nothing to check: the full model stays as it is.")
        return {"data": request.check_data, "samples": len(fresh), "changed": 0, "share": 0.0}
    changed, kl = 0, 0.0
    with progress("check") as advance:
        for done, inputs in _batches(vlm, fresh, range(len(fresh)), 2 * request.batch_size):
            outcome = Reference(vlm.model, inputs, request.max_new_tokens).measure(chosen.recipe.build())
            changed += int((outcome.gaps < 0).sum())
            kl += float(outcome.kl.sum())
            advance(done[-1] + 1, len(fresh))
    low, high = binomial_interval(changed, len(fresh))
    say(
        f"Check: {changed} of {len(fresh)} other questions about other images answered differently, "
        f"{changed / len(fresh):.2%} (95 %: {low:.2%} to {high:.2%}); mean KL {kl / len(fresh):.5f} nats."
    )
    return {
        "data": request.check_data, "samples": len(fresh), "changed": changed, "share": changed / len(fresh),
        "interval": [low, high], "kl": kl / len(fresh),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- output
def _row(trial: Any) -> dict[str, Any]:
    guess = trial.estimate
    return {
        "method": trial.recipe.method,
        "options": trial.recipe.arguments,
        "state": trial.state,
        "reason": trial.reason,
        "samples": len(trial.gaps),
        "flops_ratio": trial.cost if trial.gaps else None,
        "visual_tokens_entering": trial.visual_tokens if trial.gaps else None,
        "changed_seen": trial.changed,
        "changed": guess and guess.changed,
        "changed_upper": guess and guess.changed_upper,
        "kl": trial.mean_kl if trial.gaps else None,
        "kl_upper": guess and guess.kl_upper,
    }


def _show(result: Any, bounds: Any) -> None:
    from ..tune.estimate import finest

    tried = [trial for trial in result.trials if trial.gaps and trial.estimate]
    tried.sort(key=lambda each: (-len(each.gaps), each.cost))
    shown = tried if plain() else tried[:_SHOWN]
    rows = [
        [
            trial.recipe.id,
            f"{trial.cost:.0%}",
            str(len(trial.gaps)),
            str(trial.changed),
            f"{trial.estimate.changed:.2%}",
            f"{trial.estimate.changed_upper:.2%}",
            f"{trial.mean_kl:.5f}",
            _STATES.get(trial.state, trial.state),
        ]
        for trial in shown
    ]
    headers = ["candidate", "FLOPs", "questions", "changed", "estimate", "at most", "mean KL", ""]
    table(headers, rows)
    counts: dict[str, int] = {}
    for trial in result.trials:
        counts[trial.state] = counts.get(trial.state, 0) + 1
    say(f"{len(result.trials)} candidates: " + ", ".join(f"{n} {state}" for state, n in sorted(counts.items())))
    refused = {s.recipe.method: s.reason for s in result.trials if s.state == "refused"}
    for method, reason in refused.items():
        say(f"{method}: {reason}")
    limit = [f"{bounds.max_changed:.2%} changed answers"] if bounds.max_changed is not None else []
    limit += [f"a mean KL of {bounds.max_divergence:g} nats"] if bounds.max_divergence is not None else []
    within = " and ".join(limit)
    chosen = result.chosen
    if chosen is None:
        say(f"Nothing; full model: no candidate is surely within {within} on these {result.samples} questions.")
        if bounds.max_changed is not None and bounds.max_changed < finest(result.samples):
            say(f"So few questions cannot show less than {finest(result.samples):.2%}: give more --samples.")
    else:
        say(
            f"Chosen: {chosen.recipe.id}, within {within} at {bounds.confidence:.0%} confidence. It saves "
            f"{1 - chosen.cost:.0%} of the prefill FLOPs, vision tower included; {chosen.visual_tokens:.1f} visual "
            "tokens enter a layer on average."
        )
    say(
        f"The search cost {result.prefills:.0f} full prefills and {result.seconds:.0f} s; every candidate on every "
        f"question would cost about {result.prefills_exhaustive:.0f} "
        f"({result.prefills_exhaustive / max(result.prefills, 1e-9):.1f} times as many)."
    )


def _write(request: Request, bounds: Any, report: dict[str, Any], chosen: Any) -> None:
    from .. import recipe

    measured: dict[str, Any] = {"questions": report["samples"]}
    if chosen is not None:
        guess = chosen.estimate
        measured |= {
            "flops_ratio": round(chosen.cost, 4),
            "visual_tokens_entering": round(chosen.visual_tokens, 1),
            "changed_answers": round(guess.changed, 5),
            "changed_answers_at_most": round(guess.changed_upper, 5),
            "mean_kl": round(chosen.mean_kl, 6),
        }
    if "check" in report:
        check = report["check"]
        measured["check"] = {"data": check["data"], "questions": check["samples"], "changed": check["changed"]}
    limits = {"max_changed": bounds.max_changed, "max_divergence": bounds.max_divergence}
    recipe.save(
        request.out,  # type: ignore[arg-type]
        recipe.FullModel() if chosen is None else chosen.recipe.build(),
        model=request.model,
        data=request.data,
        bound={
            **{name: value for name, value in limits.items() if value is not None}, "confidence": bounds.confidence
        },
        measured=measured,
    )  # fmt: skip
    say(f"Recipe: {request.out}")
