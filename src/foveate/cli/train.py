"""`foveate train`: training with visual tokens reduced."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import foveate

from .shell import (
    CommandError,
    JsonOption,
    KeepOption,
    OptionsOption,
    method_and_options,
    progress,
    say,
    table,
    writable,
    write_json,
)

__all__ = ["train"]

_FULL = "none"


def train(
    method: Annotated[str, typer.Argument(help="pumer, a method for decoders, or none (the full model).")],
    model: Annotated[str, typer.Option("--model", "-M", help="Student: Hub id, local folder or zoo:NAME.")],
    data: Annotated[str, typer.Option("--data", "-d", help="Data sets, by commas; NAME=WEIGHT mixes unevenly.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run; with a checkpoint in it, it goes on.")],
    task: Annotated[str, typer.Option("--task", "-t", help="vqa, nlvr2, ve or retrieval.")] = "vqa",
    teacher: Annotated[str | None, typer.Option("--teacher", "-T", help="Full model to learn from.")] = None,
    eval_data: Annotated[
        str | None, typer.Option("--eval-data", help="Held-out data; default: held out of --data.")
    ] = None,
    keep: KeepOption = None,
    option: OptionsOption = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of --epochs.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data; 20 with a teacher, else 10.")] = None,
    batch: Annotated[int | None, typer.Option(help="Examples per process and pass.")] = None,
    accumulate: Annotated[int, typer.Option(help="Passes per step.")] = 1,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    head_lr: Annotated[float | None, typer.Option(help="Its multiple for the head.")] = None,
    cross_lr: Annotated[float | None, typer.Option(help="Its multiple for co-attention layers.")] = None,
    weight_decay: Annotated[float, typer.Option(help="None on biases and norms.")] = 0.01,
    warmup: Annotated[float, typer.Option(help="Share of the steps.")] = 0.1,
    clip: Annotated[float, typer.Option(help="Longest gradient; 0 does not clip.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of order, augmentation, dropout and fresh heads.")] = 2021,
    task_weight: Annotated[float, typer.Option(help="Weight of the task's loss.")] = 1.0,
    kd_weight: Annotated[float, typer.Option(help="Weight of the distillation.")] = 1.0,
    itm_weight: Annotated[float, typer.Option(help="Weight of image-text matching; ViLT and METER only rank.")] = 0.5,
    negatives: Annotated[int, typer.Option(help="Wrong texts per image (retrieval).")] = 15,
    augment: Annotated[bool, typer.Option("--augment", help="RandAugment, as in the paper.")] = False,
    skip_unknown: Annotated[bool, typer.Option("--skip-unknown", help="Leave out rows that no label fits.")] = False,
    lora_rank: Annotated[int, typer.Option(help="Of the adapters of a decoder; 0 trains all weights.")] = 0,
    lora_alpha: Annotated[float | None, typer.Option(help="Default: twice the rank.")] = None,
    lora_targets: Annotated[str | None, typer.Option(help="Names of linear layers, by commas.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision.")] = False,
    eval_samples: Annotated[int, typer.Option(help="Held-out rows per data set.")] = 1000,
    eval_batch: Annotated[int, typer.Option(help="Rows evaluated at once.")] = 64,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 500,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    log_every: Annotated[int, typer.Option(help="Steps between records.")] = 20,
    keep_checkpoints: Annotated[int, typer.Option(help="Checkpoints that stay.")] = 2,
    workers: Annotated[int, typer.Option(help="Processes that prepare data.")] = 0,
    resume: Annotated[bool | None, typer.Option("--resume/--no-resume", help="Insist on it, or refuse it.")] = None,
    json: JsonOption = None,
) -> None:
    """Train a model with its visual tokens reduced: a PuMer student of a full teacher, or a decoder by LoRA.

    Without --teacher: plain fine-tuning. METHOD none trains the full model. Several GPUs or machines: put
    `accelerate launch -m foveate.cli` in front of `train`.

    Example: foveate train pumer --model zoo:tiny-vilt --teacher zoo:tiny-vilt --data easy-vqa,scenes --out student
    """
    from ..train import Settings, TrainingError, run
    from ..train.common import main_process
    from ..train.settings import PUMER_TASK, TASKS

    if task not in TASKS:
        raise CommandError(f"task {task!r}: use {', '.join(TASKS)}")
    option = list(option or ())
    if method == "pumer" and not any(text.startswith("task=") for text in option):
        option.append(f"task={PUMER_TASK[task]}")
    reducer, options = (None, {}) if method == _FULL else method_and_options(method, keep, option)
    if method == _FULL and (keep is not None or option):
        raise CommandError("keep, option: method none reduces nothing")
    if keep is not None:
        options = {**options, "keep": foveate.Budget.parse(keep).keep}
    writable(json)
    settings = Settings(
        method=method, model=model, teacher=teacher, data=_names(data), eval_data=_names(eval_data), task=task, out=out,
        options=options, steps=steps, epochs=epochs, batch=batch, accumulate=accumulate, lr=lr, head_lr=head_lr,
        cross_lr=cross_lr, weight_decay=weight_decay, warmup=warmup, clip=clip, seed=seed, task_weight=task_weight,
        kd_weight=kd_weight, itm_weight=itm_weight, negatives=negatives, augment=augment, skip_unknown=skip_unknown,
        lora_rank=lora_rank, lora_alpha=lora_alpha, lora_targets=_names(lora_targets), bf16=bf16,
        eval_samples=eval_samples, eval_batch=eval_batch, eval_every=eval_every, save_every=save_every,
        log_every=log_every, keep_checkpoints=keep_checkpoints, workers=workers, resume=resume,
    )  # fmt: skip
    try:
        with progress("training") as advance:
            result = run(settings, reducer, advance, _report)
    except TrainingError as error:
        raise CommandError(str(error)) from error
    if main_process():
        _show(result, out)
        write_json(json, result)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name for part in (text or "").split(",") if (name := part.strip()))


def _report(record: Mapping[str, Any]) -> None:
    """One line per record; evaluations and losses in the same form."""
    shown = {name: value for name, value in record.items() if name not in ("step", "epoch") and not _costs(name)}
    if shown:
        say(f"step {record['step']}: " + ", ".join(f"{name} {value:.4g}" for name, value in shown.items()))


def _costs(name: str) -> bool:
    return name.endswith(("_per_second", "_runtime", "total_flos", "grad_norm"))


def _show(result: Mapping[str, Any], out: Path) -> None:
    """A table of accuracies, if any were measured."""
    columns = {"before training": "before", "after": "accuracy", "teacher": "accuracy_teacher"}
    columns = {title: name for title, name in columns.items() if result.get(name)}
    sets = list(result.get("accuracy") or {})
    if sets:
        cell = lambda name, key: f"{result[key][name]:.2%}" if name in result[key] else "-"  # noqa: E731
        table(
            ["accuracy", *columns],
            [[name, *(cell(name, key) for key in columns.values())] for name in sets],
        )
    say(f"{result['steps']} steps in {result['seconds']:.0f} s. Model: {out}")
