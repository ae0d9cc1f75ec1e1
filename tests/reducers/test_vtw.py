"""VTW."""

from __future__ import annotations

import pytest
import torch

import foveate
from tests import families
from tests.reference.checks import assert_exact, build_once, greedy


def trace_of(reducer: foveate.Reducer, name: str = "llava", **options: object) -> foveate.Trace:
    model = build_once(name)
    with foveate.apply(model, reducer) as session, torch.no_grad():
        model(**families.inputs(name, model, **options))
    return session.trace


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3_window", "paligemma", "internvl"])
@pytest.mark.parametrize("layer", [0, 1, 4])
def test_it_is_the_model_that_stops_looking_at_the_image(name: str, layer: int):
    model = build_once(name)
    inputs = families.inputs(name, model, batch=2)
    visual = families.visual_slots(inputs["input_ids"])
    assert_exact(model, inputs, {layer - 1: visual}, foveate.VTW(layer=layer))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "smolvlm"])
def test_several_images_with_text_between(name: str):
    model = build_once(name)
    inputs = families.inputs(name, model, batch=2, images=[3, 1])
    visual = families.visual_slots(inputs["input_ids"])
    edges = (visual[0, 1:] != visual[0, :-1]).sum()
    assert edges == 6, "three images, words around each"
    trace = assert_exact(model, inputs, {2: visual}, foveate.VTW(layer=3))
    text = inputs["attention_mask"].bool() & ~visual
    assert torch.equal(trace.active(2), text)
    assert trace.kv_lengths == [visual.shape[1]] * 3 + [int(text.sum(1).max())] * 3


def test_renumbered_from_the_start_is_a_prompt_without_image():
    model = build_once("llava")
    inputs = families.inputs("llava", model, batch=2, images=[2, 1])
    text = inputs["attention_mask"].bool() & ~families.visual_slots(inputs["input_ids"])
    with foveate.apply(model, foveate.VTW(layer=0, positions="renumber")):
        tokens, logits = greedy(model, inputs, steps=5)
    for row in range(2):
        plain = {"input_ids": inputs["input_ids"][row][text[row]][None]}
        plain["attention_mask"] = torch.ones_like(plain["input_ids"])
        expected_tokens, expected = greedy(model, plain, steps=5)
        assert torch.equal(tokens[row, -5:], expected_tokens[0, -5:])
        torch.testing.assert_close(logits[row], expected[0], atol=2e-5, rtol=0)


def test_renumbering_is_not_keeping():
    model = build_once("llava")
    inputs = families.inputs("llava", model)
    with torch.no_grad():
        with foveate.apply(model, foveate.VTW(layer=2)):
            keep = model(**inputs).logits[:, -1]
        with foveate.apply(model, foveate.VTW(layer=2, positions="renumber")):
            renumbered = model(**inputs).logits[:, -1]
    assert (keep - renumbered).abs().max() > 1e-2


def test_batch_equals_singles():
    model = build_once("llava")
    inputs = families.inputs("llava", model, batch=3)
    for positions in ("keep", "renumber"):
        with foveate.apply(model, foveate.VTW(layer=2, positions=positions)), torch.no_grad():
            together = model(**inputs).logits[:, -1]
            for row in range(3):
                start = int(inputs["attention_mask"][row].argmax())
                single = model(
                    input_ids=inputs["input_ids"][row : row + 1, start:],
                    attention_mask=inputs["attention_mask"][row : row + 1, start:],
                    pixel_values=inputs["pixel_values"][row : row + 1],
                ).logits[0, -1]
                torch.testing.assert_close(together[row], single, atol=2e-5, rtol=0)


def test_where_it_acts():
    assert trace_of(foveate.VTW()).visual_tokens[0].tolist() == [16, 16, 16, 0, 0, 0]
    assert trace_of(foveate.VTW(layer=0.34)).visual_tokens[0].tolist() == [16, 16, 0, 0, 0, 0]
    assert trace_of(foveate.VTW(keep=0.5)).mean_visual_tokens.tolist() == [8.0, 8.0]
    assert trace_of(foveate.VTW(keep=0.01)).visual_tokens[0].tolist() == [16, 0, 0, 0, 0, 0]
    assert trace_of(foveate.VTW(keep=8)).mean_visual_tokens.tolist() == [8.0, 8.0]
    assert trace_of(foveate.VTW(keep=8), images=[1, 2]).mean_visual_tokens.tolist() == [8.0, 16.0]
    assert trace_of(foveate.VTW(layer=5, faithful=True)).visual_tokens[0].tolist() == [16] * 5 + [0]


def test_a_count_gives_each_row_its_own_layer():
    model = build_once("qwen2_5_vl")
    inputs = families.inputs("qwen2_5_vl", model, batch=3)
    visual = families.visual_slots(inputs["input_ids"])
    tokens = visual.sum(1).tolist()
    layers = [max(1, round(6 * min(8, n) / n)) for n in tokens]
    assert len(set(layers)) > 1, "the rows should differ"
    removed = {k - 1: visual & torch.tensor([[layer == k] for layer in layers]) for k in set(layers) if k < 6}
    assert_exact(model, inputs, removed, foveate.VTW(keep=8))
    with foveate.apply(model, foveate.VTW(keep=8)) as session, torch.no_grad():
        model(**inputs)
    expected = [[n if layer < k else 0 for layer in range(6)] for n, k in zip(tokens, layers)]
    assert session.trace.visual_tokens.tolist() == expected


@pytest.mark.parametrize("options", [{"keep": 1.0}, {"keep": 16}, {"keep": 500}])
def test_everything_kept_is_bitwise_the_model(options: dict):
    model = build_once("llava")
    inputs = families.inputs("llava", model)
    expected = greedy(model, inputs, steps=3)
    with foveate.apply(model, foveate.VTW(**options)):
        actual = greedy(model, inputs, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def test_an_instance_can_be_used_again():
    reducer = foveate.VTW(layer=0.5)
    first, second = trace_of(reducer), trace_of(reducer, "qwen3_vl")
    assert first.visual_tokens[0, 2] == 16
    assert second.visual_tokens[0, 3] == 0
    assert reducer == foveate.VTW(layer=0.5)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"layer": -1}, "layer=-1"),
        ({"layer": 1.5}, "layer=1.5"),
        ({"layer": "16"}, "layer='16'"),
        ({"layer": 2, "keep": 0.5}, "layer=2 and keep=0.5"),
        ({"positions": "compact"}, "positions='compact'"),
        ({"layer": 0.5, "faithful": True}, "faithful"),
        ({"keep": 0.5, "faithful": True}, "faithful"),
    ],
)
def test_bad_options(options: dict, culprit: str):
    with pytest.raises(foveate.OptionError, match=culprit):
        foveate.VTW(**options)


@pytest.mark.parametrize("keep", [0, -1.0, "abc", 2.5])
def test_bad_budgets(keep: object):
    with pytest.raises(foveate.BudgetError, match="keep"):
        foveate.VTW(keep=keep)


@pytest.mark.parametrize("reducer", [foveate.VTW(layer=6), foveate.VTW(layer=16), foveate.VTW(faithful=True)])
def test_a_layer_beyond_the_depth_is_refused_with_the_depth(reducer: foveate.Reducer):
    with pytest.raises(foveate.OptionError, match=f"{families.N_LAYERS} decoder layers"):
        foveate.apply(build_once("llava"), reducer)


def test_renumbering_needs_positions_on_a_line():
    with pytest.raises(foveate.UnsupportedError):
        trace_of(foveate.VTW(layer=2, positions="renumber"), "qwen2_vl")
