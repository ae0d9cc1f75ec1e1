"""The random baseline."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.reducers.random import _draw
from tests import families
from tests.reference.checks import assert_exact, build_once, greedy


def kept_numbers(model, inputs: dict, reducer: foveate.Reducer) -> list[list[int]]:
    """Per row, which of its visual tokens stay, counted within the row."""
    with foveate.apply(model, reducer) as session, torch.no_grad():
        model(**inputs)
    kept = session.trace.kept(session.reducer.stages[-1])
    visual = families.visual_slots(inputs["input_ids"])
    return [kept[row][visual[row]].nonzero()[:, 0].tolist() for row in range(len(visual))]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3_window"])
@pytest.mark.parametrize("layer", [-1, 2])
def test_it_is_the_model_that_never_looks_at_the_rest(name: str, layer: int):
    model = build_once(name)
    inputs = families.inputs(name, model, batch=3)
    reducer = foveate.Random(keep=0.4, layer=layer)
    with foveate.apply(model, reducer) as session, torch.no_grad():
        model(**inputs)
    visual = families.visual_slots(inputs["input_ids"])
    kept = session.trace.kept(layer)
    assert kept.sum(1).tolist() == [round(0.4 * n) for n in visual.sum(1).tolist()]
    assert_exact(model, inputs, {layer: visual & ~kept}, reducer)


def test_renumbered_equals_a_prompt_that_never_had_the_others():
    model = build_once("llava")
    inputs = families.inputs("llava", model, batch=1)
    with foveate.apply(model, foveate.Random(keep=5, positions="renumber")) as session, torch.no_grad():
        actual = model(**inputs).logits[:, -1]
    left = session.trace.active(-1)[0]
    with torch.no_grad():
        states = []
        hook = model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs: states.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        model(**inputs)
        hook.remove()
        expected = model(inputs_embeds=states[0][:, left]).logits[:, -1]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_a_row_keeps_the_same_tokens_alone_and_in_any_batch():
    model = build_once("llava_next")  # rows of different length, images of different size
    inputs = families.inputs("llava_next", model, batch=3)
    together = kept_numbers(model, inputs, foveate.Random(keep=7))
    assert len(set(inputs["attention_mask"].sum(1).tolist())) == 3
    for row in range(3):
        start = int(inputs["attention_mask"][row].argmax())
        alone = {
            "input_ids": inputs["input_ids"][row : row + 1, start:],
            "attention_mask": inputs["attention_mask"][row : row + 1, start:],
            "pixel_values": inputs["pixel_values"][row : row + 1],
            "image_sizes": inputs["image_sizes"][row : row + 1],
        }
        assert kept_numbers(model, alone, foveate.Random(keep=7)) == [together[row]]
        with foveate.apply(model, foveate.Random(keep=7)), torch.no_grad():
            single, batch = model(**alone).logits[0, -1], model(**inputs).logits[row, -1]
        torch.testing.assert_close(single, batch, atol=2e-5, rtol=0)


def test_the_seed_decides_and_a_smaller_budget_keeps_a_subset():
    model = build_once("llava")
    inputs = families.inputs("llava", model, batch=1)
    reducer = foveate.Random(keep=6, seed=3)
    first = kept_numbers(model, inputs, reducer)
    assert kept_numbers(model, inputs, reducer) == first
    assert kept_numbers(model, inputs, foveate.Random(keep=6, seed=3, faithful=True)) == first
    assert kept_numbers(model, inputs, foveate.Random(keep=6, seed=4)) != first
    assert set(kept_numbers(model, inputs, foveate.Random(keep=4, seed=3))[0]) < set(first[0])


def test_several_images_have_the_budget_of_each():
    model = build_once("llava")
    inputs = families.inputs("llava", model, batch=2, images=[1, 3])
    assert [len(row) for row in kept_numbers(model, inputs, foveate.Random(keep=5))] == [5, 15]


def test_everything_kept_is_bitwise_the_model():
    model = build_once("llava")
    inputs = families.inputs("llava", model)
    expected = greedy(model, inputs, steps=3)
    with foveate.apply(model, foveate.Random(keep=1.0)):
        actual = greedy(model, inputs, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def test_the_draw_is_uniform_and_unrelated_between_seeds():
    n, seeds = 576, 400
    draws = torch.stack([_draw(torch.arange(n), seed) for seed in range(seeds)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert len(draws[0].unique()) > n - 3
    # 64 of 576 kept: every slot equally often. Binomial with p = 1/9: mean 44, deviation 6.3.
    often = torch.zeros(n).scatter_add_(0, draws.argsort(1)[:, :64].reshape(-1), torch.ones(seeds * 64))
    spread = ((often - seeds / 9) ** 2 / (seeds / 9 * 8 / 9)).mean()
    assert 0.8 < spread < 1.2
    assert (often - seeds / 9).abs().max() < 5 * 6.3
    assert torch.corrcoef(draws).fill_diagonal_(0).abs().max() < 5.5 / n**0.5
    # Neighbours along the sequence are unrelated too.
    assert (torch.corrcoef(draws.T).diagonal(1)).abs().max() < 5 / seeds**0.5


def test_negative_and_large_seeds_are_seeds():
    draws = [_draw(torch.arange(50), seed) for seed in (0, -1, 2**40, 2**63)]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


@pytest.mark.parametrize("keep", [0, -3, 0.0, 1.5, float("nan"), "many", None, True])
def test_bad_budgets(keep: object):
    with pytest.raises(foveate.BudgetError, match="keep"):
        foveate.Random(keep=keep)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"layer": -2}, "layer=-2"),
        ({"layer": 1.0}, "layer=1.0"),
        ({"layer": "2"}, "layer='2'"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"positions": "other"}, "positions='other'"),
    ],
)
def test_bad_options(options: dict, culprit: str):
    with pytest.raises(foveate.OptionError, match=culprit) as error:
        foveate.Random(keep=4, **options)
    assert "\n" not in str(error.value)


def test_a_layer_beyond_the_depth_is_refused_with_the_depth():
    model = build_once("llava")
    with pytest.raises(foveate.OptionError, match=f"layer=6.*{families.N_LAYERS} decoder layers"):
        foveate.apply(model, foveate.Random(keep=4, layer=6))


def test_a_fraction_of_the_depth_follows_the_model():
    reducer = foveate.Random(keep=4, layer=0.5)
    with foveate.apply(build_once("llava"), reducer) as session:
        assert session.reducer.stages == (3,)
    assert reducer.layer == 0.5
