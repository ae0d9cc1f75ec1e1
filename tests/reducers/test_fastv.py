"""FastV, against attention maps that the unpatched model itself returns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import foveate
from tests import families
from tests.reference.checks import assert_exact, build_once, greedy


@torch.no_grad()
def attention_to(name: str, inputs: dict, layer: int) -> Tensor:
    """(B, S) attention of the last token in a layer, mean of the heads, from the whole map of the unpatched model."""
    maps = build_once(name, "eager")(**inputs, output_attentions=True).attentions
    return maps[layer].mean(1)[:, -1]


def expected_removed(name: str, inputs: dict, layer: int, counts: list[int]) -> Tensor:
    """(B, S) bool: all visual tokens but the `counts[row]` most attended ones, row by row."""
    attention, visual = attention_to(name, inputs, layer - 1), families.visual_slots(inputs["input_ids"])
    removed = visual.clone()
    for row, count in enumerate(counts):
        slots = visual[row].nonzero()[:, 0].tolist()
        for slot in sorted(slots, key=lambda slot: -attention[row, slot].item())[:count]:
            removed[row, slot] = False
    return removed


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "paligemma", "idefics3"])
@pytest.mark.parametrize("layer", [1, 3])
def test_it_keeps_what_the_last_token_looks_at(name: str, layer: int):
    model = build_once(name)
    inputs = families.inputs(name, model, batch=2)
    removed = expected_removed(name, inputs, layer, [4, 4])
    reducer = foveate.FastV(keep=4, layer=layer)
    trace = assert_exact(model, inputs, {layer - 1: removed}, reducer)
    torch.testing.assert_close(trace.scores(layer - 1), attention_to(name, inputs, layer - 1), atol=1e-5, rtol=0)


def test_fractions_of_rows_of_different_length():
    model = build_once("qwen2_5_vl")
    inputs = families.inputs("qwen2_5_vl", model, batch=3)
    tokens = families.visual_slots(inputs["input_ids"]).sum(1).tolist()
    counts = [round(0.3 * n) for n in tokens]
    assert len(set(counts)) > 1
    removed = expected_removed("qwen2_5_vl", inputs, 2, counts)
    assert_exact(model, inputs, {1: removed}, foveate.FastV(keep=0.3))


def test_a_count_is_per_image():
    model = build_once("llava")
    inputs = families.inputs("llava", model, batch=2, images=[1, 2])
    removed = expected_removed("llava", inputs, 2, [5, 10])
    assert_exact(model, inputs, {1: removed}, foveate.FastV(keep=5))


def test_batch_equals_singles():
    model = build_once("llava")
    inputs = families.inputs("llava", model, batch=3)
    with foveate.apply(model, foveate.FastV(keep=5)), torch.no_grad():
        together = model(**inputs).logits[:, -1]
        for row in range(3):
            start = int(inputs["attention_mask"][row].argmax())
            single = model(
                input_ids=inputs["input_ids"][row : row + 1, start:],
                attention_mask=inputs["attention_mask"][row : row + 1, start:],
                pixel_values=inputs["pixel_values"][row : row + 1],
            ).logits[0, -1]
            torch.testing.assert_close(together[row], single, atol=2e-5, rtol=0)


def test_everything_kept_is_bitwise_the_model():
    model = build_once("llava")
    inputs = families.inputs("llava", model)
    expected = greedy(model, inputs, steps=3)
    with foveate.apply(model, foveate.FastV(keep=1.0)):
        actual = greedy(model, inputs, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def trace_of(reducer: foveate.Reducer, **options: object) -> foveate.Trace:
    model = build_once("llava")
    with foveate.apply(model, reducer) as session, torch.no_grad():
        model(**families.inputs("llava", model, **options))
    return session.trace


def test_the_mean_over_all_layers():
    # 16 visual tokens, 6 layers, 1 of them with all: (16 + 5 * 4) / 6 = 6.
    trace = trace_of(foveate.FastV(keep=6, layer=1, average="all_layers"))
    assert trace.visual_tokens.tolist() == [[16, 4, 4, 4, 4, 4]] * 2
    assert trace.mean_visual_tokens.tolist() == [6.0, 6.0]
    trace = trace_of(foveate.FastV(keep=0.375, layer=1, average="all_layers"))
    assert trace.mean_visual_tokens.tolist() == [6.0, 6.0]
    # Out of reach: one token stays.
    assert trace_of(foveate.FastV(keep=2, layer=3, average="all_layers")).visual_tokens[0].tolist() == [
        16,
        16,
        16,
        1,
        1,
        1,
    ]
    assert trace_of(foveate.FastV(keep=50, average="all_layers")).visual_tokens.unique().tolist() == [16]
    with pytest.raises(foveate.OptionError, match=r"keep=0.3 as a mean over 6 layers"):
        trace_of(foveate.FastV(keep=0.3, layer=2, average="all_layers"))


def test_the_official_file_truncates():
    assert trace_of(foveate.FastV(keep=0.36)).visual_tokens[0, -1] == 6  # 5.76
    assert trace_of(foveate.FastV(keep=0.36, faithful=True)).visual_tokens[0, -1] == 5
    assert trace_of(foveate.FastV(keep=7, faithful=True)).visual_tokens[0, -1] == 7


def test_a_row_without_image_is_left_alone():
    model = build_once("llava")
    inputs = families.inputs("llava", model, batch=2, images=[0, 1])
    removed = expected_removed("llava", inputs, 2, [0, 3])
    assert_exact(model, inputs, {1: removed}, foveate.FastV(keep=3))


def test_a_fraction_of_the_depth_and_reuse():
    reducer = foveate.FastV(keep=4, layer=0.34)
    for _ in range(2):
        assert trace_of(reducer).visual_tokens[0].tolist() == [16, 16, 4, 4, 4, 4]
    assert reducer == foveate.FastV(keep=4, layer=0.34)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"layer": 0}, "layer=0"),
        ({"layer": True}, "layer=True"),
        ({"layer": 0.0}, "layer=0.0"),
        ({"average": "mean"}, "average='mean'"),
        ({"average": "all_layers", "faithful": True}, "average='all_layers'"),
    ],
)
def test_bad_options(options: dict, culprit: str):
    with pytest.raises(foveate.OptionError, match=culprit):
        foveate.FastV(keep=4, **options)


@pytest.mark.parametrize("keep", [0, 1.01, "abc", None, float("inf")])
def test_bad_budgets(keep: object):
    with pytest.raises(foveate.BudgetError, match="keep"):
        foveate.build("fastv", keep=keep)


@pytest.mark.parametrize("layer", [6, 40])
def test_a_layer_beyond_the_depth_is_refused_with_the_depth(layer: int):
    with pytest.raises(foveate.OptionError, match=f"layer={layer}.*{families.N_LAYERS} decoder layers"):
        foveate.apply(build_once("llava"), foveate.FastV(keep=4, layer=layer))
