"""Every family, with SDPA and eager attention, computes exactly what the masked reference computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from tests.families import FAMILIES, IMAGE_TOKEN, inputs, token_types, visual_slots
from tests.reference.checks import TOLERANCE, assert_exact, build_once, footprint, generate, greedy, largest
from tests.reference.masked import MaskedReference
from tests.reference.plans import Fixed, KeepAll, Watch, all_removed, draw_removed
from torch import Tensor
from transformers import PreTrainedModel

import foveate
from foveate.engine.compat import CACHE_NAME, returned_cache

CASES = [
    pytest.param((name, impl), id=f"{name}-{impl}", marks=marks)
    for name in FAMILIES
    for impl, marks in (("sdpa", ()), ("eager", pytest.mark.slow))
]

PLANS: dict[str, Mapping[int, Sequence[int]]] = {
    "one row": {1: [4]},
    "padded, equal counts": {1: [4, 4]},
    "padded, ragged counts": {1: [4, 7]},
    "progressive, then withdrawn": {0: [9, 11], 2: [6, 3], 4: [0, 0]},
    "before layer 0": {-1: [5, 6]},
    "before and inside": {-1: [8, 9], 1: [4, 7], 3: [2, 0]},
    "one row withdrawn at once": {2: [0, 8]},
}
SLOW = ("one row", "before layer 0", "one row withdrawn at once")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest):
    """(family, model); asserts that the test left the model as it was."""
    name, impl = request.param
    model = build_once(name, impl)
    before = footprint(model)
    yield name, model
    assert footprint(model) == before


@pytest.mark.parametrize(
    "plan", [pytest.param(plan, marks=[pytest.mark.slow] if plan in SLOW else []) for plan in PLANS]
)
def test_removed_tokens(case: tuple[str, PreTrainedModel], plan: str):
    name, model = case
    counts = PLANS[plan]
    prompt = inputs(name, model, batch=len(next(iter(counts.values()))))
    assert_exact(model, prompt, draw_removed(prompt["input_ids"], counts))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3_window"])
def test_ragged_rows_without_padding(name: str):
    """transformers makes no mask then, and ours has to hide the fillers: in the prefill, after it, without a cache."""
    model = build_once(name)
    prompt = {key: torch.cat([value, value]) for key, value in inputs(name, model, batch=1).items()}
    removed = draw_removed(prompt["input_ids"], {1: [7, 3]})
    assert_exact(model, prompt, removed)
    with MaskedReference(model, removed):
        expected = greedy(model, prompt, steps=3)[1]
    with foveate.apply(model, Fixed(removed)):
        assert largest(greedy(model, prompt, steps=3, use_cache=False)[1] - expected) <= TOLERANCE


def test_merged_tokens(case: tuple[str, PreTrainedModel]):
    """Merged tokens take the place of kept and of freed slots; rows with fewer of them are padded with -1."""
    name, model = case
    prompt = inputs(name, model)
    removed = draw_removed(prompt["input_ids"], {1: [5, 5]})[1]
    kept = visual_slots(prompt["input_ids"]) & ~removed
    freed = removed.int().argmax(1)
    slots = torch.stack([torch.cat([row.nonzero()[:2, 0], slot[None]]) for row, slot in zip(kept, freed)])
    slots[1, 1] = -1  # row 1 merges one token less
    still_gone = removed.clone()
    still_gone[torch.arange(2), freed] = False

    def values(hidden: Tensor) -> Tensor:
        """Half of what is there and the mean of what goes."""
        pool = (hidden * removed[..., None]).sum(1, keepdim=True) / removed.sum(1)[:, None, None]
        rows = torch.arange(2)[:, None]
        return hidden[rows, slots.clamp_min(0)] * 0.5 + pool

    def overwritten(hidden: Tensor) -> Tensor:
        hidden, new = hidden.clone(), values(hidden)
        for row in range(2):
            for slot, value in zip(slots[row].tolist(), new[row]):
                if slot >= 0:
                    hidden[row, slot] = value
        return hidden

    assert_exact(
        model,
        prompt,
        {1: still_gone},
        reducer=Fixed({1: still_gone}, merge={1: lambda hidden: (slots, values(hidden))}),
        reference=MaskedReference(model, {1: still_gone}, merge={1: overwritten}),
    )


@torch.no_grad()
def test_keeping_everything_is_bitwise_the_unpatched_model(case: tuple[str, PreTrainedModel]):
    name, model = case
    prompt = inputs(name, model)
    with _rotations(model) as expected_rotations:
        expected, expected_output = model(**prompt).logits, greedy(model, prompt)
    with foveate.apply(model, KeepAll()), _rotations(model) as rotations:
        actual, output = model(**prompt).logits, greedy(model, prompt)
    assert torch.equal(actual, expected)
    assert torch.equal(output[0], expected_output[0])
    assert torch.equal(output[1], expected_output[1])
    assert len(rotations) == len(expected_rotations) > 1
    assert all(torch.equal(a, b) for a, b in zip(rotations, expected_rotations)), "positions, decode steps included"


class _rotations:
    """Records the cosines that the last decoder layer is handed: what is left of the positions."""

    def __init__(self, model: PreTrainedModel):
        self.layer = model.get_decoder().layers[-1]

    def __enter__(self) -> list[Tensor]:
        seen: list[Tensor] = []

        def record(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            seen.append(kwargs["position_embeddings"][0].clone())

        self.handle = self.layer.register_forward_pre_hook(record, with_kwargs=True)
        return seen

    def __exit__(self, *exception: object) -> None:
        self.handle.remove()


@torch.no_grad()
def test_beam_search(case: tuple[str, PreTrainedModel]):
    name, model = case
    prompt = inputs(name, model)
    removed = draw_removed(prompt["input_ids"], PLANS["before and inside"])
    beams = {"num_beams": 3, "output_scores": True}
    with MaskedReference(model, removed):
        expected = generate(model, prompt, **beams)
    with foveate.apply(model, Fixed(removed)):
        actual = generate(model, prompt, **beams)
    assert torch.equal(actual.sequences, expected.sequences)
    assert largest(actual.sequences_scores - expected.sequences_scores) <= TOLERANCE


@torch.no_grad()
def test_second_turn_in_text_on_the_returned_cache(case: tuple[str, PreTrainedModel]):
    name, model = case
    prompt = inputs(name, model)
    removed = draw_removed(prompt["input_ids"], PLANS["before and inside"])

    def two_turns() -> Tensor:
        first = generate(model, prompt, steps=5)
        cache = returned_cache(first)
        question = torch.randint(5, 140, (2, 6), generator=torch.Generator().manual_seed(1))
        ids = torch.cat([first.sequences, question], 1)
        mask = torch.cat([prompt["attention_mask"], torch.ones(2, ids.shape[1] - prompt["attention_mask"].shape[1])], 1)
        extra = {"image_grid_thw": prompt["image_grid_thw"]} if "image_grid_thw" in prompt else {}
        turn = {"input_ids": ids, "attention_mask": mask.long(), **_known_types(name, ids, prompt), **extra}
        return greedy(model, {**turn, CACHE_NAME: cache}, steps=5)[1]

    with MaskedReference(model, removed):
        expected = two_turns()
    with foveate.apply(model, Fixed(removed)):
        actual = two_turns()
    assert largest(actual - expected) <= TOLERANCE


def _known_types(name: str, ids: Tensor, prompt: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Token types of a continued conversation; an image token that was generated is no image."""
    cleaned = ids.clone()
    generated = cleaned[:, prompt["input_ids"].shape[1] :]
    generated[visual_slots(generated)] = 7
    return token_types(name, cleaned)


@torch.no_grad()
def test_prompt_lookup_decoding(case: tuple[str, PreTrainedModel]):
    """Candidates that ride along with the prompt are never shown to a method, and change nothing."""
    name, model = case
    prompt = inputs(name, model, batch=1)
    removed = draw_removed(prompt["input_ids"], {-1: [8], 1: [4]})
    reducer = Watch(removed)
    # PaliGemma lets the prompt see candidates, so there it is not greedy decoding, with or without reduction.
    options = {"prompt_lookup_num_tokens": 4} if name == "paligemma" else {}
    with MaskedReference(model, removed):
        expected = greedy(model, prompt, steps=20, **options)[0]
    with foveate.apply(model, reducer):
        actual = generate(model, prompt, steps=20, prompt_lookup_num_tokens=4).sequences
    assert torch.equal(actual, expected)
    assert [view.stage for view in reducer.views] == [-1, 1], "one prefill"
    assert all(view.hidden.shape[1] == prompt["input_ids"].shape[1] for view in reducer.views)


def answer_labels(prompt: Mapping[str, Tensor]) -> Tensor:
    """All words are learnt but the first of a row, which only padding could predict."""
    padding = prompt["attention_mask"].cumsum(1) <= 1
    return prompt["input_ids"].masked_fill(visual_slots(prompt["input_ids"]) | padding, -100)


def test_training(case: tuple[str, PreTrainedModel]):
    """Loss and gradients of the masked reference; the image token that predicts the first word of the answer stays."""
    name, model = case
    prompt = inputs(name, model)
    labels = answer_labels(prompt)
    removed = {
        stage: gone for stage, gone in draw_removed(prompt["input_ids"], {-1: [9, 9], 1: [4, 7], 3: [0, 0]}).items()
    }
    predicts = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    expected_removed = {stage: gone & ~predicts for stage, gone in removed.items()}

    def loss_and_gradients() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        loss = model(**prompt, labels=labels, use_cache=False).loss
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return loss.detach(), gradients

    with MaskedReference(model, expected_removed):
        expected, expected_gradients = loss_and_gradients()
    with foveate.apply(model, Fixed(removed)) as session:
        actual, gradients = loss_and_gradients()
    assert abs(actual - expected) <= 1e-4
    assert gradients.keys() == expected_gradients.keys()
    scale = max(largest(gradient) for gradient in expected_gradients.values())
    for parameter, gradient in gradients.items():
        assert largest(gradient - expected_gradients[parameter]) <= TOLERANCE * max(1.0, scale), parameter
    visual = visual_slots(prompt["input_ids"])
    assert torch.equal(session.trace.kept(3), visual & ~all_removed(expected_removed))


@torch.no_grad()
def test_a_generated_image_token_is_no_image(case: tuple[str, PreTrainedModel]):
    """A hostile prompt can make the model say the placeholder; decode steps are left alone."""
    name, model = case
    prompt = inputs(name, model)
    removed = draw_removed(prompt["input_ids"], {1: [4, 7]})

    def say_it(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == prompt["input_ids"].shape[1] + 2:
            scores = torch.full_like(scores, -1e4)
            scores[:, IMAGE_TOKEN] = 0.0
        return scores

    reducer = Watch(removed)
    with MaskedReference(model, removed):
        expected = greedy(model, prompt, steps=6, logits_processor=[say_it])
    with foveate.apply(model, reducer):
        actual = greedy(model, prompt, steps=6, logits_processor=[say_it])
    assert (actual[0] == IMAGE_TOKEN)[:, -4].all()
    assert largest(actual[1] - expected[1]) <= TOLERANCE
    assert len(reducer.views) == 1
