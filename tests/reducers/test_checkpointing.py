"""Every method under gradient checkpointing, default and reentrant: loss and gradients as without it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

import foveate
from foveate.reduction import Reducer
from tests.families import inputs, visual_slots
from tests.reducers.test_matrix import METHODS
from tests.reference.checks import build_once, checkpoint, largest

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="refused below 5.23: tests/engine/test_compat.py"
)
KINDS: dict[str, Callable[[], Reducer]] = {
    **{name: (lambda make=make: make(0.4)) for name, make in METHODS.items()},
    "tome in the tower": lambda: foveate.ToMe(keep=0.5),
    "pitome in the tower": lambda: foveate.PiToMe(keep=0.5, where="tower"),
    "tome in some layers of the tower": lambda: foveate.ToMe(keep=14),
    "downsample": lambda: foveate.Downsample(keep=0.5),
}
CHECKPOINTS = {"default": None, "reentrant": {"use_reentrant": True}}


def gradients(kind: str, how: str | None, turns: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and gradients of what is trained, after `turns` forward passes whose backward passes come together."""
    model = copy.deepcopy(build_once("llava")).train()
    if how:
        checkpoint(model, CHECKPOINTS[how])
        model.enable_input_require_grads()
    losses = []
    with foveate.apply(model, KINDS[kind]()):
        for turn in range(turns):
            prompt = inputs("llava", model, seed=turn)
            labels = prompt["input_ids"].masked_fill(
                visual_slots(prompt["input_ids"]) | (prompt["attention_mask"] == 0), -100
            )
            losses.append(model(**prompt, labels=labels, use_cache=False).loss)
        torch.stack(losses).sum().backward()
    return torch.stack(losses).detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", CHECKPOINTS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_without_it(kind: str, how: str):
    loss, plain = gradients(kind, None)
    again, checkpointed = gradients(kind, how)
    assert largest(loss - again) <= 1e-5
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert largest(gradient - checkpointed[name]) <= 1e-4 * max(1.0, float(gradient.abs().max())), name


@pytest.mark.parametrize("kind", ["tome in the tower", "fastv"])
def test_several_passes_before_one_backward(kind: str):
    """Each runs again with what it chose itself."""
    _, plain = gradients(kind, None, turns=3)
    _, checkpointed = gradients(kind, "default", turns=3)
    assert all(largest(gradient - checkpointed[name]) <= 1e-3 for name, gradient in plain.items())
