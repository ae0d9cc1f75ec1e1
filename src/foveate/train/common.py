"""What a run does for every kind of model: its folder, its Trainer, several processes, and the result."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..engine.apply import apply
from ..files import write_whole
from ..reduction import Reducer
from .settings import Settings, same_run

__all__ = [
    "Progress",
    "Report",
    "TrainingError",
    "carry_out",
    "finished",
    "last_checkpoint",
    "main_process",
    "need",
    "processes",
]

Progress = Callable[[int, int], None]
Report = Callable[[Mapping[str, float]], None]

IDENTITY = "run.json"
RESULT = "result.json"
START = "start.json"


class TrainingError(ValueError):
    """A run that cannot be started: something is missing, or its folder holds another one. The message names it."""


def carry_out(
    settings: Settings,
    identity: Mapping[str, Any],
    model: Any,
    reducer: Reducer | None,
    held: Any,
    make: Callable[..., Any],
    save: Callable[[], None],
    progress: Progress | None,
    report: Report | None,
) -> dict[str, Any]:
    """Train with the reducer at work, and write the result.

    Args:
        model: what the reducer is applied to.
        held: evaluation rows.
        make: makes the trainer, given what all trainers share.
        save: writes the trained model.
    """
    from transformers import PrinterCallback

    from .trainer import Watcher

    checkpoint = resume_from(settings)
    with contextlib.nullcontext() if reducer is None else apply(model, reducer):
        trainer = make(
            args=arguments(settings),
            settings=settings,
            names=[source.name for source in held.sources],
            callbacks=[Watcher(progress, report)],
        )
        trainer.remove_callback(PrinterCallback)
        if main_process():
            write(settings.out / IDENTITY, identity)
        start = measured_once(settings.out / START, trainer.start)
        begun = time.monotonic()
        trainer.train(resume_from_checkpoint=checkpoint)
        seconds = time.monotonic() - begun
        accuracy = trainer.last_accuracy()
    result = {**identity, **start, "accuracy": accuracy, "seconds": seconds, "history": trainer.state.log_history}
    if main_process():
        save()
        write(settings.out / RESULT, result)
    return result


def need(package: str) -> None:
    """Raises `TrainingError` if an optional dependency is not installed."""
    if importlib.util.find_spec(package) is None:
        raise TrainingError(f"training needs {package}: pip install 'foveate[train]'")


# ------------------------------------------------------------------------------------------------------- the folder
def last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that was written to its end: the trainer's state comes last."""
    found = []
    for state in out.glob("checkpoint-*/trainer_state.json"):
        try:
            found.append((int(json.loads(state.read_text())["global_step"]), state.parent))
        except (OSError, ValueError, KeyError):
            continue
    return max(found)[1] if found else None


def finished(out: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of a run that is done already. Raises `TrainingError` if the folder is another run's."""
    _claim(out, identity)
    result = out / RESULT
    return json.loads(result.read_text()) if result.is_file() else None


def _claim(out: Path, identity: Mapping[str, Any]) -> None:
    if out.exists() and not out.is_dir():
        raise TrainingError(f"out {out}: a file; give a folder")
    path = out / IDENTITY
    if path.is_file():
        difference = same_run(json.loads(path.read_text()), identity)
        if difference is not None:
            raise TrainingError(f"out {out}: holds a run with other settings ({difference}); give another folder")
    elif last_checkpoint(out) is not None or (out / "config.json").exists():
        raise TrainingError(f"out {out}: holds a model or checkpoints of something else; give another folder")


def measured_once(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file holds from an earlier start of the run; else what is measured now, and kept there."""
    if path.is_file():
        return json.loads(path.read_text())
    found = measure()
    if main_process():
        write(path, found)
    return found


def write(path: Path, content: Any) -> None:
    """JSON, whole or not at all."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def resume_from(settings: Settings) -> str | None:
    """Checkpoint to go on from; newer ones, which were cut off, are removed. Raises `TrainingError`."""
    out, checkpoint = settings.out, last_checkpoint(settings.out)
    if settings.resume and checkpoint is None:
        raise TrainingError(f"out {out}: has no checkpoint to resume from")
    if settings.resume is False and checkpoint is not None:
        raise TrainingError(f"out {out}: has a checkpoint, {checkpoint.name}; resume it, or give another folder")
    _forget_partial(out, checkpoint)
    return None if checkpoint is None else str(checkpoint)


def _forget_partial(out: Path, kept: Path | None) -> None:
    for folder in out.glob("checkpoint-*"):
        if kept is None or int(folder.name.split("-")[-1]) > int(kept.name.split("-")[-1]):
            shutil.rmtree(folder)


def arguments(settings: Settings) -> Any:
    """The Trainer's arguments for a run."""
    import torch
    from transformers import TrainingArguments

    assert settings.steps is not None
    assert settings.batch is not None
    return TrainingArguments(
        output_dir=str(settings.out),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr or 0.0,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="polynomial",
        warmup_steps=round(settings.warmup * settings.steps),
        max_grad_norm=settings.clip,
        seed=settings.seed,
        bf16=settings.bf16,
        logging_steps=settings.log_every,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=settings.keep_checkpoints,
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_drop_last=True,
        remove_unused_columns=False,
        report_to=["tensorboard"] if importlib.util.find_spec("tensorboard") else [],
        disable_tqdm=True,
        label_names=["labels"],
    )


def main_process() -> bool:
    """Whether this process speaks and writes for all."""
    from accelerate import PartialState

    return PartialState().is_main_process


def processes() -> int:
    """How many processes train together.

    Raises:
        TrainingError: several were started, but they do not know of each other and would write to one folder.
    """
    from accelerate import PartialState

    count, started = PartialState().num_processes, int(os.environ.get("WORLD_SIZE", "1"))
    if count != started:
        raise TrainingError(
            f"{started} processes were started, but each trains alone: use accelerate launch "
            f"{'' if torch.cuda.is_available() else '--cpu '}--num_processes {started} -m foveate.cli train ..."
        )
    return count
