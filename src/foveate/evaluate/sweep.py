"""Methods x budgets x seeds on questions, in a folder: stopped and gone on with at will, by one process or several.

A kill loses at most the batch in hand. What the full model said to a batch that was cut short is worked out again (the
others are compared with it), but no finished answer is asked for twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from ..reduction import type_of
from . import data as datasets
from . import results
from .answer import VLM, ZOO
from .costs import prefill_spreads
from .data import Sample
from .metrics import choose
from .runner import Record, Runner
from .store import Folder, Plan, SweepError

__all__ = ["Questions", "fingerprint", "machine", "questions", "run_shard", "shared_threads", "sweep"]

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


class Questions:
    """Samples of several data sets in one list.

    Attributes:
        samples: all of them.
        data: for each the name of its data set.
        metrics: metric of each data set.
    """

    def __init__(self, parts: dict[str, list[Sample]], metric: str):
        self.samples = [sample for part in parts.values() for sample in part]
        self.data = [name for name, part in parts.items() for _ in part]
        self.metrics = {name: choose(metric, part, name) for name, part in parts.items()}


def questions(
    data: Sequence[str], count: int | None, seed: int, metric: str, frames: int = datasets.FRAMES
) -> Questions:
    """Draw the questions of a plan. Raises `DataError`."""
    return Questions({name: datasets.load(name, count, seed, frames) for name in data}, metric)


def fingerprint(model: nn.Module) -> str:
    """16 hex digits that tell one set of weights from another: names, shapes and a few numbers of each tensor."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)}".encode())
        some = value.detach().flatten()[:: max(1, value.numel() // 16)]
        digest.update(repr(some.cpu().double().tolist()).encode())
    return digest.hexdigest()[:16]


def machine() -> dict[str, Any]:
    """What the times were taken on."""
    import transformers

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


@contextlib.contextmanager
def shared_threads(workers: int) -> Iterator[None]:
    """Share the threads of torch out among `workers` processes, as long as they work."""
    before = torch.get_num_threads()
    if workers > 1:
        torch.set_num_threads(max(1, before // workers))
    try:
        yield
    finally:
        if workers > 1:
            torch.set_num_threads(before)


def notes(plan: Plan, vlm: VLM, asked: Questions) -> list[str]:
    """What has to be known to read the numbers of questions about videos; [] without any."""
    if all(getattr(sample, "video", None) is None for sample in asked.samples):
        return []
    found = [f"Of each video the model is shown {plan.frames} frames, or fewer if it has fewer."]
    if not vlm.sees_videos:
        found.append(f"{plan.model} takes no videos: the frames go in as images, numbered as one video.")
    if not vlm.sees_videos or plan.model.startswith(ZOO):
        found.append("It was never trained on videos: read tokens, FLOPs and times, not accuracy.")
    return found


def runner_of(plan: Plan, vlm: VLM, asked: Questions, share_vision: bool = True) -> Runner:
    """The runner that a plan describes."""
    return Runner(
        vlm, asked.samples, [asked.metrics[name] for name in asked.data], plan.recipes[1:],
        batch_size=plan.batch_size, max_new_tokens=plan.max_new_tokens, share_vision=share_vision,
    )  # fmt: skip


def sweep(
    folder: Folder,
    plan: Plan,
    vlm: VLM,
    asked: Questions,
    workers: int = 1,
    timing_batches: int = 2,
    timing_repeats: int = 3,
    share_vision: bool = True,
    progress: Progress | None = None,
    timing_progress: Progress | None = None,
) -> dict[str, Any]:
    """Do what is planned and not done yet; write and return the result.

    Args:
        workers: processes, this one included.
        timing_batches, timing_repeats: batches whose prefill is timed, and how often; 0 for no times.

    Raises:
        SweepError: the folder holds another sweep, cannot be used, or a process failed.
    """
    modules = _modules(plan) if workers > 1 else []
    with folder.locked():
        folder.begin(plan, asked.samples, asked.data)
        runner = runner_of(plan, vlm, asked, share_vision)
        with shared_threads(workers), _helpers(folder, workers, share_vision, modules) as watch:
            run_shard(folder, runner, 0, workers, lambda done, total: watch(done, total, progress))
            watch.wait(progress)
        records = _in_order(runner, folder)
        folder.arrange(records)
        failed = {record.recipe for record in records if record.error}
        times = _times(folder, runner, failed, timing_batches, timing_repeats, timing_progress)
        rows = results.rows(plan.recipes[1:], asked.samples, asked.data, asked.metrics, records, times)
        result = {
            "model": plan.model,
            "data": plan.data,
            "samples": len(asked.samples),
            "seed": plan.seed,
            "metrics": asked.metrics,
            "rows": rows,
            "verdicts": results.verdicts(rows),
            "refused": plan.refused,
            "notes": notes(plan, vlm, asked),
        }
        folder.write_result(result)
    return result


def run_shard(folder: Folder, runner: Runner, shard: int, shards: int, progress: Progress | None = None) -> None:
    """Answer every `shards`-th batch from number `shard` on, as far as it is not answered.

    Args:
        progress: called with the answers given and to be given in this shard, in this run.
    """
    known = folder.records().keys()
    mine = runner.groups[shard::shards]
    open_ = [
        [number for number, c in enumerate(runner.recipes) if any((c.id, i) not in known for i in group)]
        for group in mine
    ]
    total, done = sum(len(group) * len(wanted) for group, wanted in zip(mine, open_)), 0
    for group, wanted in zip(mine, open_):
        if not wanted:
            continue
        for records in runner.ask(runner.batch(group), wanted):
            folder.append(shard, [record for record in records if (record.recipe, record.sample) not in known])
            done += len(records)
            if progress is not None:
                progress(done, total)


def _in_order(runner: Runner, folder: Folder) -> list[Record]:
    known = folder.records()
    return [known[each.id, i] for each in runner.recipes for i in range(len(runner.samples))]


def _times(
    folder: Folder, runner: Runner, failed: set[str], batches: int, repeats: int, progress: Progress | None
) -> dict[str, dict[str, Any]]:
    """Prefill times of the first seed of each row, taken anew if any is missing: they only compare within one run.

    Those that `failed` are not timed.
    """
    first = {each.row: number for number, each in reversed(list(enumerate(runner.recipes)))}
    chosen = sorted(number for number in first.values() if runner.recipes[number].id not in failed)
    wanted = [runner.recipes[number].id for number in chosen]
    times = folder.times()
    if not (batches and repeats):
        return times
    if not set(wanted) <= times.keys():
        reducers = [runner.reducers[number] for number in chosen]
        spreads = prefill_spreads(runner.vlm, runner.largest(batches), reducers, repeats, progress)
        times = {name: spread.to_json() for name, spread in zip(wanted, spreads, strict=True)}
        folder.write_times(times)
    return times


# ---------------------------------------------------------------------------------------------------- several processes
class _Watch:
    """Counts what all processes have answered, and notices when one fails."""

    def __init__(self, folder: Folder, processes: list[tuple[subprocess.Popen[bytes], IO[bytes]]]):
        self.processes = processes
        self.files = [folder.shard(number) for number in range(1, len(processes) + 1)]
        self.before = self._answered()
        self.own: tuple[int, int] = (0, 0)

    def _answered(self) -> int:
        return sum(path.read_bytes().count(b"\n") for path in self.files if path.exists())

    def __call__(self, done: int, total: int, progress: Progress | None) -> None:
        self.own = done, total
        self._check()
        if progress is not None:
            shards = len(self.processes) + 1
            progress(done + self._answered() - self.before, total * shards)

    def _check(self) -> bool:
        """Whether all are done. Raises `SweepError` if one failed."""
        states = [process.poll() for process, _ in self.processes]
        for state, (_, log) in zip(states, self.processes):
            if state:
                log.seek(0)
                said = log.read().decode(errors="replace").strip().splitlines()
                raise SweepError(f"a worker failed: {said[-1] if said else f'exit code {state}'}")
        return all(state == 0 for state in states)

    def wait(self, progress: Progress | None) -> None:
        """Until the last process is done."""
        while not self._check():
            self(*self.own, progress)
            time.sleep(0.2)


def _modules(plan: Plan) -> list[str]:
    """Modules of methods from outside, which a further process has to import before it knows their names."""
    methods = {member.method for recipe in plan.recipes if not recipe.is_full for member in recipe.members}
    modules = {type_of(method).__module__: method for method in sorted(methods)}
    if "__main__" in modules:
        raise SweepError(f"method {modules['__main__']} is defined in a script: workers cannot import it, use 1 worker")
    return [module for module in modules if module.partition(".")[0] != __name__.partition(".")[0]]


@contextlib.contextmanager
def _helpers(folder: Folder, workers: int, share_vision: bool, modules: Sequence[str]) -> Iterator[_Watch]:
    """The processes beside this one. They end when it ends: their standard input closes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each or os.getcwd() for each in sys.path)}
    processes: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
    with contextlib.ExitStack() as stack:
        try:
            for number in range(1, workers):
                command = [sys.executable, "-m", "foveate.evaluate.worker", str(folder.path), str(number), str(workers)]
                log = stack.enter_context(tempfile.TemporaryFile())
                command += [f"--import={module}" for module in modules]
                command += [] if share_vision else ["--no-share-vision"]
                process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log
                )
                processes.append((process, log))
            yield _Watch(folder, processes)
        finally:
            for process, _ in processes:
                process.kill()
                process.wait()
                if process.stdin is not None:
                    process.stdin.close()
