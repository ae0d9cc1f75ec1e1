"""The short lane: between stages nothing is laid out unless somebody looks, and nobody can tell."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from tests.families import DECODER, FAMILIES, inputs, spread_weights
from tests.reference.checks import TOLERANCE, build_once, largest
from tests.reference.masked import MaskedReference
from tests.reference.plans import Fixed, all_removed, draw_removed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import foveate
from foveate.engine.compat import CACHE_NAME, returned_cache
from foveate.engine.decoder.frame import ActiveSet, put_rows, take_rows
from foveate.engine.decoder.lane import LazyFrame, laid_out, short_rows
from foveate.measure.launches import Launches

KEEP = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 0]], dtype=torch.bool)
RAGGED = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 0, 0, 0, 0, 1]], dtype=torch.bool)
BY_FAMILY = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in FAMILIES]


def _active(keep: Tensor) -> ActiveSet:
    return ActiveSet.of(keep.numpy(), keep.device)


def _frame(keep: Tensor = KEEP) -> tuple[LazyFrame, Tensor]:
    """A lazy frame, and what it stands for."""
    base = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    active = _active(keep)
    rows = take_rows(base, active) + 1
    return LazyFrame(rows, active, base), put_rows(base, active, rows)


# ------------------------------------------------------------------------------------------------------ the tensor
@pytest.mark.parametrize(
    "fact",
    [
        lambda x: x.shape, lambda x: x.size(1), lambda x: x.dtype, lambda x: x.device, lambda x: x.dim(), len,
        lambda x: x.numel(), lambda x: x.is_floating_point(), lambda x: x.requires_grad, lambda x: x.ndim,
    ],
)  # fmt: skip
def test_what_can_be_said_without_the_frame_is(fact: Callable[[Tensor], Any]):
    lazy, frame = _frame()
    assert fact(lazy) == fact(frame)
    assert short_rows(lazy) is not None


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x + 1, lambda x: x.clone(), lambda x: x[0], lambda x: x[:, 1], lambda x: x[:, -3:],
        lambda x: x[KEEP], lambda x: torch.cat([x, x]), lambda x: nn.functional.linear(x, torch.ones(4, 3)),
        lambda x: torch.from_numpy(x.numpy()), lambda x: torch.tensor(x.tolist()), lambda x: x.to(torch.float64),
        copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: torch.stack([x, x], 0), lambda x: x[:, 1:],
        lambda x: nn.LayerNorm(3)(x).detach(), lambda x: checkpoint(torch.sin, x, use_reentrant=False),
        lambda x: [*x][1], lambda x: torch.where(x > 0, x, 0), lambda x: x.view(12, 3), lambda x: x.data,
    ],
)  # fmt: skip
@pytest.mark.parametrize("keep", [KEEP, RAGGED], ids=["even", "ragged"])
def test_whoever_looks_sees_the_frame(look: Callable[[Tensor], Tensor], keep: Tensor):
    lazy, frame = _frame(keep)
    seen = look(lazy)
    assert type(seen) is Tensor
    assert torch.equal(seen, look(frame))
    assert short_rows(lazy) is None, "from now on the frame counts"


def test_saving_saves_the_frame():
    lazy, frame = _frame()
    file = io.BytesIO()
    torch.save({"states": lazy}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["states"], frame)


@pytest.mark.parametrize(
    "change", [lambda x: x.mul_(2), lambda x: x[:, 1].zero_(), lambda x: x.__setitem__((0, 3), 7.0)]
)
def test_changes_in_place_count(change: Callable[[Tensor], Any]):
    lazy, frame = _frame()
    change(lazy)
    change(frame)
    assert torch.equal(laid_out(lazy), frame)
    assert short_rows(lazy) is None


@pytest.mark.parametrize(
    "change", [lambda x: x * 0.5, lambda x: 2 * x, lambda x: torch.tanh(x / 3.0), lambda x: x.float()]
)
def test_what_is_done_to_each_number_leaves_the_rows_short(change: Callable[[Tensor], Tensor]):
    lazy, frame = _frame(RAGGED)
    new = change(lazy)
    assert short_rows(new) is not None
    assert torch.equal(new.lay_out(), change(frame))


def test_the_end_of_a_frame_comes_from_its_rows_where_all_of_it_ran():
    lazy, frame = _frame(RAGGED)
    assert torch.equal(lazy[:, -1:, :], frame[:, -1:])
    assert lazy[:, 0:] is lazy
    assert short_rows(lazy) is not None
    assert torch.equal(lazy[:, -2:, :], frame[:, -2:]), "the second row has no such slot"
    assert short_rows(lazy) is None


def test_gradients_go_through_the_rows():
    base = torch.randn(2, 6, 3, requires_grad=True)
    active = _active(KEEP)

    def gradient(lazily: bool) -> Tensor:
        rows = take_rows(base, active) * 2
        frame = LazyFrame(rows, active, base) if lazily else put_rows(base, active, rows)
        assert frame.requires_grad
        return torch.autograd.grad((frame * frame.sin()).sum(), base)[0]

    assert torch.equal(gradient(True), gradient(False))


def test_gradients_that_would_be_lost_are_refused():
    """An autograd function takes a tensor as it is."""

    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    base = torch.randn(2, 6, 3, requires_grad=True)
    active = _active(KEEP)
    lazy = LazyFrame(take_rows(base, active), active, base)
    with pytest.raises(foveate.UnsupportedError, match="gradients would be lost"):
        Same.apply(lazy).sin().sum().backward()
    with pytest.raises(foveate.UnsupportedError, match="use_reentrant=False"):
        checkpoint(torch.sin, lazy, use_reentrant=True).sum().backward()
    with torch.no_grad():
        assert torch.equal(laid_out(Same.apply(lazy)), base)


# -------------------------------------------------------------------------------------------------------- the engine
def _decoder(depth: int) -> tuple[Any, dict[str, Tensor], Tensor]:
    model = spread_weights(hf.LlamaForCausalLM(hf.LlamaConfig(**{**DECODER, "num_hidden_layers": depth})))
    embeds = torch.randn(1, 60, DECODER["hidden_size"], generator=torch.Generator().manual_seed(0))
    visual = torch.zeros(1, 60, dtype=torch.bool)
    visual[:, 5:50] = True
    return model, {"inputs_embeds": embeds, "use_cache": True, "logits_to_keep": 1}, visual


def _kernels(model: Any, **inputs: Any) -> int:
    with Launches() as found:
        model(**inputs)
    return found.kernels.total()


@torch.no_grad()
@pytest.mark.parametrize(("stage", "positions"), [(-1, "keep"), (1, "keep"), (-1, "renumber")])
def test_a_layer_between_stages_costs_no_kernel_and_a_step_of_decoding_none_at_all(stage: int, positions: str):
    """Against the plain model on the shorter prompt, at two depths. Counting anew is one addition a step."""
    added, token = [], torch.zeros(1, 1, dtype=torch.long)
    for depth in (6, 12):
        model, prompt, visual = _decoder(depth)
        gone = visual & (torch.arange(60) % 9 > 0)
        short = {**prompt, "inputs_embeds": prompt["inputs_embeds"][:, ~gone[0]]}

        step = {"input_ids": token, "use_cache": True}
        plain = _kernels(model, **short), _kernels(model, **step, **{CACHE_NAME: returned_cache(model(**short))})
        reducer = Fixed({stage: gone})
        reducer.positions = positions
        with foveate.apply(model, reducer, visual=visual):
            cache = returned_cache(model(**prompt))
            reduced = _kernels(model, **prompt), _kernels(model, **step, **{CACHE_NAME: cache})
        assert reduced[1] - plain[1] <= (positions == "renumber"), "decoding"
        added.append(reduced[0] - plain[0])
    assert added[0] == added[1], "prefill"


@torch.no_grad()
@pytest.mark.parametrize("stage", [-1, 1])
def test_a_step_of_decoding_finds_no_hooks_on_the_layers(stage: int):
    """But a pre-hook on the first of each kind, which asks for a mask; with a mask, all of them come back."""
    model, prompt, visual = _decoder(6)
    hooks: list[int] = []
    for layer in model.model.layers:
        forward = layer.forward

        def counted(*args: Any, layer: Any = layer, forward: Any = forward, **kwargs: Any) -> Any:
            hooks.append(len(layer._forward_hooks) + len(layer._forward_pre_hooks))
            return forward(*args, **kwargs)

        layer.forward = counted
    token = torch.zeros(1, 1, dtype=torch.long)
    with foveate.apply(model, Fixed({stage: visual & (torch.arange(60) > 20)}), visual=visual):
        cache = returned_cache(model(**prompt))
        assert hooks == [3, 2, 2, 2, 2, 2]
        hooks.clear()
        model(input_ids=token, **{CACHE_NAME: cache})
        assert hooks == [1, 0, 0, 0, 0, 0]
        hooks.clear()
        mask = torch.ones(1, 62, dtype=torch.long)
        mask[:, 0] = 0
        model(input_ids=token, attention_mask=mask, **{CACHE_NAME: cache})
        assert hooks == [3, 2, 2, 2, 2, 2]
    hooks.clear()
    model(**prompt)
    assert hooks == [0] * 6


@torch.no_grad()
@pytest.mark.parametrize("name", BY_FAMILY)
def test_a_mask_that_comes_in_the_midst_of_decoding_counts(name: str):
    """Steps without a mask and steps whose mask hides words of the prompt, one after the other."""
    model = build_once(name)
    if hasattr(model.base_model, "get_rope_index"):
        pytest.skip("counts positions of later steps by the mask that it is given")
    prompt = {key: value for key, value in inputs(name, model, batch=1).items() if key != "attention_mask"}
    removed = draw_removed(prompt["input_ids"], {-1: [8], 1: [4]})
    length = prompt["input_ids"].shape[1]

    def answers() -> Tensor:
        cache, found = returned_cache(model(**prompt, use_cache=True)), []
        for step, hidden in enumerate((0, 2, 0, 1)):
            mask = None
            if hidden:
                mask = torch.ones(1, length + step + 1, dtype=torch.long)
                mask[:, :hidden] = 0
            output = model(input_ids=torch.full((1, 1), 7 + step), attention_mask=mask, **{CACHE_NAME: cache})
            found.append(output.logits)
        return torch.cat(found)

    with MaskedReference(model, removed):
        expected = answers()
    with foveate.apply(model, Fixed(removed)):
        assert largest(answers() - expected) <= TOLERANCE


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", BY_FAMILY)
def test_the_head_runs_on_rows_that_are_left(name: str, batch: int, monkeypatch: pytest.MonkeyPatch):
    """With labels and without; logits have the promised shape, those of removed slots are 0.

    Beside a loss they are not even laid out before somebody looks.
    """
    model = build_once(name)
    prompt = inputs(name, model, batch=batch)
    counts = {-1: [8, 9][:batch], 1: [4, 7][:batch]}
    removed = draw_removed(prompt["input_ids"], counts)
    tokens = prompt["attention_mask"].bool()
    labels = prompt["input_ids"].masked_fill(torch.arange(tokens.shape[1]) < tokens.shape[1] - 3, -100)
    ran: list[int] = []
    head = model.get_output_embeddings()
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda states: ran.append(states.shape[1]) or forward(states))
    with MaskedReference(model, removed):
        expected = model(**prompt, labels=labels)
    with foveate.apply(model, Fixed(removed)) as session:
        ran.clear()
        plain, trained = model(**prompt), model(**prompt, labels=labels)
        with torch.no_grad():
            seen = model(**prompt, labels=labels)
    longest = int((tokens & ~all_removed(removed)).sum(1).max())
    assert session.trace is not None
    assert ran == [longest] * 3
    kept = tokens & ~all_removed(removed)
    for output in (plain, trained, seen):
        assert (short_rows(output.logits) is None) == (output is plain)
        assert output.logits.shape == expected.logits.shape
        assert largest((output.logits - expected.logits)[kept]) <= TOLERANCE
    assert not plain.logits[all_removed(removed)].any()
    assert torch.equal(trained.loss, seen.loss)
    assert largest(trained.loss - expected.loss) <= TOLERANCE
    assert trained.loss.requires_grad
