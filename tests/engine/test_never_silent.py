"""Under a session a call is reduced, or it says why not: never the full model without a word."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.families import inputs, visual_slots
from tests.reference.checks import build_once, generate, largest
from torch import Tensor

import foveate
from foveate.engine.compat import CACHE_NAME, returned_cache

CALLS = {
    "Random": lambda: foveate.Random(keep=4),
    "FastV": lambda: foveate.FastV(keep=4, layer=1),
    "VisionZip": lambda: foveate.VisionZip(keep=4),
}
methods = pytest.mark.parametrize("method", CALLS)
families = pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "gemma3"])


def embedded(model: Any, prompt: dict[str, Tensor]) -> dict[str, Tensor]:
    """The prompt as embeddings with the image features in place."""
    features = model.model.get_image_features(pixel_values=prompt["pixel_values"], return_dict=True).pooler_output
    flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in features])
    embeds = model.get_input_embeddings()(prompt["input_ids"])
    embeds = embeds.masked_scatter(visual_slots(prompt["input_ids"])[..., None], flat)
    return {"inputs_embeds": embeds, "attention_mask": prompt["attention_mask"]}


# ------------------------------------------------------------------------------------------------------- embeddings
@torch.no_grad()
@methods
@pytest.mark.parametrize("how", ["forward", "generate", "decoder"])
def test_embeddings_that_hold_images_already_are_refused(method: str, how: str):
    model = build_once("llava")
    call = embedded(model, inputs("llava", model))
    run = {"forward": model, "generate": lambda **k: generate(model, k, 2), "decoder": model.get_decoder()}[how]
    with foveate.apply(model, CALLS[method]()) as session:
        with pytest.raises(foveate.UnsupportedError, match="visual="):
            run(**call)
        assert session.trace is None
        model(**inputs("llava", model))
        assert session.trace is not None, "still usable"


@torch.no_grad()
@pytest.mark.parametrize("form", ["bool", "long"])
def test_embeddings_are_served_when_somebody_says_what_is_visual(form: str):
    model = build_once("llava")
    prompt = inputs("llava", model)
    slots = visual_slots(prompt["input_ids"])
    with foveate.apply(model, foveate.Random(keep=4)):
        right = generate(model, prompt, 3).logits
    with foveate.apply(model, foveate.Random(keep=4), visual=slots if form == "bool" else slots.long()):
        got = generate(model, embedded(model, prompt), 3).logits
    assert largest(torch.stack(got) - torch.stack(right)) <= 1e-4


@torch.no_grad()
def test_embeddings_of_words_are_served_when_somebody_says_so():
    model = build_once("llava")
    embeds = model.get_input_embeddings()(torch.randint(5, 140, (2, 9)))
    plain = model(inputs_embeds=embeds).logits
    with foveate.apply(model, foveate.Random(keep=4), visual=torch.zeros(2, 9, dtype=torch.bool)) as session:
        assert torch.equal(model(inputs_embeds=embeds).logits, plain)
    assert session.trace is None


# ---------------------------------------------------------------------------------------------------- other people's
@torch.no_grad()
@families
@methods
def test_a_method_wrapped_before_is_wrapped_again(name: str, method: str):
    model = copy.deepcopy(build_once(name))
    prompt = inputs(name, model)
    with foveate.apply(model, CALLS[method]()):
        right = model(**prompt).logits
    mine = {}
    for owner, attribute in (
        (model.model, "get_placeholder_mask"),
        (model.model, "get_image_features"),
        (model, "generate"),
    ):
        mine[attribute] = getattr(owner, attribute)
        setattr(owner, attribute, mine[attribute])
    with foveate.apply(model, CALLS[method]()) as session:
        assert torch.equal(model(**prompt).logits, right)
        assert session.trace is not None
    assert all(model.model.__dict__.get(key, model.__dict__.get(key)) is value for key, value in mine.items())


@torch.no_grad()
@methods
def test_images_of_which_no_slot_was_seen_are_an_error(method: str):
    """The model looks for its placeholders in a way that nothing can watch."""
    model = copy.deepcopy(build_once("llava"))
    prompt = inputs("llava", model)
    find = model.model.get_placeholder_mask
    with foveate.apply(model, CALLS[method]()) as session:
        model.model.get_placeholder_mask = find  # put over ours, while the session is open
        with pytest.raises(foveate.UnsupportedError, match="get_placeholder_mask"):
            model(**prompt)
        assert session.trace is None


@pytest.mark.slow
@torch.no_grad()
def test_layers_that_were_compiled_and_called_before_are_reduced():
    """Dynamo does not look at hooks again: what it has compiled must be forgotten."""
    model = copy.deepcopy(build_once("llava"))
    prompt = inputs("llava", model, batch=1)
    with foveate.apply(model, foveate.FastV(keep=4, layer=1)):
        right = model(**prompt).logits
    model.get_decoder().layers[1].mlp.compile(backend="eager")
    model.get_decoder().layers[2].compile(backend="eager")
    plain = model(**prompt).logits
    with foveate.apply(model, foveate.FastV(keep=4, layer=1)) as session:
        assert largest(model(**prompt).logits - right) <= 1e-4
        assert int(session.trace.visual_tokens[0, 3]) == 4
    assert largest(model(**prompt).logits - plain) <= 1e-4, "and full again afterwards"


@torch.no_grad()
def test_the_wrapper_of_torch_compile_stands_for_its_model():
    model = copy.deepcopy(build_once("llava"))
    prompt = inputs("llava", model, batch=1)
    compiled = torch.compile(model, backend="eager")
    with torch.compiler.set_stance("force_eager"), foveate.apply(compiled, foveate.FastV(keep=4, layer=1)) as session:
        compiled(**prompt)
    assert session.trace.visual_tokens[0].tolist() == [16, 4, 4, 4, 4, 4]


@methods
def test_continuous_batching_is_refused(method: str):
    model = build_once("llava")
    with foveate.apply(model, CALLS[method]()):
        for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
            with pytest.raises(foveate.UnsupportedError, match="continuous batching"):
                getattr(model, name)([[1, 5, 6]])
    assert "generate_batch" not in model.__dict__


# --------------------------------------------------------------------------------------------------- chunks, packing
@torch.no_grad()
@families
@pytest.mark.parametrize("how", ["argument", "config", "model"])
def test_chunked_prefill_is_refused(name: str, how: str):
    model = copy.deepcopy(build_once(name))
    prompt, options = inputs(name, model, batch=1), {}
    if how == "argument":
        options = {"prefill_chunk_size": 8}
    elif how == "model":
        model.generation_config.prefill_chunk_size = 8
    else:
        config = copy.deepcopy(model.generation_config)
        config.prefill_chunk_size = 8
        options = {"generation_config": config}
    with foveate.apply(model, foveate.Random(keep=4)), pytest.raises(foveate.UnsupportedError, match="chunk"):
        generate(model, prompt, 2, **options)


def packed(how: str, kind: str) -> dict[str, Tensor]:
    """Two samples in one row."""
    model = build_once("llava")
    prompt = inputs("llava", model, batch=2, before=3, after=5)
    rows = [prompt["input_ids"][i][prompt["attention_mask"][i].bool()] for i in range(2)]
    ids, lengths = torch.cat(rows)[None], [len(row) for row in rows]
    which = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    block = ((which[:, None] == which[None]) & torch.ones(len(which), len(which)).tril().bool())[None, None]
    call = {"input_ids": ids, "pixel_values": prompt["pixel_values"]}
    if how == "positions":
        call["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    elif how == "mask":
        additive = torch.zeros(block.shape).masked_fill(~block, torch.finfo(torch.float32).min)
        call["attention_mask"] = block if kind == "bool" else additive
    else:
        call["cu_seq_lens_q"] = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    return call


@torch.no_grad()
@methods
@pytest.mark.parametrize(("how", "kind"), [("positions", ""), ("mask", "bool"), ("mask", "additive"), ("borders", "")])
def test_packed_rows_are_refused(method: str, how: str, kind: str):
    model = build_once("llava")
    with foveate.apply(model, CALLS[method]()), pytest.raises(foveate.UnsupportedError, match="packed"):
        model(**packed(how, kind))


@torch.no_grad()
@methods
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_causal_4d_mask_and_given_positions_are_no_packing(method: str, padding: str):
    model = build_once("llava")
    prompt = inputs("llava", model)
    if padding == "right":
        for name in ("input_ids", "attention_mask"):
            prompt[name] = torch.stack(
                [row.roll(-int((m == 0).sum())) for row, m in zip(prompt[name], prompt["attention_mask"])]
            )
    there = prompt["attention_mask"].bool()
    square = torch.ones(there.shape[1], there.shape[1], dtype=torch.bool).tril()
    mask = (square & there[:, None] & there[:, :, None])[:, None]
    places = (there.cumsum(1) - 1).clamp_min(0)
    with foveate.apply(model, CALLS[method]()) as session:
        right = model(**{**prompt, "position_ids": places}).logits
        counts = session.trace.visual_tokens
        got = model(**{**prompt, "attention_mask": mask, "position_ids": places}).logits
        assert torch.equal(session.trace.visual_tokens, counts)
    last = there & (there.flip(1).cumsum(1).flip(1) == 1)
    assert largest((got - right)[last]) <= 1e-4


# ------------------------------------------------------------------------------------------------------- the record
@torch.no_grad()
@methods
def test_a_call_without_images_leaves_no_trace_of_the_one_before(method: str):
    model = build_once("llava")
    prompt, words = inputs("llava", model), {"input_ids": torch.randint(5, 140, (1, 9))}
    with foveate.apply(model, CALLS[method]()) as session:
        for ask in (lambda: model(**words), lambda: generate(model, words, 2)):
            cache = returned_cache(model(**prompt, use_cache=True))
            assert session.trace is not None
            ask()
            assert session.trace is None
        model(**prompt)
        seen = session.trace
        model(input_ids=torch.tensor([[7], [8]]), **{CACHE_NAME: cache})
        assert session.trace is seen, "a decoding step is no call of its own"


# --------------------------------------------------------------------------------------------------------- last slot
@torch.no_grad()
@families
@methods
@pytest.mark.parametrize("padding", [0, 3])
def test_a_prompt_that_ends_with_its_image(name: str, method: str, padding: int):
    model = build_once(name)
    prompt = inputs(name, model, batch=1)
    end = int(visual_slots(prompt["input_ids"])[0].nonzero().max()) + 1
    cut = {
        k: v[..., :end] if v.dim() == 2 and v.shape[-1] > end else v for k, v in prompt.items() if k != "pixel_values"
    }
    if padding and name == "llava":
        cut = {k: torch.nn.functional.pad(v, (0, padding)) for k, v in cut.items()}
    with foveate.apply(model, CALLS[method]()) as session:
        model(**cut, pixel_values=prompt["pixel_values"])
    kept = session.trace.kept(max(session.trace.stages))[0]
    assert bool(kept[end - 1])
    assert 4 <= int(kept.sum()) <= 5
