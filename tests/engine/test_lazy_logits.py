"""Logits beside a loss: laid out when somebody looks, and part of the graph whether or not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.families import inputs
from tests.reference.checks import build_once, largest
from tests.reference.masked import MaskedReference
from tests.reference.plans import Fixed, all_removed, draw_removed
from torch import Tensor
from torch.nn.functional import log_softmax

import foveate
from foveate.engine.decoder.lane import short_rows

STAGES = [-1, 1]


def _case(batch: int = 2, stage: int = 1) -> tuple[Any, dict[str, Tensor], dict[int, Tensor], Tensor]:
    """A model, a prompt with labels, what is removed, and the slots that are left."""
    model = copy.deepcopy(build_once("llava")).train()
    prompt = inputs("llava", model, batch=batch)
    removed = draw_removed(prompt["input_ids"], {stage: [8, 9][:batch]})
    length = prompt["input_ids"].shape[1]
    prompt["labels"] = prompt["input_ids"].masked_fill(torch.arange(length) < length - 3, -100)
    return model, prompt, removed, prompt["attention_mask"].bool() & ~all_removed(removed)


def _head(model: Any) -> Tensor:
    return model.get_output_embeddings().weight.grad.clone()


def _distilled(output: Any, kept: Tensor) -> Tensor:
    """The loss, and another one that reads the logits of tokens that are left."""
    return output.loss + log_softmax(output.logits.float(), -1)[kept].square().mean()


@pytest.mark.parametrize("look_first", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_another_loss_on_the_logits_reaches_the_weights(stage: int, batch: int, look_first: bool):
    """Also where somebody has looked at them before without gradients."""
    model, prompt, removed, kept = _case(batch, stage)
    with MaskedReference(model, removed):
        _distilled(model(**prompt), kept).backward()
    expected = _head(model)
    model.zero_grad()
    with foveate.apply(model, Fixed(removed)):
        output = model(**prompt)
        if look_first:
            with torch.inference_mode():
                assert output.logits.argmax(-1).shape == kept.shape
        _distilled(output, kept).backward()
    assert largest(_head(model) - expected) <= 1e-4


@pytest.mark.parametrize("stage", STAGES)
def test_hooks_on_logits_see_the_gradient_of_the_loss(stage: int):
    model, prompt, removed, kept = _case(stage=stage)
    with MaskedReference(model, removed):
        output = model(**prompt)
        expected = torch.autograd.grad(output.loss, output.logits)[0]
    with foveate.apply(model, Fixed(removed)):
        output = model(**prompt)
        assert short_rows(output.logits) is not None
        seen: list[Tensor] = []
        output.logits.register_hook(lambda gradient: seen.append(gradient) or gradient * 0)
        output.logits.retain_grad()
        output.loss.backward()
        asked = model(**prompt)
        given = torch.autograd.grad(asked.loss, asked.logits)[0]
    assert not _head(model).any(), "the hook has the last word"
    for gradient in (seen[0] + 0, given):
        assert largest((gradient - expected)[kept]) <= 1e-5
        assert not gradient[all_removed(removed)].any()
    assert not output.logits.grad.any()


def test_what_scales_logits_keeps_the_graph():
    """Soft caps, scales and casts between the head and the loss."""
    model, prompt, removed, _ = _case()
    head = model.get_output_embeddings()
    with foveate.apply(model, Fixed(removed)):
        head.register_forward_hook(lambda module, args, output: torch.tanh(output / 3.0) * 3.0)
        output = model(**prompt)
        output.loss.backward()
        actual, loss = _head(model), output.loss.detach()
        assert short_rows(output.logits) is not None
    model.zero_grad()
    with MaskedReference(model, removed):
        output = model(**prompt)
        output.loss.backward()
    assert largest(loss - output.loss.detach()) <= 1e-5
    assert largest(actual - _head(model)) <= 1e-5


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ask", [lambda m, p: m.model(**p).last_hidden_state, lambda m, p: m(**p).logits])
def test_nothing_without_gradients_holds_a_graph(ask: Callable[..., Tensor], stage: int):
    model, prompt, removed, _ = _case(stage=stage)
    prompt.pop("labels")
    with foveate.apply(model, Fixed(removed)), torch.no_grad():
        for _ in range(2):
            assert not ask(model, prompt).requires_grad


@pytest.mark.parametrize("stage", STAGES)
def test_torch_func(stage: int):
    model, prompt, removed, _ = _case(stage=stage)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    name = next(name for name in weights if name.endswith("layers.2.self_attn.q_proj.weight"))
    with foveate.apply(model, Fixed(removed)):
        for _ in range(2):
            model.zero_grad()
            model(**prompt).loss.backward()
        found = torch.func.grad(lambda w: torch.func.functional_call(model, w, kwargs=prompt).loss)(weights)
    assert largest(found[name] - model.get_parameter(name).grad) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"find_unused_parameters": True}, {"static_graph": True}])
def test_distributed_data_parallel(options: dict[str, bool], tmp_path: Any):
    """It hands every output through a function of its own."""
    model, prompt, removed, _ = _case()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with foveate.apply(model, Fixed(removed)):
            model(**prompt).loss.backward()
            expected = _head(model)
            wrapped = torch.nn.parallel.DistributedDataParallel(model, **options)
            for _ in range(2):
                model.zero_grad()
                wrapped(**prompt).loss.backward()
                assert largest(_head(model) - expected) <= 1e-6
    finally:
        torch.distributed.destroy_process_group()
