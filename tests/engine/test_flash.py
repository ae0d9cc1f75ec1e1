"""FlashAttention by its semantics, on a CPU stand-in: no kernel, but the same masks, ids and traps."""

from __future__ import annotations

import pytest
import torch
from tests.families import inputs
from tests.reference.checks import TOLERANCE, build_once, footprint, greedy, largest
from tests.reference.flash import pretend_flash
from tests.reference.masked import MaskedReference
from tests.reference.plans import Fixed, Watch, all_removed, draw_removed

import foveate
from foveate.reduction import TapSpec

# Gemma's and PaliGemma's bidirectional masks do not exist under FlashAttention, in transformers itself.
CAUSAL = [
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "idefics3",
    "glm4v",
]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("counts", [{1: [4]}, {-1: [8, 9], 1: [4, 7], 3: [2, 0]}, {2: [5, 5]}], ids=str)
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in CAUSAL])
def test_exact(name: str, counts: dict[int, list[int]]):
    """One row without padding is the packed-sequence trap, ragged rows are the unpadding path."""
    model = build_once(name)
    before = footprint(model)
    rows = len(next(iter(counts.values())))
    prompt = inputs(name, model, batch=rows)
    removed = draw_removed(prompt["input_ids"], counts)
    with MaskedReference(model, removed):
        expected = model(**prompt).logits, greedy(model, prompt)[1]
    with pretend_flash(model) as calls, foveate.apply(model, Fixed(removed)):
        actual = model(**prompt).logits, greedy(model, prompt)[1]
        assert calls["plain" if rows == 1 else "padded"] > 0
    kept = prompt["attention_mask"].bool() & ~all_removed(removed)
    assert largest((actual[0] - expected[0])[kept]) <= TOLERANCE
    assert largest(actual[1] - expected[1]) <= TOLERANCE
    assert footprint(model) == before


@torch.no_grad()
def test_renumbered_positions():
    model = build_once("llava")
    prompt = inputs("llava", model)
    removed = draw_removed(prompt["input_ids"], {-1: [5, 3]})
    with foveate.apply(model, Fixed(removed, "renumber")):
        expected = greedy(model, prompt)[1]
    with pretend_flash(model), foveate.apply(model, Fixed(removed, "renumber")):
        assert largest(greedy(model, prompt)[1] - expected) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("queries", ["last", "text", "text_after"])
def test_taps_read_the_same_rows(queries: str):
    model = build_once("qwen2_5_vl")
    prompt = inputs("qwen2_5_vl", model)
    removed = draw_removed(prompt["input_ids"], {1: [7, 9], 3: [4, 2]})
    taps = {1: TapSpec(queries), 3: TapSpec(queries)}
    length, reads = prompt["input_ids"].shape[1], []
    reducer = Watch(removed, taps)
    with foveate.apply(model, reducer):
        model(**prompt)
    with pretend_flash(model), foveate.apply(model, reducer):
        model(**prompt)
    reads = [view.tap.per_slot(length) for view in reducer.views]
    assert len(reads) == 4
    assert largest(reads[2] - reads[0]) <= 1e-5
    assert largest(reads[3] - reads[1]) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["gemma3_window", "mistral3", "aya_vision"])
def test_an_exceeded_window_is_refused(name: str, cached: bool):
    """A flash window counts stored keys, not positions: never a wrong answer."""
    model = build_once(name)
    before = footprint(model)
    prompt = inputs(name, model)
    with pretend_flash(model):
        untouched = model(**prompt).logits
        with (
            foveate.apply(model, Fixed(draw_removed(prompt["input_ids"], {1: [4, 7]}))),
            pytest.raises(foveate.UnsupportedError, match="sdpa"),
        ):
            model(**prompt, use_cache=cached)
        assert torch.equal(model(**prompt).logits, untouched)
    assert footprint(model) == before
