"""ToMe, PiToMe and Downsample inside the towers of whole models: exact, in batches, nothing done at 100 %."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import foveate
from foveate.reduction import Reducer, View
from tests import catalogue, families
from tests.reducers import tower
from tests.reference.checks import TOLERANCE, build_once, footprint, largest
from tests.reference.masked import MaskedReference
from tests.reference.meters import flops

METHODS: dict[str, Callable[[float], Reducer]] = {
    "tome": foveate.ToMe,
    "pitome": foveate.PiToMe,
    "pitome-llava": functools.partial(foveate.PiToMe, preset="llava"),
    "downsample": foveate.Downsample,
}


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
@pytest.mark.parametrize("method", METHODS)
def test_exact(method: str, name: str):
    """What the tower handed over is the prompt; the rest is the masked reference."""
    model = build_once(name)
    inputs = families.inputs(name, model)
    reducer, views = tower.in_place(METHODS[method](0.4)), []
    decide = reducer.decide

    def watched(view: View) -> Any:
        views.append(view)
        return decide(view)

    reducer.decide = watched
    before = footprint(model)
    with foveate.apply(model, reducer) as session:
        actual = model(**inputs).logits
    assert footprint(model) == before
    (view,) = views
    kept = session.trace.active(-1)
    embeds = view.hidden.clone()
    if session.trace.records[0].origin is not None:
        decision = decide(view)
        for row in range(2):
            real = decision.slots[row] >= 0 if decision.slots is not None else torch.zeros(0, dtype=torch.bool)
            if bool(real.any()):
                embeds[row, decision.slots[row][real]] = decision.values[row][real]
    removed = {-1: view.tokens & ~kept}
    assert bool(removed[-1].any())
    with MaskedReference(model, removed):
        expected = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    assert largest((actual - expected)[kept]) <= TOLERANCE


@pytest.mark.parametrize("name", ["llava", "llava_next"])
@pytest.mark.parametrize("method", METHODS)
def test_batch_equals_singles(method: str, name: str):
    tower.assert_batch_equals_singles(name, lambda: METHODS[method](0.4))


@pytest.mark.parametrize("name", ["llava", "paligemma"])
@pytest.mark.parametrize("method", METHODS)
def test_keeping_everything(method: str, name: str):
    tower.assert_keeping_everything_changes_nothing(name, lambda: METHODS[method](1.0))


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_the_tower_computes_less(method: str):
    """Operations of the vision tower of a LLaVA, counted by torch."""
    model = build_once("llava", "eager")
    pixels = families.inputs("llava", model)["pixel_values"]

    def run() -> None:
        model.model.get_image_features(pixels)

    full = flops(run)
    with foveate.apply(model, METHODS[method](0.25)):
        assert flops(run) <= 0.85 * full


@torch.no_grad()
@pytest.mark.parametrize("method", ["fopru", "visionzip", "prumerge", "vispruner", "recoverable"])
@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "internvl"])
def test_several_images_in_a_row_have_the_budget_of_each(name: str, method: str):
    """Idefics hands over all images, or tiles, of a row in one piece."""
    model = build_once(name)
    inputs = families.inputs(name, model, images=[3, 1])
    with foveate.apply(model, foveate.build(method, keep=5)) as session:
        model(**inputs)
    assert session.trace.visual_tokens[:, 0].tolist() == [15, 5]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("minicpmv4_6", "needs layers like those of CLIP"),
        ("granite_docling", "cannot go on with fewer tokens in its vision tower"),
        ("unlimited_ocr", "cannot go on with fewer tokens in its vision tower"),
        ("blip-2", "resamples the tower's patches"),
    ],
)
@pytest.mark.parametrize("method", ["tome", "pitome"])
def test_towers_in_which_nothing_can_merge_are_refused_with_the_reason(method: str, name: str, reason: str):
    if not catalogue.known(name):
        pytest.skip(f"this transformers has no {name}")
    model = catalogue.build(name)
    prompt = catalogue.inputs(name, model)
    plain = model(**prompt).logits
    with pytest.raises(foveate.UnsupportedError, match=reason), foveate.apply(model, METHODS[method](0.5)):
        model(**prompt)
    assert torch.equal(model(**prompt).logits, plain)
