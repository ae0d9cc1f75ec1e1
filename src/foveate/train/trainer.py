"""The Trainer of transformers with what training under reduction needs: losses, learning rates, no hidden state.

Distribution over devices and machines, mixed precision, checkpoints and their rotation, TensorBoard: transformers' own
(`accelerate launch -m foveate.cli train ...`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from .losses import distillation, matching_loss, rank_scores, row_scores, task_loss
from .models import HEADS
from .settings import Settings

__all__ = ["EncoderTrainer", "ReducedTrainer", "Watcher", "groups"]

_NO_DECAY = re.compile(r"bias$|norm", re.IGNORECASE)
_CROSS = "cross_modal"


def groups(named: Iterable[tuple[str, nn.Parameter]], settings: Settings) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: head and co-attention layers learn faster, biases and norms do not decay.

    Source: utils/train_utils.py of csarron/PuMer @ 8a00d853.
    """
    assert settings.lr is not None
    sorted_in: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        rate = settings.lr
        if any(part in HEADS for part in name.split(".")):
            rate *= settings.head_lr or 1.0
        elif _CROSS in name:
            rate *= settings.cross_lr or 1.0
        decay = 0.0 if _NO_DECAY.search(name) else settings.weight_decay
        sorted_in.setdefault((rate, decay), []).append(parameter)
    # The Trainer logs the rate of the first group, which shall be the backbone's.
    ordered = sorted(sorted_in.items(), key=lambda group: group[0][0] != settings.lr)
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in ordered]


class ReducedTrainer(Trainer):
    """What all our trainings share. Subclasses define `compute_loss` and `scores`.

    Every step starts from random numbers of its own, (seed, step, pass, process), and rows are read in the order of
    their positions, so a run that goes on from a checkpoint ends with the weights of one that was never interrupted.

    Args:
        settings: all filled in.
        names: of the evaluation data sets, by number.
        teacher: a full model; it is frozen.
    """

    def __init__(
        self, *args: Any, settings: Settings, names: list[str], teacher: nn.Module | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.settings, self.names = settings, names
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(self.args.device)
        self.loss_is_scaled_for_ga = False  # our losses are means over a batch
        self.model_accepts_loss_kwargs = False
        self._passes = (-1, 0)
        self._sums: dict[str, Tensor] = {}
        self._counted = 0

    def scores(self, model: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """(data set, score from 0 to 1) of held-out rows, (n,) each; over all processes together, every row once."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------ nothing carried over
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def seed_all(self, *parts: int) -> None:
        """Random numbers that depend on `parts` and the seed alone."""
        state = np.random.SeedSequence([self.settings.seed, *parts, self.args.process_index]).generate_state(2)
        torch.manual_seed(int(state[0]) << 31 ^ int(state[1]))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One pass of one step."""
        step, number = self._passes
        self._passes = (self.state.global_step, number + 1 if step == self.state.global_step else 0)
        self.seed_all(1, *self._passes)
        return super().training_step(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over `groups`."""
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            chosen = groups(trained.named_parameters(), self.settings)
            self.optimizer = torch.optim.AdamW(chosen, lr=self.settings.lr)  # type: ignore[arg-type]
        return self.optimizer

    # ----------------------------------------------------------------------------------------------------- reporting
    def note(self, **parts: Tensor) -> None:
        """Parts of the loss of one pass, whose means go into the next log."""
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, value.new_zeros(())) + value.detach()
        self._counted += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, parts of the loss included."""
        if "loss" in logs and self._counted:
            names = sorted(self._sums)
            means = torch.stack([self._sums[name].float() for name in names]) / self._counted
            means = self.accelerator.reduce(means, "mean")
            logs |= {f"loss_{name}": value for name, value in zip(names, means.tolist())}
            self._sums, self._counted = {}, 0
        super().log(logs, *args, **kwargs)

    # ---------------------------------------------------------------------------------------------------- evaluation
    def accuracy(self, model: Any = None) -> dict[str, float]:
        """Mean score of each held-out data set and of all rows ("all"); empty if there are none.

        Args:
            model: another than the one that is trained.
        """
        if not self.names:
            return {}
        self.seed_all(2)
        device = self.args.device
        sums = torch.zeros(2, len(self.names), dtype=torch.float64, device=device)
        for source, score in self.scores(self.model if model is None else model):
            sums[0].index_add_(0, source.to(device), score.double().to(device))
            sums[1].index_add_(0, source.to(device), torch.ones_like(score, dtype=torch.float64, device=device))
        sums = self.accelerator.reduce(sums, "sum")
        named = {name: float(right / count) for name, right, count in zip(self.names, *sums.tolist()) if count}
        return {**named, "all": float(sums[0].sum() / sums[1].sum())}

    def last_accuracy(self) -> dict[str, float]:
        """After the last step, as evaluated then if it was."""
        for record in reversed(self.state.log_history):
            if record["step"] == self.state.global_step and "eval_all" in record:
                return {name: record[f"eval_{name}"] for name in (*self.names, "all")}
        return self.accuracy()

    def start(self) -> dict[str, Any]:
        """Before the first step: accuracy of the student, reduced as it will be, and of the teacher."""
        found: dict[str, Any] = {"before": self.accuracy()}
        if self.teacher is not None:
            found["accuracy_teacher"] = self.accuracy(self.teacher)
        return found

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Accuracy of the model as it is trained: with reduction."""
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.accuracy().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class EncoderTrainer(ReducedTrainer):
    """PuMer, or plain fine-tuning, of an encoder-style model: task loss plus distillation from a frozen full model."""

    def __init__(self, *args: Any, eval_collator: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eval_collator = eval_collator

    def _logits(self, model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(B, C) to choose from, and the logits as they come."""
        texts = 1 + self.settings.negatives
        if self.settings.task != "retrieval":
            logits = model(**inputs).logits
            return logits, logits
        repeated = {
            name: value.repeat_interleave(texts, 0) if name.startswith("pixel") else value
            for name, value in inputs.items()
        }
        logits = model(**repeated).logits
        return rank_scores(logits, texts), logits

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """task + distillation, weighted; images and texts of a batch go through the teacher once more."""
        chosen = self.settings
        labels = inputs.pop("labels")
        logits, raw = self._logits(model, inputs)
        parts = {"task": task_loss(chosen.task, logits, labels)}
        loss = chosen.task_weight * parts["task"]
        matching = matching_loss(raw, 1 + chosen.negatives) if chosen.task == "retrieval" else None
        if matching is not None:
            parts["itm"] = matching
            loss = loss + chosen.itm_weight * matching
        if self.teacher is not None:
            with torch.no_grad():
                wanted, _ = self._logits(self.teacher, inputs)
            parts["kd"] = distillation(logits, wanted)
            loss = loss + chosen.kd_weight * parts["kd"]
        self.note(**parts)
        return (loss, {"logits": logits}) if return_outputs else loss

    @torch.no_grad()
    def scores(self, model: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """In batches of `eval_batch`, each process its share."""
        training = model.training
        model.eval()
        rows, step = self.eval_dataset, self.settings.eval_batch
        assert rows is not None
        try:
            mine = range(self.args.process_index, len(rows), self.args.world_size)  # type: ignore[arg-type]
            for start in range(0, len(mine), step):
                batch = self.eval_collator([rows[i] for i in mine[start : start + step]])  # type: ignore[index]
                batch = {name: value.to(self.args.device) for name, value in batch.items()}
                source, labels = batch.pop("source"), batch.pop("labels")
                with self.accelerator.autocast():
                    logits, _ = self._logits(model, batch)
                yield source, row_scores(self.settings.task, logits.float(), labels)
        finally:
            model.train(training)


class Watcher(TrainerCallback):
    """Tells the caller how far a run is.

    Args:
        progress: called with (steps done, steps).
        report: called with each logged record, the step included.
    """

    def __init__(
        self, progress: Callable[[int, int], None] | None, report: Callable[[Mapping[str, float]], None] | None
    ) -> None:
        self.progress, self.report = progress, report

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None and state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.report is not None and state.is_world_process_zero and logs:
            self.report({**logs, "step": state.global_step})
