"""Removal before layer 0 alone: no layer has a hook, and everything is as with hooks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.families import FAMILIES, N_LAYERS, inputs
from tests.reference.checks import TOLERANCE, build_once, greedy, largest
from tests.reference.masked import MaskedReference
from tests.reference.plans import Fixed, all_removed, draw_removed
from torch import Tensor

import foveate
from foveate.engine.compat import CACHE_NAME, returned_cache
from foveate.engine.decoder import short_prompt

BY_FAMILY = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in FAMILIES]
CLEAN = {
    "llava", "llava_next", "llava_onevision", "vipllava", "qwen2_vl", "qwen2_5_vl", "internvl", "idefics3", "smolvlm",
    "glm4v",
}  # fmt: skip
"""Families whose decoder does nothing with the prompt but what its layers do."""
RECORDER = "output_capturing_hook"
"""What transformers leaves behind when it has recorded once."""


def _hooks(model: Any) -> list[int]:
    """Hooks that each layer has in its next calls, as they come."""
    found: list[int] = []
    for layer in model.get_decoder().layers:
        forward = layer.forward

        def counted(*args: Any, layer: Any = layer, forward: Any = forward, **kwargs: Any) -> Any:
            recorders = [h for h in layer._forward_hooks.values() if getattr(h, "__name__", "") == RECORDER]
            found.append(len(layer._forward_hooks) - len(recorders))
            return forward(*args, **kwargs)

        layer.forward = counted
    return found


@pytest.fixture(autouse=True)
def _unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """No decoder has shown anything yet."""
    monkeypatch.setattr(short_prompt, "_PLAIN", type(short_prompt._PLAIN)())


@torch.no_grad()
@pytest.mark.parametrize("counts", [[8], [8, 9], [9, 0]], ids=["one row", "ragged", "one row stays"])
@pytest.mark.parametrize("name", BY_FAMILY)
def test_the_second_prefill_is_right_without_hooks(name: str, counts: list[int]):
    model = copy.deepcopy(build_once(name))
    prompt = inputs(name, model, batch=len(counts))
    removed = draw_removed(prompt["input_ids"], {-1: counts})
    kept = prompt["attention_mask"].bool() & ~all_removed(removed)
    with MaskedReference(model, removed):
        expected, generated = model(**prompt), greedy(model, prompt)
    hooks = _hooks(model)
    with foveate.apply(model, Fixed(removed)) as session:
        first, trace = model(**prompt, use_cache=True), session.trace
        assert hooks == [1] * N_LAYERS
        hooks.clear()
        second = model(**prompt, use_cache=True)
        assert hooks == [int(name not in CLEAN)] * N_LAYERS
        assert torch.equal(session.trace.visual_tokens, trace.visual_tokens)
        assert session.trace.kv_lengths == trace.kv_lengths
        again = greedy(model, prompt)
    for output in (first, second):
        assert output.logits.shape == expected.logits.shape
        assert largest((output.logits - expected.logits)[kept]) <= TOLERANCE
    caches = [returned_cache(output) for output in (first, second)]
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == prompt["input_ids"].shape[1]
    for ours, theirs in zip(*(cache.layers for cache in caches)):
        assert torch.equal(ours.kept, theirs.kept)
    assert torch.equal(again[0], generated[0])
    assert largest(again[1] - generated[1]) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_positions_and_implementations(padding: str, implementation: str, positions: str):
    """As with hooks: states, logits, and what is generated after."""
    model = copy.deepcopy(build_once("llava", implementation))
    prompt = inputs("llava", model)
    if padding == "right":
        prompt = {
            **prompt,
            "attention_mask": prompt["attention_mask"].flip(1),
            "input_ids": prompt["input_ids"].flip(1),
        }
    removed = draw_removed(prompt["input_ids"], {-1: [8, 9]})
    reducer = Fixed(removed)
    reducer.positions = positions

    def answers() -> tuple[Tensor, ...]:
        base = model.model(**prompt, use_cache=True).last_hidden_state
        output = model(**prompt, use_cache=True)
        token = torch.full((2, 1), 9)
        mask = torch.nn.functional.pad(prompt["attention_mask"], (0, 1), value=1)
        step = model(input_ids=token, attention_mask=mask, **{CACHE_NAME: returned_cache(output)})
        return base, output.logits, step.logits

    with foveate.apply(model, reducer):
        handle = model.get_decoder().layers[0].register_forward_hook(lambda *_: None)  # somebody looks
        expected = answers()
        handle.remove()
        assert len(short_prompt._PLAIN), "but did nothing"
        hooks = _hooks(model)
        actual = answers()
        assert hooks[: 2 * N_LAYERS] == [0] * 2 * N_LAYERS
    for ours, theirs in zip(actual, expected):
        assert ours.shape == theirs.shape
        assert largest(ours - theirs) <= TOLERANCE


def test_training_without_a_cache():
    """Positions with gaps must not be taken for packed samples."""
    model = copy.deepcopy(build_once("llava")).train()
    prompt = inputs("llava", model, batch=1)
    prompt.pop("attention_mask")
    removed = draw_removed(prompt["input_ids"], {-1: [9]})
    labels = prompt["input_ids"].masked_fill(torch.arange(prompt["input_ids"].shape[1]) < 25, -100)

    def step() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        loss = model(**prompt, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.detach(), model.get_decoder().layers[1].self_attn.q_proj.weight.grad.clone()

    with foveate.apply(model, Fixed(removed)):
        expected = step()
        hooks = _hooks(model)
        actual = step()
        assert hooks == [0] * N_LAYERS
    assert largest(actual[0] - expected[0]) <= 1e-5
    assert largest(actual[1] - expected[1]) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("asked", [{"output_hidden_states": True}, {"return_dict": False}, {}])
def test_who_asks_for_more_gets_it(asked: dict[str, Any]):
    """Recorded states, tuples and hooks on a layer are served with hooks."""
    model = copy.deepcopy(build_once("llava"))
    prompt = inputs("llava", model)
    removed = draw_removed(prompt["input_ids"], {-1: [8, 9]})
    seen: list[Tensor] = []
    with foveate.apply(model, Fixed(removed)):
        expected = model(**prompt, **asked)
        model(**prompt)
        if not asked:
            model.get_decoder().layers[2].register_forward_hook(lambda module, args, output: seen.append(output))
        actual = model(**prompt, **asked)
    assert torch.equal(actual[0], expected[0])
    if "output_hidden_states" in asked:
        assert all(torch.equal(a, b) for a, b in zip(actual.hidden_states, expected.hidden_states))
    if not asked:
        assert seen[0].shape[:2] == prompt["input_ids"].shape


@torch.no_grad()
@pytest.mark.parametrize("where", ["", "rotary_emb", "norm", "embed_tokens", "layers.3"])
@pytest.mark.parametrize("kind", ["hook", "pre_hook"])
def test_hooks_of_the_user_see_the_whole_prompt(kind: str, where: str):
    """And may change it, once the decoder is known, too."""
    model = copy.deepcopy(build_once("llava"))
    prompt = inputs("llava", model)
    removed = draw_removed(prompt["input_ids"], {-1: [8, 9]})
    module, lengths = model.get_decoder().get_submodule(where), []

    def watch(module: Any, args: tuple, kwargs: dict[str, Any], *output: Any) -> None:
        tensors = [*args, *kwargs.values(), *(output[0].values() if output and isinstance(output[0], dict) else output)]
        lengths.extend(x.shape[1] for x in tensors if isinstance(x, Tensor) and x.dim() == 3)

    with foveate.apply(model, Fixed(removed)):
        expected = model(**prompt).logits
        model(**prompt)
        register = module.register_forward_hook if kind == "hook" else module.register_forward_pre_hook
        register(watch, with_kwargs=True)
        actual = model(**prompt).logits
    whole = prompt["input_ids"].shape[1]
    assert lengths or where == "embed_tokens"
    assert whole in lengths or where in ("embed_tokens", "norm", "layers.3"), "layers and norm are given rows"
    assert largest(actual - expected) <= TOLERANCE


@torch.no_grad()
def test_a_window_that_is_set_later_counts():
    """What a decoder has shown holds as long as it is what it was."""
    model = copy.deepcopy(build_once("mistral3"))
    prompt = inputs("mistral3", model)
    removed = draw_removed(prompt["input_ids"], {-1: [8, 9]})
    kept = prompt["attention_mask"].bool() & ~all_removed(removed)
    with foveate.apply(model, Fixed(removed)):
        model(**prompt)
        model(**prompt)
    decoder = model.get_decoder()
    decoder.config.sliding_window = 6
    for layer in decoder.layers:
        layer.self_attn.sliding_window = 6
    with MaskedReference(model, removed):
        expected = model(**prompt).logits
    with foveate.apply(model, Fixed(removed)):
        assert largest((model(**prompt).logits - expected)[kept]) <= TOLERANCE


@torch.no_grad()
def test_a_step_that_is_interrupted_leaves_the_cache_closed():
    model = copy.deepcopy(build_once("llava"))
    prompt = inputs("llava", model, batch=1)
    removed = draw_removed(prompt["input_ids"], {-1: [8]})
    token = torch.full((1, 1), 9)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with foveate.apply(model, Fixed(removed)):
        cache = returned_cache(model(**prompt, use_cache=True))
        handle = model.get_decoder().layers[3].mlp.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=token, **{CACHE_NAME: cache})
        handle.remove()
    with pytest.raises(RuntimeError, match="holds reduced prompts"):
        model(input_ids=token, **{CACHE_NAME: cache})
