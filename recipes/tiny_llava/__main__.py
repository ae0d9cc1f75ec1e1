"""Train the tiny LLaVA from nothing: ``python -m recipes.tiny_llava``.

Five stages, then export, evaluation and the model card:

1. ``vision`` and ``language`` side by side: the vision tower learns what every patch shows, the language model to
   answer from symbols that say the same;
2. ``fit``: vision tower and projector learn to produce these symbols;
3. ``joint``: everything together on pixels, all 196 visual tokens;
4. ``polish``: projector and language model alone, on what the finished tower sees.

Interrupted? Run the same command again: every stage goes on from its last checkpoint, finished ones are skipped.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from foveate.zoo import path

from ..install import install
from ..loop import finished, progress
from .card import write_card
from .evaluate_all import EASY, SCENES, evaluate_all
from .export import export

STEPS = {"vision": 4200, "language": 1100, "fit": 240, "joint": 1500, "polish": 2000}
ROUNDS = (("vision", "language"), ("fit",), ("joint",), ("polish",))
"""Stages of one round run at the same time."""
ALONE = {"language", "polish"}
"""Stages that use one worker."""


def main() -> None:
    """Parse the command line and run what is left to do."""
    options = _options()
    options.run = options.run.resolve()  # workers meet at a file:// address
    options.run.mkdir(parents=True, exist_ok=True)
    console = Console()
    steps = {name: getattr(options, f"{name}_steps") for name in STEPS}
    with _bars(console) as bars:
        for stages in ROUNDS:
            left = [name for name in stages if not finished(options.run, name, steps[name])]
            _train(options, left, steps, bars)
    folder = export(options.run, options.seed)
    with console.status("evaluating"):
        results = evaluate_all(folder, options.run, tuple(STEPS), options.test_scenes, options.test_easy)
    write_card(folder / "README.md", results)
    install(folder, options.target)
    console.print(f"accuracy {results['accuracy']['overall']['accuracy']:.3f}; installed in {options.target}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes.tiny_llava", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/tiny-llava"), help="checkpoints and logs")
    parser.add_argument("--target", type=Path, default=path("tiny-llava"), help="where the checkpoint is installed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=2, help="per stage; part of the recipe, for batches grow with it"
    )
    for name, steps in STEPS.items():
        parser.add_argument(f"--{name}-steps", type=int, default=steps)
    parser.add_argument("--test-scenes", type=int, default=SCENES, help="scenes to measure on, 5 questions each")
    parser.add_argument("--test-easy", type=int, default=EASY, help="easy-VQA questions to measure on")
    return parser.parse_args()


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description:>9}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    return Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[state]}"), console=console)


def _train(options: argparse.Namespace, stages: list[str], steps: dict[str, int], bars: Progress) -> None:
    """Start the workers of some stages, show their progress, and stop all if one fails."""
    tasks = {name: bars.add_task(name, total=steps[name], state="") for name in stages}
    with ExitStack() as stack:
        running = []
        for name in stages:
            workers = 1 if name in ALONE else options.workers
            for worker in range(workers):
                running.append(_start(options, name, worker, workers, steps[name]))
                stack.callback(_stop, running[-1])
        while any(process.poll() is None for process in running):
            time.sleep(1)
            if any(process.poll() for process in running):
                break
            _show(options.run, tasks, bars)
        codes = [process.poll() for process in running]
    if any(codes):
        raise SystemExit(f"a worker of {' / '.join(stages)} failed (exit codes {codes}); its traceback is above")
    _show(options.run, tasks, bars)


def _start(options: argparse.Namespace, name: str, worker: int, workers: int, steps: int) -> subprocess.Popen[bytes]:
    numbers = [str(number) for number in (options.seed, worker, workers, steps)]
    command = [sys.executable, "-m", "recipes.tiny_llava.worker", name, str(options.run), *numbers]
    # One session each: on Linux a busy desktop's scheduler shares the cores between sessions, not processes.
    return subprocess.Popen(command, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        process.wait()


def _show(run: Path, tasks: dict[str, TaskID], bars: Progress) -> None:
    for name, task in tasks.items():
        line = progress(run, name)
        if line:
            bars.update(task, completed=line["step"], state=f"loss {line['loss']:.3f}")


if __name__ == "__main__":
    main()
