"""What a training run is: every choice in one place, the paper's as presets, and what makes two runs the same run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..reduction import OptionError

__all__ = ["PUMER_TASK", "TASKS", "Preset", "Settings", "preset", "same_run"]

TASKS = ("vqa", "nlvr2", "ve", "retrieval")
PUMER_TASK = {"vqa": "vqav2", "nlvr2": "nlvr2", "ve": "snli-ve", "retrieval": "retrieval"}
"""Task -> the `task` of `PuMer`, whose released settings are used unless options say otherwise."""


@dataclass(frozen=True)
class Preset:
    """Optimiser settings. Source, where nothing else is said: notes/cmd.md of csarron/PuMer @ 8a00d853.

    Attributes:
        lr: peak learning rate of the backbone.
        head_lr, cross_lr: multipliers for the head of the task and for co-attention layers.
        batch: examples per process and step (the paper has 8 processes).
    """

    lr: float
    batch: int
    head_lr: float = 1.0
    cross_lr: float = 1.0


_PRESETS = {
    ("vilt", "vqa"): Preset(1e-4, 64, 10),
    ("vilt", "ve"): Preset(1e-4, 64, 10),
    ("vilt", "nlvr2"): Preset(1e-4, 32, 10),
    ("vilt", "retrieval"): Preset(1e-4, 8, 10),  # not the paper's: one image goes with 16 texts
    ("meter", "vqa"): Preset(5e-6, 32, 50, 5),
    ("meter", "nlvr2"): Preset(5e-6, 12, 50, 5),
    ("meter", "ve"): Preset(2e-6, 24, 10, 5),
    ("meter", "retrieval"): Preset(5e-6, 2, 10, 5),  # not the paper's
}
_LORA, _DECODER = Preset(2e-4, 8), Preset(2e-5, 8)
"""LLaVA's usual rates, with adapters and without; no method's paper trains a decoder."""


def preset(family: str, task: str, lora: bool = False) -> Preset:
    """Settings for a model type ("vilt", "meter", ...) and task. BridgeTower takes METER's: no paper trained it so."""
    family = {"bridgetower": "meter"}.get(family, family)
    return _PRESETS.get((family, task), _LORA if lora else _DECODER)


@dataclass(frozen=True)
class Settings:
    """A training run. None means: as the preset for the model and task says.

    Attributes:
        method: "pumer", a method for decoders, or "none" for the full model.
        model, teacher: Hub id, local folder or zoo:NAME.
        data, eval_data: data sets, `NAME`, or `NAME=WEIGHT` in a mixture.
        task: "vqa", "nlvr2", "ve" or "retrieval".
        out: folder of the run.
        options: of the method, `keep` among them.
        epochs: passes over the data, if `steps` is not given; 20 with a teacher, 10 without.
        batch, accumulate: examples per process and pass, passes per step.
        task_weight, kd_weight, itm_weight: of the parts of the loss.
        augment: RandAugment on the images, as the paper does it.
        negatives: wrong texts per image in retrieval.
        lora_rank: 0 trains all weights.
        resume: True: there must be a checkpoint to go on from; False: there must be none; None: as it is.
        lora_targets: names of the linear layers that get an adapter; empty: those of the language model.
    """

    method: str
    model: str
    data: tuple[str, ...]
    out: Path
    task: str = "vqa"
    teacher: str | None = None
    eval_data: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    epochs: float | None = None
    batch: int | None = None
    accumulate: int = 1
    lr: float | None = None
    head_lr: float | None = None
    cross_lr: float | None = None
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 0.0
    seed: int = 2021
    task_weight: float = 1.0
    kd_weight: float = 1.0
    itm_weight: float = 0.5
    augment: bool = False
    negatives: int = 15
    skip_unknown: bool = False
    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = ()
    bf16: bool = False
    eval_samples: int = 1000
    eval_batch: int = 64
    eval_every: int = 500
    save_every: int = 500
    log_every: int = 20
    keep_checkpoints: int = 2
    workers: int = 0
    resume: bool | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise OptionError(f"task={self.task!r}: use {', '.join(TASKS)}")
        if self.steps is not None and self.epochs is not None:
            raise OptionError("give steps or epochs, not both")
        if not self.data:
            raise OptionError("data: name at least one data set")
        at_least_one = ("steps", "batch", "accumulate", "eval_samples", "eval_batch", "eval_every", "save_every")
        for name in (*at_least_one, "log_every", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name}={value}: at least 1 is needed")
        for name in ("lr", "epochs", "head_lr", "cross_lr", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise OptionError(f"{name}={value}: must be above 0")
        for name in ("weight_decay", "warmup", "clip", "task_weight", "kd_weight", "itm_weight", "lora_rank", "seed",
                     "workers", "negatives"):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise OptionError(f"{name}={getattr(self, name)}: must not be negative")
        if self.task == "retrieval" and not self.negatives:
            raise OptionError("negatives=0: retrieval needs wrong texts to tell the right one from")

    def filled(self, family: str, examples: int, processes: int) -> Settings:
        """All open choices made, for a model type and a mixture of `examples` examples."""
        known = preset(family, self.task, self.lora_rank > 0)
        batch = self.batch or known.batch
        steps = self.steps
        if steps is None:
            epochs = self.epochs or (20.0 if self.teacher else 10.0)
            steps = max(1, round(epochs * examples / (batch * self.accumulate * processes)))
        return dataclasses.replace(
            self,
            steps=steps,
            epochs=None,
            batch=batch,
            lr=self.lr or known.lr,
            head_lr=self.head_lr or known.head_lr,
            cross_lr=self.cross_lr or known.cross_lr,
            lora_alpha=self.lora_alpha or (2.0 * self.lora_rank or None),
        )

    def positions(self, processes: int) -> int:
        """Examples that the whole run sees, once filled in."""
        assert self.steps is not None
        assert self.batch is not None
        return self.steps * self.batch * self.accumulate * processes

    def identity(self, processes: int) -> dict[str, Any]:
        """What the final weights depend on, ready for JSON."""
        chosen = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _NO_MATTER}
        return json.loads(json.dumps({**chosen, "processes": processes}, default=str))


_NO_MATTER = {
    "out", "resume", "workers", "log_every", "eval_every", "save_every", "eval_batch", "eval_samples", "eval_data",
    "keep_checkpoints",
}  # fmt: skip
"""Settings that may differ between a run and its continuation."""


def same_run(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first difference between the identities of two runs, in words, or None."""
    for name in (*now, *before):
        if before.get(name) != now.get(name):
            return f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
    return None
