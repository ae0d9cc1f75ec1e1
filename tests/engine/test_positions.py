"""Two ways to number what is left: as it was, or anew, by what each layer stores."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as hf
from tests.families import DECODER, inputs, spread_weights
from tests.reference.checks import STEPS, TOLERANCE, build_once, greedy, greedy_by_hand, largest
from tests.reference.masked import MaskedReference
from tests.reference.plans import Fixed, draw_removed
from tests.reference.renumbered import decoder_inputs, renumbered_greedy, shorter_prompt
from torch import Tensor
from transformers import PreTrainedModel

import foveate

ONE_AXIS = ["llava", "llava_next", "llava_onevision", "internvl", "idefics3", "smolvlm", "vipllava"]
PREFIX_MASK = ["gemma3", "paligemma"]
"""Their masks depend on the type of each token, so the shorter prompt must say it too."""
SEVERAL_AXES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"]
LLAMAS = ["llava", "llava_next", "idefics3", "smolvlm", "vipllava"]
NO_PLACEHOLDER = {"suppress_tokens": [150, 151]}
"""`generate(inputs_embeds=...)` would look for the image of a generated placeholder."""


@torch.no_grad()
@pytest.mark.parametrize("impl", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ONE_AXIS + PREFIX_MASK)
def test_before_the_layers_it_is_a_shorter_prompt(name: str, impl: str):
    """Ragged, left-padded rows."""
    model = build_once(name, impl)
    prompt = inputs(name, model)
    removed = draw_removed(prompt["input_ids"], {-1: [5, 3]})
    short, keep = shorter_prompt(decoder_inputs(model, prompt), prompt["attention_mask"], removed)
    if name in PREFIX_MASK:
        types = torch.zeros_like(short["attention_mask"])
        types[short["attention_mask"].bool()] = prompt["token_type_ids"][keep]
        short["token_type_ids"] = types

    def decode(given: dict[str, Tensor]) -> Tensor:
        if name in PREFIX_MASK:  # cannot generate from embeddings
            return greedy_by_hand(model, given)
        return greedy(model, given, **NO_PLACEHOLDER)[1]

    expected = decode(short)
    with foveate.apply(model, Fixed(removed, "renumber")):
        actual = decode(prompt)
    with foveate.apply(model, Fixed(removed)):
        at_their_old_places = decode(prompt)
    assert largest(actual - expected) <= TOLERANCE
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))
    assert largest(at_their_old_places - expected) >= 1e-2, "the choice of positions must matter"


@torch.no_grad()
@pytest.mark.parametrize("name", LLAMAS)
@pytest.mark.parametrize(
    "counts",
    [{1: [4, 4]}, {1: [4, 7]}, {0: [9, 11], 2: [6, 3], 4: [0, 0]}, {-1: [8, 9], 3: [2, 5]}],
    ids=["equal", "ragged", "progressive", "before and inside"],
)
def test_renumber_counts_what_each_layer_stores(name: str, counts: dict[int, list[int]]):
    model = build_once(name)
    prompt = inputs(name, model)
    removed = draw_removed(prompt["input_ids"], counts)
    expected = renumbered_greedy(model, prompt, removed, STEPS)
    with foveate.apply(model, Fixed(removed, "renumber")):
        actual = greedy(model, prompt)[1]
    with MaskedReference(model, removed):
        at_their_old_places = greedy(model, prompt)[1]
    assert largest(actual - expected) <= TOLERANCE
    assert largest(at_their_old_places - expected) >= 1e-2, "the choice of positions must matter"


@torch.no_grad()
def test_the_slow_llama_is_a_llama():
    """With nothing removed the reference is the model itself."""
    model = build_once("llava")
    prompt = inputs("llava", model)
    assert largest(renumbered_greedy(model, prompt, {}, STEPS) - greedy(model, prompt)[1]) <= TOLERANCE


@torch.no_grad()
def test_keeping_everything_renumbers_nothing():
    model = build_once("llava")
    prompt = inputs("llava", model)
    removed = draw_removed(prompt["input_ids"], {-1: [16, 16]})
    expected = greedy(model, prompt)[1]
    with foveate.apply(model, Fixed(removed, "renumber")):
        assert torch.equal(greedy(model, prompt)[1], expected)


@torch.no_grad()
def test_renumbered_beams_follow_their_rows():
    """Counts differ by row, so they must move with the beams."""
    model = build_once("llava")
    prompt = inputs("llava", model)
    removed = draw_removed(prompt["input_ids"], {-1: [5, 3]})
    short, _ = shorter_prompt(decoder_inputs(model, prompt), prompt["attention_mask"], removed)
    options = {"num_beams": 3, "output_scores": True, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**short, **options, **NO_PLACEHOLDER)
    with foveate.apply(model, Fixed(removed, "renumber")):
        actual = model.generate(**prompt, **options, **NO_PLACEHOLDER)
    assert torch.equal(actual[:, -8:], expected[:, -8:])


@torch.no_grad()
def test_renumbered_prompt_lookup():
    """Cropped candidates are not counted."""
    model = build_once("llava")
    prompt = inputs("llava", model, batch=1)
    removed = draw_removed(prompt["input_ids"], {-1: [5]})
    with foveate.apply(model, Fixed(removed, "renumber")):
        expected = greedy(model, prompt, steps=20)[0]
        actual = greedy(model, prompt, steps=20, prompt_lookup_num_tokens=4)[0]
    assert torch.equal(actual, expected)


@torch.no_grad()
def test_renumbered_without_a_cache():
    model = build_once("llava")
    prompt = inputs("llava", model)
    removed = draw_removed(prompt["input_ids"], {-1: [5, 3]})
    with foveate.apply(model, Fixed(removed, "renumber")):
        expected = greedy(model, prompt, **NO_PLACEHOLDER)[1]
        actual = greedy(model, prompt, use_cache=False, **NO_PLACEHOLDER)[1]
    assert largest(actual - expected) <= TOLERANCE


@pytest.mark.parametrize("name", SEVERAL_AXES)
def test_positions_on_several_axes_are_refused(name: str):
    model = build_once(name)
    removed = {-1: torch.zeros(1, 4, dtype=torch.bool)}
    with pytest.raises(foveate.UnsupportedError, match="keep"):
        foveate.apply(model, Fixed(removed, "renumber"))


@torch.no_grad()
def test_compact_is_an_old_name():
    """Of "renumber", before layer 0 only; whoever uses it is told, in his own file."""
    model = build_once("llava")
    prompt = inputs("llava", model)
    removed = draw_removed(prompt["input_ids"], {-1: [5, 3]})
    with foveate.apply(model, Fixed(removed, "renumber")):
        expected = greedy(model, prompt)[1]

    class Says(Fixed):
        def decide(self, view: foveate.View) -> foveate.Decision:
            return foveate.Decision(super().decide(view).keep, positions="compact")

    for reducer in (Fixed(removed, "compact"), Says(removed)):
        with pytest.warns(DeprecationWarning, match="renumber") as said, foveate.apply(model, reducer):
            assert torch.equal(greedy(model, prompt)[1], expected)
        assert {warning.filename for warning in said} <= {__file__, warnings.__file__}
        assert reducer.positions in ("compact", "keep"), "the method is what it was"
    with pytest.warns(DeprecationWarning, match="renumber"):
        assert foveate.Random(keep=4, positions="compact") == foveate.Random(keep=4, positions="renumber")
    with pytest.raises(foveate.UnsupportedError, match="compact"):
        foveate.apply(model, Fixed({1: torch.zeros(1, 4, dtype=torch.bool)}, "compact"))


@torch.no_grad()
def test_renumbering_up_to_the_window():
    """As long as no key has left the window, numbers are all there is to it."""
    ids, visual = torch.randint(5, 140, (1, 20)), torch.zeros(1, 20, dtype=torch.bool)
    visual[0, 4:12] = True
    removed = {1: visual & (torch.arange(20) % 3 > 0)}
    for window, fits in ((20, True), (19, False)):
        model = spread_weights(hf.MistralForCausalLM(hf.MistralConfig(**DECODER, sliding_window=window)))
        with foveate.apply(model, Fixed(removed, "renumber"), visual=visual):
            if fits:
                assert bool(model(input_ids=ids).logits.isfinite().all())
                continue
            with pytest.raises(foveate.UnsupportedError, match="window"):
                model(input_ids=ids)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mistral3", "aya_vision", "gemma3_window"])
def test_renumbering_within_an_exceeded_window_is_refused(name: str):
    model: PreTrainedModel = build_once(name)
    prompt = inputs(name, model)
    untouched = model(**prompt).logits
    removed = draw_removed(prompt["input_ids"], {-1: [5, 3]})
    with foveate.apply(model, Fixed(removed, "renumber")), pytest.raises(foveate.UnsupportedError, match="window"):
        model(**prompt)
    assert torch.equal(model(**prompt).logits, untouched)
