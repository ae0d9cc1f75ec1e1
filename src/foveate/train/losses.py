"""The parts of the loss: what the task says, and what the full model says.

Source: csarron/PuMer @ 8a00d853, task/task_base.py (weights and distillation) and the heads of its models.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["distillation", "matching_loss", "rank_scores", "row_scores", "task_loss"]


def task_loss(task: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of a batch.

    Args:
        task: "vqa": binary cross-entropy with soft `labels` (B, C), mean over rows and labels; "nlvr2", "ve":
            cross-entropy with `labels` (B,); "retrieval": cross-entropy over scores (B, 1 + negatives), the right text
            first.
        logits: (B, C).
    """
    if task == "vqa":
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


def distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) over softmaxed logits (B, C) at temperature 1, mean over rows. VQA has it so too."""
    return F.kl_div(
        F.log_softmax(logits.float(), -1), F.log_softmax(teacher.float(), -1), reduction="batchmean", log_target=True
    )


def rank_scores(logits: Tensor, texts: int) -> Tensor:
    """How well each of `texts` texts fits: logits (B * texts, 1 or 2) -> (B, texts).

    Heads with one output rank (ViLT, METER); of heads with two the second says "they match" (BridgeTower).
    """
    return logits[:, -1].view(-1, texts)


def matching_loss(logits: Tensor, texts: int) -> Tensor | None:
    """Image-text matching, for heads that have it (two outputs): cross-entropy over all pairs; None for other heads."""
    if logits.shape[-1] != 2:
        return None
    first = torch.arange(len(logits), device=logits.device) % texts == 0
    return F.cross_entropy(logits, first.long())


def row_scores(task: str, logits: Tensor, labels: Tensor) -> Tensor:
    """How right each row is, (B,) from 0 to 1; arguments as for `task_loss`."""
    chosen = logits.argmax(-1)
    if task == "vqa":
        return labels.float().gather(1, chosen[:, None])[:, 0]
    return (chosen == labels).float()
