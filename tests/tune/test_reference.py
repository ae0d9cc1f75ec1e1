"""What is shared changes nothing: a method behind the shared prefix is bitwise what it is alone."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.evaluate import answer as answering
from foveate.evaluate import data as datasets
from foveate.tune import Reference

REDUCERS = [
    (foveate.FastV(keep=0.25, layer=3), 2, False),
    (foveate.VTW(layer=4), 4, False),
    (foveate.Random(keep=0.3), 0, False),
    (foveate.VisionZip(keep=0.25), 0, True),  # reads the tower
    (foveate.ToMe(keep=0.5), 0, True),  # works in it
    (foveate.Chain(foveate.FastV(keep=0.5, layer=2), foveate.VTW(layer=5)), 1, False),
]
"""Method, decoder layers it may skip, whether it needs the tower."""


@pytest.fixture(scope="module")
def vlm():
    return answering.load("zoo:tiny-llava")


@pytest.fixture(scope="module")
def batch(vlm):
    return vlm.inputs(datasets.load("scenes", 6, 3))


@pytest.fixture(scope="module")
def reference(vlm, batch):
    return Reference(vlm.model, batch, max_new_tokens=4, prefix=5)


@pytest.mark.parametrize(("reducer", "skipped", "tower"), REDUCERS, ids=lambda value: type(value).__name__)
def test_shared_is_bitwise_what_it_is_alone(reference, reducer, skipped, tower):
    shared, alone = reference.measure(reducer), reference.measure(reducer, share=False)
    assert torch.equal(shared.gaps, alone.gaps)
    assert torch.equal(shared.kl, alone.kl)
    assert (shared.skipped, shared.tower_ran) == (skipped, tower)
    assert (alone.skipped, alone.tower_ran) == (0, True)
    assert torch.equal(shared.trace.visual_tokens, alone.trace.visual_tokens)


def test_a_negative_gap_is_a_changed_answer(vlm, batch, reference):
    """Led along the full model's answer, or left to itself: the same verdict."""
    full = answering.answer(vlm, batch, 4).texts
    verdicts = set()
    for keep in (0.02, 0.9):
        reducer = foveate.Random(keep=keep)
        with foveate.apply(vlm.model, reducer):
            own = answering.answer(vlm, batch, 4).texts
        changed = [a != b for a, b in zip(own, full, strict=True)]
        assert (reference.measure(reducer).gaps < 0).tolist() == changed
        verdicts |= set(changed)
    assert verdicts == {True, False}


def test_nothing_removed_is_the_full_model(reference):
    outcome = reference.measure(foveate.Random(keep=1.0))
    assert torch.equal(outcome.gaps, reference.margins)
    assert outcome.kl.abs().max() == 0
    assert (reference.margins >= 0).all()


def test_the_model_is_given_back(vlm, batch):
    forwards = [layer.forward for layer in vlm.model.get_decoder().layers]
    with pytest.raises(foveate.OptionError):
        Reference(vlm.model, batch, 2, prefix=5).measure(foveate.FastV(keep=0.5, layer=17))
    assert [layer.forward for layer in vlm.model.get_decoder().layers] == forwards
    assert not any("forward" in module.__dict__ for module in vlm.model.modules())
    assert not any(module._forward_hooks for module in vlm.model.get_decoder().layers)


def test_a_prompt_without_image_is_refused(vlm):
    inputs = vlm.tokenizer(["what shape is red?"], return_tensors="pt")
    with pytest.raises(foveate.UnsupportedError, match="no visual token"):
        Reference(vlm.model, {"input_ids": inputs["input_ids"]}, 2)
