"""Decoder layers that are compiled: right under a session, and not compiled again for a prompt of the same size."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.families import inputs, visual_slots
from tests.reference.checks import build_once, largest
from torch._dynamo.testing import CompileCounter

import foveate

METHODS = {
    "before layer 0": lambda: foveate.DivPrune(keep=4),
    "after layer 1": lambda: foveate.FastV(keep=4, layer=2),
    "in stages": lambda: foveate.PyramidDrop(keep=6),
}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", METHODS)
def test_equal_shapes_are_compiled_once(method: str, name: str):
    """Other pixels and words, the same counts: other tokens stay, in tensors of the same shape."""
    model = copy.deepcopy(build_once(name))
    prompts = [inputs(name, model, batch=1)]
    for seed in (1, 2):
        generator, other = torch.Generator().manual_seed(seed), dict(prompts[0])
        other["pixel_values"] = torch.randn(other["pixel_values"].shape, generator=generator)
        words = torch.randint(5, 100, other["input_ids"].shape, generator=generator)
        other["input_ids"] = torch.where(visual_slots(other["input_ids"]), other["input_ids"], words)
        prompts.append(other)

    def answers() -> list[tuple[Any, torch.Tensor]]:
        found = []
        with foveate.apply(model, METHODS[method]()) as session:
            for prompt in prompts:
                found.append((model(**prompt).logits, session.trace.kept(session.reducer.stages[-1])))
                graphs.append(compiled.frame_count)
        return found

    compiled, graphs = CompileCounter(), []
    expected = answers()
    graphs.clear()
    for layer in model.get_decoder().layers:
        layer.forward = torch.compile(layer.forward, backend=compiled)
    actual = answers()
    assert graphs[0] > 0
    # Where attention is read, dynamo breaks the graph and meets one more state of the cache in the second call.
    assert graphs[1] - graphs[0] <= (method == "after layer 1")
    assert graphs[2] == graphs[1]
    for (ours, kept), (theirs, chosen) in zip(actual, expected):
        assert torch.equal(kept, chosen)
        assert largest(ours - theirs) <= 1e-4
    assert not all(torch.equal(kept, actual[0][1]) for _, kept in actual), "other tokens stay"
