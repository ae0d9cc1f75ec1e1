"""Yardsticks: what "exact" and "as before" mean, in one place."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

import foveate
from foveate.engine.compat import CACHE_NAME, returned_cache
from foveate.reduction import Reducer
from tests import families
from tests.reference.masked import MaskedReference
from tests.reference.plans import Fixed, all_removed

__all__ = [
    "STEPS",
    "TOLERANCE",
    "assert_exact",
    "build_once",
    "checkpoint",
    "footprint",
    "generate",
    "greedy",
    "greedy_by_hand",
    "largest",
]

TOLERANCE = 2e-4
"""Largest difference of float32 logits between the engine and the masked reference."""
STEPS = 10
"""Greedy steps that must agree."""


@functools.cache
def build_once(name: str, impl: str = "sdpa") -> PreTrainedModel:
    """A family's model, shared by all tests of a process; every test leaves it as it found it."""
    model = families.build(name, impl)
    # transformers installs its own recorders at the first use, and leaves them there: use everything once.
    with torch.no_grad():
        model(**families.inputs(name, model), output_hidden_states=True)
        generate(model, families.inputs(name, model), steps=2)
    return model


def largest(difference: Tensor) -> float:
    """Largest absolute entry, 0 of nothing; NaN stays NaN."""
    return difference.abs().max().item() if difference.numel() else 0.0


def generate(model: PreTrainedModel, inputs: Mapping[str, Any], steps: int = STEPS, **options: Any) -> Any:
    """Greedy generation with everything recorded; the inputs stay untouched."""
    copied = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return model.generate(
        **copied,
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def greedy(
    model: PreTrainedModel, inputs: Mapping[str, Any], steps: int = STEPS, **options: Any
) -> tuple[Tensor, Tensor]:
    """Tokens (B, S + steps) and logits (B, steps, V)."""
    output = generate(model, inputs, steps, **options)
    return output.sequences, torch.stack(output.logits, 1)


def checkpoint(model: PreTrainedModel, *options: Any) -> None:
    """`gradient_checkpointing_enable`, which 5.23 calls `activation_checkpointing_enable`."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(*options)


@torch.no_grad()
def greedy_by_hand(model: PreTrainedModel, prompt: Mapping[str, Any], steps: int = STEPS) -> Tensor:
    """Logits (B, steps, V) of a loop that says nothing about positions: the model must count by itself."""
    output = model(**prompt, use_cache=True)
    mask, logits = prompt["attention_mask"], [output.logits[:, -1]]
    takes_mask = not hasattr(model.base_model, "get_rope_index")  # with one, Qwen-VL recounts from the mask and fails
    for _ in range(steps - 1):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        token = logits[-1].argmax(-1, keepdim=True)
        padding = {"attention_mask": mask} if takes_mask else {}
        output = model(input_ids=token, **padding, **{CACHE_NAME: returned_cache(output)})
        logits.append(output.logits[:, -1])
    return torch.stack(logits, 1)


@torch.no_grad()
def assert_exact(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    removed: Mapping[int, Tensor],
    reducer: Reducer | None = None,
    reference: AbstractContextManager | None = None,
    tolerance: float = TOLERANCE,
) -> foveate.Trace:
    """The engine computes what the masked reference computes, in the prefill and in ten greedy steps, and then is gone.

    Args:
        model: unpatched.
        inputs: one prompt per row.
        removed: {stage: (B, S) bool}.
        reducer: removes just that; by default `Fixed(removed)`.
        reference: by default `MaskedReference(model, removed)`.
        tolerance: for logits.

    Returns:
        The trace of the last prefill.
    """
    kept = inputs["attention_mask"].bool() & ~all_removed(removed)
    untouched = model(**inputs).logits
    with reference or MaskedReference(model, removed):
        expected = model(**inputs).logits
        expected_tokens, expected_steps = greedy(model, inputs)
    with foveate.apply(model, reducer or Fixed(removed)) as session:
        forward = model(**inputs, use_cache=True)
        assert session.trace.kv_lengths == [layer.keys.shape[-2] for layer in returned_cache(forward).layers]
        output = generate(model, inputs)
    actual, steps = forward.logits, torch.stack(output.logits, 1)
    assert largest((expected - untouched)[kept]) >= 1e-2, "removal has no effect: the check would be vacuous"
    assert largest((actual - expected)[kept]) <= tolerance, "prefill logits of kept slots"
    assert largest(steps - expected_steps) <= tolerance, "logits of the greedy steps"
    assert torch.equal(output.sequences, expected_tokens), "generated tokens"
    assert torch.equal(model(**inputs).logits, untouched), "the model after the session"
    assert_trace(session.trace, inputs, removed)
    return session.trace


def assert_trace(trace: foveate.Trace, inputs: Mapping[str, Tensor], removed: Mapping[int, Tensor]) -> None:
    """The trace tells what was removed, and how many keys each layer stores."""
    tokens = inputs["attention_mask"].bool()
    visual = families.visual_slots(inputs["input_ids"])
    length, reduced = visual.shape[1], False
    for layer in range(families.N_LAYERS):
        left = tokens & ~all_removed(removed, layer - 1)
        reduced = reduced or any(stage < layer and bool(mask.any()) for stage, mask in removed.items())
        assert torch.equal(trace.visual_tokens[:, layer], (left & visual).sum(1)), f"visual tokens of layer {layer}"
        stored = int(left.sum(1).max()) if reduced else length
        assert trace.kv_lengths[layer] in (stored, *_windowed(stored, length)), f"keys stored in layer {layer}"
    for stage in removed:
        assert torch.equal(trace.kept(stage), visual & ~all_removed(removed, stage)), f"kept after stage {stage}"
    assert torch.allclose(trace.mean_visual_tokens, trace.visual_tokens.double().mean(1))


def _windowed(stored: int, length: int) -> tuple[int, ...]:
    """What a layer with an exceeded window may store instead: the last keys in reach."""
    reach = families.WINDOW - 1
    return (reach,) if length > reach and stored > reach else ()


_OWN_MEMORY = ("rope_deltas", "_cache", "_previous_max_cache_length")
"""What a model itself remembers of its last prompt, patched or not."""


def _frozen(value: Any) -> Any:
    """A copy of a configuration that stays as it is; `repr` of one takes a hundred times as long."""
    if isinstance(value, PreTrainedConfig):
        return _frozen(vars(value))
    if isinstance(value, Mapping):
        return {key: _frozen(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_frozen(each) for each in value]
    return value if isinstance(value, str | int | float | None) else repr(value)


def footprint(model: nn.Module) -> dict[str, Any]:
    """Everything a patch could leave behind: instance attributes (by identity), hooks, configurations of modules."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = (
            {key: id(value) for key, value in module.__dict__.items() if key not in _OWN_MEMORY},
            {
                kind: tuple(getattr(module, kind))
                for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
            },
            _frozen(getattr(module, "config", None)),
            module.training,
        )
    return found
