"""DivPrune, CDPruner, AveragePool, ToMe and PiToMe on whole models: budgets, batches, several images, odd input."""

import functools
from typing import Any

import pytest
import torch

import foveate
from foveate.reducers.cdpruner import CDPruner
from foveate.reducers.dart import DART
from foveate.reducers.divprune import DivPrune
from foveate.reducers.pitome import PiToMe
from foveate.reducers.pooling import AveragePool, Downsample, pooled_grid
from foveate.reducers.pyramiddrop import PyramidDrop
from foveate.reducers.tome import ToMe
from foveate.reduction import View
from tests import families
from tests.reference.checks import build_once

EXACT = {
    "divprune": DivPrune,
    "cdpruner": CDPruner,
    "tome": functools.partial(ToMe, where="output"),
    "pitome": functools.partial(PiToMe, where="output"),
    "dart": DART,
}
ALL = {**EXACT, "averagepool": AveragePool, "pyramiddrop": PyramidDrop}


@functools.cache
def model(name: str):
    return families.build(name)


@torch.no_grad()
def reduced(name: str, reducer, inputs):
    with foveate.apply(model(name), reducer) as session:
        logits = model(name)(**inputs).logits
    return logits, session.trace


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl"])
@pytest.mark.parametrize("keep", [5, 0.4])
def test_budget_is_met_per_image(name, method, keep):
    inputs = families.inputs(name, model(name), images=[2, 1])
    _, trace = reduced(name, EXACT[method](keep), inputs)
    visual = families.visual_slots(inputs["input_ids"])
    if isinstance(keep, int):
        expected = [10, 5]
    elif method == "dart":  # one set per sample
        expected = [round(keep * n) for n in visual.sum(1).tolist()]
    else:
        expected = [sum(round(keep * len(i.slots)) for i in images) for images in trace.layout.images]
    assert trace.visual_tokens[:, -1].tolist() == expected
    assert trace.kept(families.N_LAYERS - 1).sum(1).tolist() == expected


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_batch_is_its_samples(name, method):
    inputs = families.inputs(name, model(name), batch=3)
    if name == "llava":  # as `generate` does; DART's norms of keys after RoPE depend on the position itself
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    together, trace = reduced(name, ALL[method](6), inputs)
    start = 0
    for row in range(3):
        length = int(inputs["attention_mask"][row].sum())
        single = {
            k: v[row : row + 1, -length:] for k, v in inputs.items() if k not in ("pixel_values", "image_grid_thw")
        }
        if "image_grid_thw" in inputs:
            single["image_grid_thw"] = inputs["image_grid_thw"][row : row + 1]
            number = int(single["image_grid_thw"].prod())
            single["pixel_values"] = inputs["pixel_values"][start : start + number]
            start += number
        else:
            single["pixel_values"] = inputs["pixel_values"][row : row + 1]
        alone, own = reduced(name, ALL[method](6), single)
        assert torch.equal(own.kept(5)[0], trace.kept(5)[row, -length:])
        assert (alone[0, -1] - together[row, -1]).abs().max() < 2e-4


@pytest.mark.parametrize("method", [*EXACT, "averagepool"])
def test_everything_kept_changes_nothing(method):
    inputs = families.inputs("llava", model("llava"))
    full = model("llava")(**inputs).logits
    assert (reduced("llava", ALL[method](1.0), inputs)[0] - full).abs().max() < 1e-4


@pytest.mark.parametrize("method", [*ALL, "downsample"])
@pytest.mark.parametrize("keep", [0, -3, 1.5, "abc", True])
def test_bad_budgets(method, keep):
    with pytest.raises(foveate.BudgetError):
        {**ALL, "downsample": Downsample}[method](keep)


def test_bad_options():
    for make in (
        lambda: CDPruner(5, similarity="clipp"),
        lambda: DART(5, layer=0),
        lambda: DART(5, pivot_image=0),
        lambda: PyramidDrop(5, ratios=[0.5]),
        lambda: PyramidDrop(layers=[1], ratios=[0.5, 0.2]),
        lambda: PyramidDrop(ratios=[0.2, 0.5, 0.6]),
        lambda: ToMe(),
        lambda: ToMe(5, r=3),
        lambda: ToMe(5, where="llm"),
        lambda: PiToMe(5, preset="vit"),
        lambda: PiToMe(ratio=0.3),
    ):
        with pytest.raises(foveate.OptionError) as error:
            make()
        assert "\n" not in str(error.value)


def _view(features: torch.Tensor, text: int = 3) -> View:
    tokens = len(features)
    visual = torch.arange(tokens + text)[None] < tokens
    hidden = torch.cat([features, torch.ones(text, features.shape[1])])[None]
    everything = torch.ones_like(visual)
    return View(-1, hidden, everything, visual, everything)


def test_duplicates_and_low_rank_still_meet_the_budget():
    features = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).repeat(4, 1)
    for reducer in (DivPrune(16), CDPruner(16), CDPruner(16, similarity=lambda view: torch.zeros(view.active.shape))):
        decision = reducer.decide(_view(features))
        assert int(decision.keep[0, :32].sum()) == 16
        assert bool(decision.keep[0, 32:].all())


def test_half_precision_decides_like_float32():
    features = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    for reducer in (DivPrune(20), CDPruner(20)):
        view = _view(features.float())
        high = reducer.decide(view).keep
        view.hidden = view.hidden.bfloat16()
        low = reducer.decide(view).keep
        assert torch.equal(low, high)


def test_dart_without_text_behind_the_image():
    reducer = DART(4)
    inputs = families.inputs("llava", model("llava"), after=1, batch=1)
    assert reduced("llava", reducer, inputs)[1].visual_tokens[0, -1] == 4


@pytest.mark.parametrize(
    ("size", "most", "grid"),
    [
        ((24, 24), 192, (12, 16)),
        ((24, 24), 128, (11, 11)),
        ((24, 24), 64, (8, 8)),
        ((3, 5), 5, (2, 2)),
        ((1, 9), 4, (1, 4)),
    ],
)
def test_pooled_grid(size, most, grid):
    assert sorted(pooled_grid(*size, most)) == sorted(grid)


def test_average_pool_averages_cells():
    name = "llava"
    inputs = families.inputs(name, model(name), batch=1)
    seen = []

    class Spy(AveragePool):
        def decide(self, view):
            decision = super().decide(view)
            seen.append((view, decision))
            return decision

    _, trace = reduced(name, Spy(4), inputs)
    view, decision = seen[0]
    grid = view.hidden[view.visual].view(2, 2, 2, 2, -1)
    assert torch.allclose(decision.values[0], grid.mean((1, 3)).reshape(4, -1), atol=1e-6)
    assert trace.kept(-1)[view.visual].view(4, 4).nonzero().tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]


@pytest.mark.parametrize(
    "method",
    [
        "averagepool",
        "divprune",
        "downsample",
        "fopru",
        "pitome",
        "prumerge",
        "pyramiddrop",
        "tome",
        "visionzip",
        "vispruner",
    ],
)
def test_positions_are_renumbered_where_the_model_allows_it(method: str):
    for name, positions in (("llava", "renumber"), ("gemma3_window", "keep")):
        with foveate.apply(build_once(name), foveate.build(method, keep=0.5)) as session:
            assert session.reducer.positions == positions, name


@torch.no_grad()
@pytest.mark.parametrize("method", [foveate.ToMe, foveate.PiToMe])
def test_after_any_number_of_rounds_a_merged_token_is_the_mean_of_its_members(method: Any):
    model = build_once("llava")
    prompt = families.inputs("llava", model)
    visual, before = (
        families.visual_slots(prompt["input_ids"]),
        model(**prompt, output_hidden_states=True).hidden_states[0],
    )
    with foveate.apply(model, method(keep=3, where="output")) as session:
        after = model(**prompt, output_hidden_states=True).hidden_states[0]
    origins, kept = session.trace.origins(-1), session.trace.kept(-1)
    assert kept.sum(1).tolist() == [3, 3]
    for row, slot in kept.nonzero().tolist():
        members = visual[row] & (origins[row] == slot)
        torch.testing.assert_close(after[row, slot], before[row, members].mean(0))


@torch.no_grad()
def test_alpha_weighs_what_is_unlike_in_pitomes_energy():
    """At 0 only near neighbours count, at 100 a token stands for itself: other tokens are protected."""
    model = build_once("llava")
    prompt, kept = families.inputs("llava", model), []
    for alpha in (0.0, 1.0, 100.0):
        with foveate.apply(model, foveate.PiToMe(keep=10, where="output", alpha=alpha)) as session:
            model(**prompt)
        kept.append(session.trace.kept(-1))
    assert not torch.equal(kept[0], kept[2])


@pytest.mark.parametrize("method", [foveate.ToMe, foveate.PiToMe])
def test_a_count_of_several_tiles_cannot_be_kept_in_the_tower(method: Any):
    with pytest.raises(foveate.OptionError, match="several tiles"):
        foveate.apply(build_once("llava_next"), method(keep=4, where="tower"))
    decoder = build_once("llava").get_decoder()
    with pytest.raises(foveate.UnsupportedError, match="no vision tower"):
        foveate.apply(decoder, method(keep=4, where="tower"), visual=torch.ones(1, 4, dtype=torch.bool))
