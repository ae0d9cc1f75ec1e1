"""Train the tiny ViLT and its PuMer student: ``python -m recipes.tiny_vilt``.

The teacher in three stages, then export; evaluation and card:

1. ``see``: patch embedding and lower layers, from the tiny LLaVA's vision tower, learn again what every patch shows;
2. ``ask``: the upper layers learn to answer from a few tokens, one per object at first;
3. ``joint``: everything together on all patches, twelve questions per image, of which the first is exactly ViLT.

The student in two: ``reduced``, which starts as the teacher and has its tokens reduced for all questions of an image at
once, and ``foveate train pumer``.

Interrupted? Run the same command again: every stage goes on from its last checkpoint, finished ones are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import ViltForQuestionAnswering

from foveate.zoo import path

from ..install import install
from ..loop import finished, progress
from .card import measure, student_card, teacher_card
from .model import processor
from .stages import load_model

TEACHER = {"see": 400, "ask": 600, "joint": 1300}
STEPS = {**TEACHER, "reduced": 2000}
STUDENT_STEPS, STUDENT_BATCH = 150, 32
STUDENT = ("--task", "vqa", "--data", "easy-vqa=1,scenes=3", "--lr", "5e-5", "--head-lr", "1", "--clip", "1")
"""Options of ``foveate train pumer``; PuMer's own are the released ones for ViLT on VQAv2."""


def main() -> None:
    """Parse the command line and run what is left to do."""
    options = _options()
    options.run = options.run.resolve()
    options.run.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    steps = {name: getattr(options, f"{name}_steps") for name in STEPS}
    teacher, start, student = (options.run / name for name in ("teacher", "start", "student-export"))
    with _bars(console) as bars:
        for name in TEACHER:
            _train(options, name, steps[name], bars)
    _export(load_model(options.run, options.seed, "joint"), teacher)
    counts = options.test_scenes, options.test_easy
    with console.status("evaluating"):
        full, untrained = measure(teacher, *counts), measure(teacher, *counts, few=True)
    teacher_card(teacher / "README.md", options.run, TEACHER, full, options.note)
    install(teacher, path("tiny-vilt"))
    with _bars(console) as bars:
        _train(options, "reduced", steps["reduced"], bars)
    _export(load_model(options.run, options.seed, "reduced"), start)
    result = _student(options, start, teacher)
    _export(ViltForQuestionAnswering.from_pretrained(options.run / "student", dtype=torch.float32), student)
    with console.status("evaluating"):
        found = full, untrained, measure(student, *counts, few=True)
    student_card(student / "README.md", options.run, found, result, options.student_note)
    install(student, path("tiny-vilt-pumer"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes.tiny_vilt", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/tiny-vilt"), help="checkpoints and logs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="part of the recipe, for batches grow with it")
    for name, steps in STEPS.items():
        parser.add_argument(f"--{name}-steps", type=int, default=steps)
    parser.add_argument("--student-steps", type=int, default=STUDENT_STEPS, help="of foveate train pumer")
    parser.add_argument("--test-scenes", type=int, default=400, help="scenes to measure on, 5 questions each")
    parser.add_argument("--test-easy", type=int, default=1000, help="easy-VQA questions to measure on")
    parser.add_argument("--note", default="", help="a sentence for the teacher's card")
    parser.add_argument("--student-note", default="", help="a sentence for the student's card")
    return parser.parse_args()


def _export(model: Any, folder: Path) -> None:
    """Write a standard Transformers folder: fp16 safetensors, tokenizer, image processor."""
    model.half().save_pretrained(folder)
    processor().save_pretrained(folder)


def _student(options: argparse.Namespace, start: Path, teacher: Path) -> dict[str, Any]:
    """Train the student with Foveate's own command, as anybody would; it goes on after an interruption."""
    out = options.run / "student"
    command = [sys.executable, "-m", "foveate.cli", "train", "pumer", *STUDENT, "--out", str(out)]
    command += ["--model", str(start), "--teacher", str(teacher), "--batch", str(STUDENT_BATCH)]
    command += ["--steps", str(options.student_steps), "--eval-every", str(options.student_steps)]
    command += ["--save-every", "50", "--eval-samples", "64"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads((out / "result.json").read_text())


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description:>6}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    return Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[state]}"), console=console)


def _train(options: argparse.Namespace, name: str, steps: int, bars: Progress) -> None:
    """Start the workers of a stage unless it is finished, show their progress, and stop all if one fails."""
    if finished(options.run, name, steps):
        return
    task = bars.add_task(name, total=steps, state="")
    with ExitStack() as stack:
        running = []
        for worker in range(options.workers):
            numbers = [str(number) for number in (options.seed, worker, options.workers, steps)]
            command = [sys.executable, "-m", "recipes.tiny_vilt.worker", name, str(options.run), *numbers]
            # One session each: Linux may share its cores between sessions, not processes.
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            running.append(subprocess.Popen(command, start_new_session=True, env=environment))
            stack.callback(_stop, running[-1])
        while any(process.poll() is None for process in running) and not any(process.poll() for process in running):
            time.sleep(1)
            if line := progress(options.run, name):
                bars.update(task, completed=line["step"], state=f"loss {line['loss']:.3f}")
        codes = [process.poll() for process in running]
    if any(codes):
        raise SystemExit(f"a worker of {name} failed (exit codes {codes}); its traceback is above")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
