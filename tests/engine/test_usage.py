"""The many ways to call a model: loops by hand, no cache, embeddings, many images, videos, several turns, bfloat16."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests.families import FAMILIES, IMAGE_END, IMAGE_START, IMAGE_TOKEN, VIDEO_TOKEN, inputs, token_types, visual_slots
from tests.reference.checks import (
    TOLERANCE,
    assert_exact,
    build_once,
    footprint,
    generate,
    greedy,
    greedy_by_hand,
    largest,
)
from tests.reference.masked import MaskedReference
from tests.reference.plans import Fixed, TopOfLast, Watch, all_removed, draw_removed
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

import foveate
from foveate.engine.compat import CACHE_NAME, returned_cache
from foveate.reduction import TapSpec

COUNTS = {-1: [8, 9], 1: [4, 7], 3: [2, 0]}
NO_PLACEHOLDER = {"suppress_tokens": [IMAGE_TOKEN, VIDEO_TOKEN]}
"""Without a cache transformers would look for the image of a generated placeholder."""


@pytest.fixture
def family(request: pytest.FixtureRequest):
    """(name, model), left as found."""
    model = build_once(request.param)
    before = footprint(model)
    yield request.param, model
    assert footprint(model) == before


def some(*names: str):
    """Run on some families only."""
    params = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names]
    return pytest.mark.parametrize("family", params, indirect=True)


every = some(*FAMILIES)


# ----------------------------------------------------------------------------------------------- loops and no cache
@torch.no_grad()
@every
def test_a_loop_by_hand(family: tuple[str, PreTrainedModel]):
    """Nobody says where a new token stands: the logical length of the cache must."""
    name, model = family
    prompt = inputs(name, model, batch=1)
    removed = draw_removed(prompt["input_ids"], {-1: [8], 1: [4]})
    with MaskedReference(model, removed):
        expected = greedy_by_hand(model, prompt)
    with foveate.apply(model, Fixed(removed)):
        actual = greedy_by_hand(model, prompt)
    assert largest(actual - expected) <= TOLERANCE


@torch.no_grad()
@every
def test_without_a_cache(family: tuple[str, PreTrainedModel]):
    """Every step is a prefill, and every one decides by the prompt alone."""
    name, model = family
    prompt = inputs(name, model)
    removed = draw_removed(prompt["input_ids"], COUNTS)
    reducer = Watch(removed)
    with MaskedReference(model, removed):
        expected = greedy(model, prompt, steps=5, **NO_PLACEHOLDER)[1]
    with foveate.apply(model, reducer):
        actual = greedy(model, prompt, steps=5, use_cache=False, **NO_PLACEHOLDER)[1]
    if name != "paligemma":  # without a cache its prefix mask covers what it generates, with or without reduction
        assert largest(actual - expected) <= TOLERANCE
    assert {view.hidden.shape[1] for view in reducer.views} == {prompt["input_ids"].shape[1]}


@torch.no_grad()
@pytest.mark.parametrize(
    "method",
    [foveate.SparseVLM(keep=6), foveate.VisionZip(keep=4), foveate.ToMe(keep=0.5), foveate.DART(keep=4, layer=2)],
    ids=lambda method: type(method).__name__,
)
def test_methods_without_a_cache(method: foveate.Reducer):
    model = build_once("llava")
    prompt = inputs("llava", model)
    with foveate.apply(model, method) as session:
        expected = greedy(model, prompt, steps=4)[1]
        lengths = session.trace.kv_lengths
        assert largest(greedy(model, prompt, steps=4, use_cache=False)[1] - expected) <= TOLERANCE
        assert session.trace.visual_tokens.shape == (2, 6)
        model(**prompt, use_cache=False)
        assert session.trace.kv_lengths == lengths, "keys that each layer attended to"


@torch.no_grad()
@some("llava", "qwen2_5_vl", "gemma3_window", "idefics3", "mistral3")
def test_decisions_are_made_by_the_last_token_of_the_prompt(family: tuple[str, PreTrainedModel]):
    """Not by a candidate, not by a generated token: all ways to decode keep the same tokens and say the same."""
    name, model = family
    prompt = inputs(name, model, batch=1)

    def run(**options: Any) -> tuple[Tensor, Tensor]:
        with foveate.apply(model, TopOfLast(4)) as session:
            tokens = generate(model, prompt, steps=12, **NO_PLACEHOLDER, **options).sequences
        return tokens, session.trace.kept(1)

    tokens, kept = run()
    for options in ({"prompt_lookup_num_tokens": 4}, {"use_cache": False}):
        other_tokens, other_kept = run(**options)
        assert torch.equal(other_tokens, tokens), options
        assert torch.equal(other_kept, kept), options
    assert torch.equal(run(num_beams=3)[1], kept.expand(3, -1))


@torch.no_grad()
@some("llava", "qwen3_vl", "gemma3_window")
def test_sampling_several_answers(family: tuple[str, PreTrainedModel]):
    name, model = family
    prompt = inputs(name, model)
    removed = draw_removed(prompt["input_ids"], COUNTS)

    def sample() -> Tensor:
        torch.manual_seed(0)
        return model.generate(**prompt, do_sample=True, num_return_sequences=3, max_new_tokens=6, pad_token_id=0)

    with MaskedReference(model, removed):
        expected = sample()
    with foveate.apply(model, Fixed(removed)):
        assert torch.equal(sample(), expected)


# ------------------------------------------------------------------------------------------------------- embeddings
@torch.no_grad()
@some("llava", "internvl", "idefics3", "smolvlm", "qwen2_5_vl")
def test_embeddings_instead_of_ids(family: tuple[str, PreTrainedModel]):
    name, model = family
    prompt = inputs(name, model)
    removed = draw_removed(prompt["input_ids"], COUNTS)
    embedded = {k: v for k, v in prompt.items() if k != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(prompt["input_ids"])
    if name == "qwen2_5_vl":
        known = {k: v for k, v in prompt.items() if k != "pixel_values"}
        embedded["position_ids"] = model.model.get_rope_index(**known)[0]
    given = embedded["inputs_embeds"].clone()
    kept = prompt["attention_mask"].bool() & ~all_removed(removed)
    with MaskedReference(model, removed):
        expected = model(**embedded).logits
    with foveate.apply(model, Fixed(removed)) as session:
        actual = model(**embedded).logits
    assert largest((actual - expected)[kept]) <= TOLERANCE
    assert torch.equal(session.trace.visual, visual_slots(prompt["input_ids"]))
    assert torch.equal(embedded["inputs_embeds"], given), "the caller's embeddings are not written to"


# ------------------------------------------------------------------------------------------ several images, and videos
@every
def test_several_images_in_a_row(family: tuple[str, PreTrainedModel]):
    name, model = family
    prompt = inputs(name, model, images=[2, 1])
    assert_exact(model, prompt, draw_removed(prompt["input_ids"], COUNTS))


@some("llava", "qwen2_vl", "internvl", "gemma3_window", "mistral3")
def test_a_row_without_image(family: tuple[str, PreTrainedModel]):
    name, model = family
    prompt = inputs(name, model, images=[1, 0])
    assert_exact(model, prompt, draw_removed(prompt["input_ids"], {1: [4, 0], 3: [0, 0]}))


@some("llava", "qwen2_5_vl", "gemma3_window", "paligemma", "mistral3")
def test_words_may_be_removed_too(family: tuple[str, PreTrainedModel]):
    name, model = family
    prompt = inputs(name, model)
    removed = draw_removed(prompt["input_ids"], {1: [4, 7]})
    for row in range(2):
        words = (~visual_slots(prompt["input_ids"][row]) & prompt["attention_mask"][row].bool()).nonzero()[:, 0]
        removed[1][row, words[1:-1:3]] = True
    assert_exact(model, prompt, removed)


def _video_prompt(name: str) -> dict[str, Tensor]:
    """Two rows with a video each, of two and of three frames pairs."""
    grids = torch.tensor([[2, 4, 6], [3, 4, 4]])
    rows = []
    for row, grid in enumerate(grids.tolist()):
        frames = [VIDEO_TOKEN] * (grid[0] * grid[1] * grid[2] // 4)
        rows.append([1, 10 + row, 11, IMAGE_START, *frames, IMAGE_END, *range(20, 28 + 3 * row)])
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    patches = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(2))
    return {
        "pixel_values_videos": patches,
        "video_grid_thw": grids,
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        **token_types(name, ids),
    }


@some("qwen2_vl", "qwen2_5_vl")
def test_videos(family: tuple[str, PreTrainedModel]):
    name, model = family
    prompt = _video_prompt(name)
    assert_exact(model, prompt, draw_removed(prompt["input_ids"], COUNTS))


# ---------------------------------------------------------------------------------------------------- several turns
def _second_turn(name: str, model: PreTrainedModel, first: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """A question about a new image: what is new of it, and the (B, S1 + S2) attention mask."""
    turn = inputs(name, model, before=3, after=6, seed=11)
    turn["pixel_values"] = turn["pixel_values"].flip(0)
    # Rows of a later turn are as long as each other: no padding in the middle.
    turn["input_ids"] = turn["input_ids"].masked_fill(turn["input_ids"] == 0, 9)
    mask = torch.cat([first["attention_mask"], torch.ones_like(turn["input_ids"])], 1)
    return turn, mask


@torch.no_grad()
@some("llava", "internvl", "idefics3", "mistral3")
def test_a_second_turn_with_a_new_image(family: tuple[str, PreTrainedModel]):
    """Its slots are counted from its own start; both turns stay reduced."""
    name, model = family
    first = inputs(name, model)
    turn, mask = _second_turn(name, model, first)
    length = first["input_ids"].shape[1]
    removed = draw_removed(first["input_ids"], {1: [4, 7], 3: [2, 0]})
    again = draw_removed(turn["input_ids"], {1: [5, 3], 3: [1, 2]}, seed=5)
    both = {stage: torch.cat([removed[stage], again[stage]], 1) for stage in removed}

    def talk(reducer: Any) -> tuple[Tensor, Tensor]:
        reducer.removed = removed
        cache = returned_cache(model(**first, use_cache=True))
        reducer.removed = again if isinstance(reducer, Watch) else both
        second = model(**{**turn, "attention_mask": mask, CACHE_NAME: cache})
        token = torch.full((2, 1), 12)
        third = model(input_ids=token, attention_mask=pad(mask, (0, 1), value=1), **{CACHE_NAME: cache})
        return second.logits, third.logits

    reference, reducer = MaskedReference(model, removed), Watch(removed, {3: TapSpec("last")})
    with reference:
        expected = talk(reference)
    with foveate.apply(model, reducer) as session:
        actual = talk(session.reducer)
    kept = ~all_removed(again)
    assert largest((actual[0] - expected[0])[kept]) <= TOLERANCE
    assert largest(actual[1] - expected[1]) <= TOLERANCE
    assert torch.equal(session.trace.kept(3), visual_slots(turn["input_ids"]) & kept)
    tap = reducer.views[-1].tap
    assert tap.key_slots.min() < 0, "keys of the first turn have negative slots"
    assert tap.key_slots.min() >= -length
    assert largest(tap.weights.sum(-1) - 1) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("first_words", [4, 60], ids=["after a short turn", "after a long turn"])
@pytest.mark.parametrize("given", ["all", "new"])
@some("llava", "internvl")
def test_generating_about_an_image_in_a_second_turn(family: tuple[str, PreTrainedModel], first_words: int, given: str):
    """`generate` takes the whole conversation or only what is new of it."""
    name, model = family
    turn = inputs(name, model, batch=1, before=3, after=6, seed=11)
    words = torch.randint(5, 140, (1, first_words), generator=torch.Generator().manual_seed(2))
    removed = draw_removed(turn["input_ids"], {1: [5]}, seed=5)
    ids = torch.cat([words, turn["input_ids"]], 1)
    asked = {**turn, "input_ids": ids if given == "all" else turn["input_ids"], "attention_mask": torch.ones_like(ids)}

    def talk() -> Tensor:
        cache = DynamicCache(config=model.config.get_text_config())
        model(input_ids=words, **{CACHE_NAME: cache})
        return greedy(model, {**asked, CACHE_NAME: cache}, steps=5)[1]

    with MaskedReference(model, {1: pad(removed[1], (first_words, 0))}):
        expected = talk()
    reducer = Watch(removed)
    with foveate.apply(model, reducer):
        actual = talk()
    assert [view.hidden.shape[1] for view in reducer.views] == [turn["input_ids"].shape[1]]
    assert largest(actual - expected) <= TOLERANCE


# ------------------------------------------------------------------------------------------------------- half a float
@torch.no_grad()
@some("llava", "qwen2_5_vl", "gemma3_window", "idefics3")
def test_bfloat16(family: tuple[str, PreTrainedModel]):
    name, model = family
    prompt = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs(name, model).items()}
    model = copy.deepcopy(model).to(torch.bfloat16)
    removed = draw_removed(prompt["input_ids"], COUNTS)
    kept = prompt["attention_mask"].bool() & ~all_removed(removed)
    with MaskedReference(model, removed):
        expected = model(**prompt).logits.float()
    with foveate.apply(model, Fixed(removed)):
        actual = model(**prompt).logits
        steps = greedy(model, prompt)[1]
    assert actual.dtype == torch.bfloat16
    assert actual.isfinite().all()
    assert steps.isfinite().all()
    assert (actual.float() - expected)[kept].abs().mean() <= 0.05 * expected[kept].std()
