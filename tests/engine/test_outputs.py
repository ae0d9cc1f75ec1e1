"""What a model hands out besides logits keeps its meaning: hidden states, attentions, hooks, checkpointed gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tests.families import FAMILIES, N_LAYERS, inputs, visual_slots
from tests.reference.checks import TOLERANCE, build_once, checkpoint, footprint, greedy, largest
from tests.reference.masked import MaskedReference
from tests.reference.plans import Fixed, all_removed, draw_removed
from torch import Tensor, nn

import foveate

COUNTS = {-1: [8, 9], 1: [4, 7], 3: [2, 0]}
BY_FAMILY = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in FAMILIES]
SOME = [
    pytest.param(name, marks=pytest.mark.xdist_group(name))
    for name in ("llava", "qwen3_vl", "gemma3_window", "idefics3")
]


def _states(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
@pytest.mark.parametrize("name", BY_FAMILY)
def test_hidden_states_are_full_length(name: str):
    """And right for everything that is still there."""
    model = build_once(name)
    prompt = inputs(name, model)
    removed = draw_removed(prompt["input_ids"], COUNTS)
    tokens = prompt["attention_mask"].bool()
    with MaskedReference(model, removed):
        expected = model(**prompt, output_hidden_states=True)
    with foveate.apply(model, Fixed(removed)):
        actual = model(**prompt, output_hidden_states=True)
        without = model(**prompt)
    assert len(actual.hidden_states) == N_LAYERS + 1
    for i, (ours, theirs) in enumerate(zip(actual.hidden_states, expected.hidden_states)):
        # Entry i is what enters layer i, the last one what leaves the final norm.
        left = tokens & ~all_removed(removed, i - 1)
        assert ours.shape == theirs.shape
        assert largest((ours - theirs)[left]) <= TOLERANCE, f"hidden state {i}"
    kept = tokens & ~all_removed(removed)
    assert torch.equal(actual.logits[kept], without.logits[kept]), "looking changes nothing"


@torch.no_grad()
@pytest.mark.parametrize("name", SOME)
def test_what_is_removed_keeps_its_last_state(name: str):
    model = build_once(name)
    prompt = inputs(name, model, batch=1)
    removed = draw_removed(prompt["input_ids"], {-1: [8], 2: [3]})
    with foveate.apply(model, Fixed(removed)):
        states = model(**prompt, output_hidden_states=True).hidden_states
    for stage, gone in removed.items():
        # DeepStack adds to image slots behind layers 0 to 2, removed or not; the last state is taken after the norm.
        for i in range(max(stage + 1, 4 if name == "qwen3_vl" else 0), N_LAYERS - 1):
            assert torch.equal(states[i + 1][gone], states[i][gone]), f"stage {stage}, state {i + 1}"


@torch.no_grad()
@pytest.mark.parametrize("name", SOME)
def test_attentions_are_of_the_tokens_that_are_left(name: str):
    """Documented: `output_attentions` gives each layer's own, smaller map."""
    model = build_once(name, "eager")
    prompt = inputs(name, model, batch=1)
    removed = draw_removed(prompt["input_ids"], {1: [8], 3: [3]})
    with MaskedReference(model, removed):
        expected = model(**prompt, output_attentions=True).attentions
    with foveate.apply(model, Fixed(removed)):
        actual = model(**prompt, output_attentions=True).attentions
    for layer in range(N_LAYERS):
        left = (~all_removed(removed, layer - 1))[0].nonzero()[:, 0]
        assert largest(actual[layer] - expected[layer][:, :, left][..., left]) <= 1e-5


# ---------------------------------------------------------------------------------------------------------- hooks
@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", SOME)
def test_hooks_see_the_full_frame_and_may_keep_it(name: str, when: str):
    """Hooks put on before or after `apply`; what they store is not written to afterwards."""
    model = build_once(name)
    prompt = inputs(name, model)
    removed = draw_removed(prompt["input_ids"], COUNTS)
    stored: list[tuple[Tensor, Tensor]] = []

    def store(module: nn.Module, args: tuple, output: Any) -> None:
        stored.append((_states(output), _states(output).clone()))

    def watch() -> list[Any]:
        return [layer.register_forward_hook(store) for layer in model.get_decoder().layers]

    handles = watch() if when == "before" else []
    with foveate.apply(model, Fixed(removed)):
        handles = handles or watch()
        logits = model(**prompt).logits
        for handle in handles:
            handle.remove()
        unwatched = model(**prompt).logits
    length = prompt["input_ids"].shape[1]
    assert [states.shape[1] for states, _ in stored] == [length] * N_LAYERS
    assert all(torch.equal(states, then) for states, then in stored)
    kept = prompt["attention_mask"].bool() & ~all_removed(removed)
    assert torch.equal(logits[kept], unwatched[kept])


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_hooks_that_change_states_take_effect(name: str, in_place: bool, when: str):
    model = build_once(name)
    prompt = inputs(name, model)
    removed = draw_removed(prompt["input_ids"], COUNTS)
    kept = prompt["attention_mask"].bool() & ~all_removed(removed)

    def louder(module: nn.Module, args: tuple, output: Any) -> Any:
        if in_place:
            _states(output).mul_(1.5)
            return None
        return (output[0] * 1.5, *output[1:]) if isinstance(output, tuple) else output * 1.5

    def change() -> Any:
        return model.get_decoder().layers[2].register_forward_hook(louder)

    handle = change()
    with MaskedReference(model, removed):
        expected = model(**prompt).logits, greedy(model, prompt)[1]
    if when == "after":
        handle.remove()
    with foveate.apply(model, Fixed(removed)):
        if when == "after":
            handle = change()
        actual = model(**prompt).logits, greedy(model, prompt)[1]
    handle.remove()
    assert largest((actual[0] - expected[0])[kept]) <= TOLERANCE
    assert largest(actual[1] - expected[1]) <= TOLERANCE


@torch.no_grad()
def test_a_method_may_keep_what_it_saw():
    """The hidden states of a view are not overwritten by later layers."""
    model = build_once("llava")
    prompt = inputs("llava", model)
    seen: list[tuple[Tensor, Tensor]] = []

    class Keeps(Fixed):
        def decide(self, view):
            seen.append((view.hidden, view.hidden.clone()))
            return super().decide(view)

    with foveate.apply(model, Keeps(draw_removed(prompt["input_ids"], {-1: [9, 9], 0: [8, 8], 2: [5, 5]}))):
        model(**prompt)
    assert all(torch.equal(states, then) for states, then in seen)


# -------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("name", SOME)
def test_gradient_checkpointing_changes_nothing(name: str):
    model = copy.deepcopy(build_once(name)).train()
    prompt = inputs(name, model)
    labels = prompt["input_ids"].masked_fill(
        visual_slots(prompt["input_ids"]) | (prompt["attention_mask"].cumsum(1) <= 1), -100
    )
    removed = draw_removed(prompt["input_ids"], COUNTS)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        with foveate.apply(model, Fixed(removed)):
            model(**prompt, labels=labels, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.get_decoder().parameters() if p.grad is not None]

    plain = gradients()
    checkpoint(model)
    before = footprint(model)
    if Version(transformers.__version__) < Version("5.23"):
        with pytest.raises(foveate.UnsupportedError, match=r"checkpointing.*5\.23"):
            gradients()
        return
    checkpointed = gradients()
    assert footprint(model) == before
    assert len(plain) == len(checkpointed) > N_LAYERS
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed))
