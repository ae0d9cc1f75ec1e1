"""The training loop that every stage shares: restartable, and the same whatever the number of workers' speed.

Nothing random is carried over between steps: the data of a step are drawn from (seed, stage, step, worker), so that a
restart from a checkpoint goes on exactly where it stopped. Workers are processes with one thread each that average
their gradients (gloo); two of them are faster than two threads on models this small.
"""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

__all__ = ["Place", "Stage", "finished", "load_stage", "progress"]

SAVE_EVERY = 200
REPORT_EVERY = 20

Report = Mapping[str, float | tuple[int, int]]
"""What a step reports: plain numbers, and (right, asked) pairs."""


@dataclass(frozen=True)
class Place:
    """Where a run lives and who this process is in it."""

    folder: Path
    seed: int = 0
    worker: int = 0
    workers: int = 1

    def rng(self, stage: str, step: int) -> np.random.Generator:
        """The random numbers of one step of one worker."""
        return np.random.default_rng([self.seed, zlib.crc32(stage.encode()), step, self.worker])

    def connect(self, stage: str) -> None:
        """Join the other workers of this stage; also sets one thread and the torch seed."""
        torch.set_num_threads(1)
        torch.manual_seed(self.seed)
        if self.workers > 1:
            meeting = self.folder / f".{stage}-{os.getppid()}"  # one file per launch: a stale one would deadlock
            distributed.init_process_group(
                "gloo", init_method=f"file://{meeting}", rank=self.worker, world_size=self.workers
            )


@dataclass
class Stage:
    """One stage of training.

    Attributes:
        modules: what is saved; loaded again on restart.
        rates: peak learning rate per module name; modules without one are frozen.
        loss: (rng, step) -> (loss, report).
    """

    name: str
    steps: int
    modules: Mapping[str, nn.Module]
    rates: Mapping[str, float]
    loss: Callable[[np.random.Generator, int], tuple[Tensor, Report]]
    decay: float = 0.05
    warmup: int = 60

    def run(self, place: Place) -> None:
        """Train to the last step, from the last checkpoint if there is one."""
        optimizer = self._optimizer()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        first = self._restore(place, optimizer)
        log = _Log(place, self.name, self.steps, first)
        for step in range(first, self.steps):
            scale = min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
            for group in optimizer.param_groups:
                group["lr"] = scale * group["peak"]
            loss, report = self.loss(place.rng(self.name, step), step)
            optimizer.zero_grad()
            loss.backward()
            _average(parameters, place.workers)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            log.add(step + 1, loss.item(), report)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == self.steps:
                self._save(place, optimizer, step + 1)

    def _optimizer(self) -> torch.optim.AdamW:
        groups: list[dict[str, Any]] = []
        seen: set[int] = set()
        for name, module in self.modules.items():
            trained = name in self.rates
            for parameter in module.parameters():
                parameter.requires_grad_(trained)
            own = [p for p in module.parameters() if trained and id(p) not in seen]  # tied weights once
            seen.update(map(id, own))
            for wide in (True, False):
                chosen = [p for p in own if (p.dim() > 1) == wide]
                if chosen:
                    decay = self.decay if wide else 0.0
                    groups.append({"params": chosen, "weight_decay": decay, "peak": self.rates[name]})
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)

    def _save(self, place: Place, optimizer: torch.optim.Optimizer, step: int) -> None:
        if place.worker:
            return
        state = {"step": step, "optimizer": optimizer.state_dict()}
        state["modules"] = {name: module.state_dict() for name, module in self.modules.items()}
        path = _checkpoint(place.folder, self.name)
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def _restore(self, place: Place, optimizer: torch.optim.Optimizer) -> int:
        path = _checkpoint(place.folder, self.name)
        if not path.exists():
            return 0
        state = torch.load(path, weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"]


def load_stage(folder: Path, name: str, modules: Mapping[str, nn.Module]) -> None:
    """Load the weights that a finished stage left."""
    state = torch.load(_checkpoint(folder, name), weights_only=True)
    for key, module in modules.items():
        module.load_state_dict(state["modules"][key])


def finished(folder: Path, name: str, steps: int) -> bool:
    """Whether a stage has been trained to its last step."""
    path = _checkpoint(folder, name)
    return path.exists() and torch.load(path, weights_only=True, mmap=True)["step"] >= steps


def progress(folder: Path, name: str) -> dict[str, float]:
    """The last report of a stage: step, steps, seconds, loss and what the stage measures. Empty if it has not begun."""
    path = folder / f"{name}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1]) if lines else {}


def _checkpoint(folder: Path, name: str) -> Path:
    return folder / f"{name}.pt"


def _average(parameters: list[nn.Parameter], workers: int) -> None:
    if workers == 1:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= workers
    for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.grad = piece.view_as(parameter)


class _Log:
    """Averages of the reports since the last line, one JSON line per `REPORT_EVERY` steps; worker 0 only."""

    def __init__(self, place: Place, name: str, steps: int, first: int) -> None:
        self.path = place.folder / f"{name}.jsonl" if place.worker == 0 else None
        self.steps, self.start = steps, time.monotonic()
        self.before = progress(place.folder, name).get("seconds", 0.0) if first else 0.0
        self.sums: dict[str, tuple[float, float]] = {}

    def add(self, step: int, loss: float, report: Report) -> None:
        if self.path is None:
            return
        for key, value in {"loss": loss, **report}.items():
            right, asked = value if isinstance(value, tuple) else (value, 1)
            old = self.sums.get(key, (0.0, 0.0))
            self.sums[key] = old[0] + right, old[1] + asked
        if step % REPORT_EVERY == 0 or step == self.steps:
            seconds = self.before + time.monotonic() - self.start
            line = {"step": step, "steps": self.steps, "seconds": round(seconds, 1)}
            line |= {key: round(total / max(count, 1), 4) for key, (total, count) in self.sums.items()}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.sums = {}
