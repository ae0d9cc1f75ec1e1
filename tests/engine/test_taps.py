"""A tap reads the very attention rows that eager attention would have returned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.families import FAMILIES, inputs, visual_slots
from tests.reference.checks import build_once, footprint, largest
from tests.reference.masked import MaskedReference
from tests.reference.plans import Watch, all_removed, draw_removed
from torch import Tensor

import foveate
from foveate.engine.decoder.taps import counted_from_first
from foveate.reduction import Tap, TapSpec, View, VisionSpec

COUNTS = {1: [7, 9], 3: [4, 2]}
"""The tap in layer 1 reads before, the one in layer 3 after a ragged removal."""
TOLERANCE = 1e-5


def _every_third(length: int) -> Tensor:
    return (torch.arange(length) % 3 == 2).expand(2, -1)


def _chosen(state: dict[str, Any]) -> Tensor:
    return state["rows"]


QUERIES = ["last", "text", "text_after", "tensor", "function"]


def _expected_rows(queries: str, active: Tensor, visual: Tensor) -> Tensor:
    """(B, S) bool, slot by slot."""
    rows = torch.zeros_like(active)
    for b in range(len(active)):
        last_visual = max(visual[b].nonzero()[:, 0].tolist())
        slots = active[b].nonzero()[:, 0].tolist()
        for slot in slots:
            rows[b, slot] = {
                "last": slot == slots[-1],
                "text": not visual[b, slot],
                "text_after": not visual[b, slot] and slot > last_visual,
                "tensor": slot % 3 == 2,
                "function": slot % 3 == 2,
            }[queries]
    return rows


class _Reads(Watch):
    """Also leaves rows for a later stage in `View.state`."""

    def decide(self, view: View):
        view.state.setdefault("rows", _every_third(view.visual.shape[1]))
        return super().decide(view)


def _assert_rows(tap: Tap, attention: Tensor, rows: Tensor) -> None:
    """`tap` holds the rows of `attention` (B, H, S, S) or (B, S, S) that `rows` (B, S) marks, and no others."""
    length = attention.shape[-1]
    weights = tap.to_slots(tap.weights, length)
    assert tap.weights.dtype == torch.float32
    for b in range(len(rows)):
        valid = tap.row_valid[b].nonzero()[:, 0]
        assert sorted(tap.query_slots[b, valid].tolist()) == rows[b].nonzero()[:, 0].tolist()
        for r in valid.tolist():
            expected = attention[b, ..., tap.query_slots[b, r], :]
            assert largest(weights[b, ..., r, :] - expected) <= TOLERANCE
            assert largest(weights[b, ..., r, :].sum(-1) - 1) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("impl", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in FAMILIES])
def test_rows_are_those_of_eager_attention(name: str, impl: str):
    model, eager = build_once(name, impl), build_once(name, "eager")
    before = footprint(model)
    prompt = inputs(name, model)
    removed = draw_removed(prompt["input_ids"], COUNTS)
    visual, tokens = visual_slots(prompt["input_ids"]), prompt["attention_mask"].bool()
    with MaskedReference(eager, removed):
        attentions = eager(**prompt, output_attentions=True).attentions
    for queries in QUERIES:
        for heads in ("mean", "none"):
            asked = {"tensor": _every_third(visual.shape[1])}.get(queries, queries)
            # A function chooses by what an earlier stage left; at the first stage that is stage -1.
            spec = TapSpec(_chosen if queries == "function" else asked, heads)
            reducer = _Reads({-1: torch.zeros_like(visual), **removed}, {1: spec, 3: spec})
            with foveate.apply(model, reducer):
                model(**prompt)
            for view in reducer.views[1:]:
                attention = attentions[view.stage]
                active = tokens & ~all_removed(removed, view.stage - 1)
                assert torch.equal(view.active, active)
                rows = _expected_rows(queries, active, visual)
                _assert_rows(view.tap, attention.mean(1) if heads == "mean" else attention, rows)
    assert footprint(model) == before


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_queries_and_keys_reproduce_the_weights(name: str):
    """`keep_qk` hands over what the rows were computed from, after RoPE."""
    model = build_once(name)
    prompt = inputs(name, model, batch=1)
    removed = draw_removed(prompt["input_ids"], {1: [7], 3: [4]})
    reducer = Watch(removed, {3: TapSpec("last", "none", keep_qk=True)})
    with foveate.apply(model, reducer):
        model(**prompt)
    tap = reducer.views[-1].tap
    heads, groups = tap.query.shape[1], tap.key.shape[1]
    key = tap.key.repeat_interleave(heads // groups, 1)
    scaling = model.get_decoder().layers[3].self_attn.scaling
    assert largest((tap.query @ key.transpose(-1, -2) * scaling).softmax(-1) - tap.weights) <= TOLERANCE


def test_rotations_of_another_form_are_left_alone():
    """No table of cos and sin, as in Llama 4, or no function that rotates: there is nothing to turn back with."""
    module, numbers = build_once("llava").get_decoder().layers[0].self_attn, torch.ones(1, 4, 16)
    for attention, rope in (
        (module, None),
        (module, numbers),
        (module, (numbers[0], numbers[0])),
        (numbers, (numbers,) * 2),
    ):
        tap = Tap(torch.ones(1, 1, 4), torch.ones(1, 1), None, None, torch.ones(1, 4, 1, 16), torch.ones(1, 2, 4, 16))
        counted_from_first(attention, tap, rope, torch.tensor([1]))
        assert bool((tap.query == 1).all())
        assert bool((tap.key == 1).all())


@torch.no_grad()
def test_the_mean_by_slot():
    """`per_slot` is the mean over valid rows only, at the slots of the keys."""
    model, eager = build_once("llava"), build_once("llava", "eager")
    prompt = inputs("llava", model)
    removed = draw_removed(prompt["input_ids"], COUNTS)
    reducer = Watch(removed, {1: TapSpec("text_after")})
    with foveate.apply(model, reducer):
        model(**prompt)
    attention = eager(**prompt, output_attentions=True).attentions[1].mean(1)
    visual, tokens = visual_slots(prompt["input_ids"]), prompt["attention_mask"].bool()
    rows = _expected_rows("text_after", tokens, visual)
    expected = torch.stack([attention[b, rows[b]].mean(0) for b in range(2)])
    assert largest(reducer.views[0].tap.per_slot(visual.shape[1]) - expected) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("kind", ["cls", "received"])
def test_vision_taps_read_the_tower(kind: str):
    """The CLS row and the attention received, patch by patch, as CLIP's own eager attention gives them."""
    model, eager = build_once("llava"), build_once("llava", "eager")
    prompt = inputs("llava", model)
    visual = visual_slots(prompt["input_ids"])
    attention = eager.model.vision_tower(prompt["pixel_values"], output_attentions=True).attentions[-2]
    expected = (attention[:, :, 0] if kind == "cls" else attention.mean(2))[..., 1:]  # token 0 is CLS, no patch
    reducer = Watch({-1: torch.zeros_like(visual)})
    reducer.vision_taps = {-2: VisionSpec(kind, features=True)}
    for run in (lambda: model(**prompt), lambda: model.generate(**prompt, max_new_tokens=2, pad_token_id=0)):
        reducer.views.clear()
        with foveate.apply(model, reducer):
            run()
        read = reducer.views[0].vision[-2]
        assert read.rows.tolist() == [0, 1]
        assert torch.equal(read.slots, torch.stack([row.nonzero()[:, 0] for row in visual]))
        assert largest(read.attention - expected) <= TOLERANCE
        features = model.model.vision_tower(prompt["pixel_values"], output_hidden_states=True).hidden_states[-2]
        assert largest(read.features - features[:, 1:]) <= TOLERANCE
