"""Every family with its own processor: one photograph, photographs of every shape, batches of none to three a row."""

from __future__ import annotations

import pytest
import torch

import foveate
from tests.processors.build import FAMILIES, about, family, vlm
from tests.processors.exact import DECODER, TOWER, judged
from tests.processors.media import PHOTOGRAPHS, RGB, asked, encoded
from tests.reference.patches import disagreements

CUT_APART = {"granite4_vision", "molmo2", "phi4_multimodal"}
"""Families of which nothing tells whose the rows of patches are, or where a photograph ends and the next begins."""
TRACED = [name for name in FAMILIES if not about(name, "no_tower")]


@family(quick="paligemma")
def test_one_photograph(name: str):
    for method, options in DECODER.items():
        judged(vlm(name), [asked("What is this?", "landscape")], method, **options)


@family(quick="llava")
def test_methods_that_read_the_tower(name: str):
    rows = [asked("What is this?", "portrait"), asked("And these two?", "landscape", "small")]
    for method, options in TOWER.items():
        if about(name, "no_tower"):
            with pytest.raises(foveate.UnsupportedError, match=about(name, "no_tower")):
                judged(vlm(name), rows[:1], method, **options)
        else:
            judged(vlm(name), rows, method, **options)


@torch.no_grad()
@family(TRACED)
def test_slots_are_judged_by_their_patches(name: str):
    model, processor = vlm(name)
    prompt = encoded(processor, [asked("What is this?", "portrait"), asked("And these two?", "landscape", "small")])
    wrong, found = disagreements(model, prompt, step=23)
    assert not wrong, wrong[0]
    assert found >= 2


@family(quick="llava_next")
def test_a_ragged_batch_of_none_to_three_photographs(name: str):
    rows = [
        asked("And these three?", "portrait", "panorama", "square"),
        asked("No picture here."),
        asked("One?", "landscape"),
        asked("What do these two have in common?", "small", "large"),
    ]
    if about(name, "every_row"):
        del rows[1]
    trace = judged(vlm(name), rows, "random", keep=0.4)
    assert trace.visual.any(1).sum() == 3
    judged(vlm(name), rows, "sparsevlm", alone=True, keep=0.5)


@family(quick="idefics3")
def test_photographs_of_every_shape_and_colour(name: str):
    shown = RGB if about(name, "rgb_only") else PHOTOGRAPHS
    judged(vlm(name), [asked("What is this?", photograph) for photograph in shown], "divprune", keep=0.5)


@family([name for name in FAMILIES if name not in CUT_APART], quick="smolvlm")
@torch.no_grad()
def test_a_budget_in_tokens_is_of_a_photograph_whatever_it_is_cut_into(name: str):
    model, processor = vlm(name)
    prompt = encoded(processor, [asked("And these?", "portrait", "landscape"), asked("One?", "panorama")])
    with foveate.apply(model, foveate.Random(keep=3)) as session:
        model(**prompt)
    kept = session.trace.active(-1) & session.trace.visual
    assert kept.sum(1).tolist() == [6, 3]
