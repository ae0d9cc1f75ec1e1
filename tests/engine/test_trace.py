"""The trace remembers what was kept where, and what the cache really holds."""

from __future__ import annotations

import pytest
import torch
from tests.families import N_LAYERS, inputs, visual_slots
from tests.reference.checks import build_once
from tests.reference.plans import Fixed, KeepAll, draw_removed

import foveate
from foveate.engine.compat import returned_cache
from foveate.engine.trace import StageRecord, Trace
from foveate.reduction import Decision, Reducer, View

COUNTS = {0: [9, 11], 2: [6, 3], 4: [0, 0]}


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "mistral3"])
def test_lengths_are_those_of_the_cache(name: str):
    model = build_once(name)
    prompt = inputs(name, model)
    with foveate.apply(model, Fixed(draw_removed(prompt["input_ids"], COUNTS))) as session:
        cache = returned_cache(model(**prompt, use_cache=True))
    assert session.trace.kv_lengths == [layer.keys.shape[-2] for layer in cache.layers]
    if name != "mistral3":  # its window cuts every layer to the same length
        assert session.trace.kv_lengths == sorted(session.trace.kv_lengths, reverse=True)
        assert session.trace.kv_lengths[-1] < session.trace.kv_lengths[0]


@torch.no_grad()
def test_counts_and_averages():
    model = build_once("llava")
    prompt = inputs("llava", model)
    with foveate.apply(model, Fixed(draw_removed(prompt["input_ids"], COUNTS))) as session:
        model.generate(**prompt, max_new_tokens=5, pad_token_id=0)
    trace = session.trace
    assert trace.visual_tokens.tolist() == [[16, 9, 9, 6, 6, 0], [16, 11, 11, 3, 3, 0]]
    assert trace.visual_tokens.dtype == torch.long
    assert trace.visual_tokens.shape == (2, N_LAYERS)
    assert trace.mean_visual_tokens.tolist() == pytest.approx([46 / 6, 44 / 6])
    assert trace.mean_visual_tokens_after.tolist() == pytest.approx([30 / 6, 28 / 6])


@torch.no_grad()
def test_it_is_of_the_last_prefill_and_survives_the_session():
    model = build_once("llava")
    long, short = inputs("llava", model), inputs("llava", model, batch=1)
    with foveate.apply(model, KeepAll()) as session:
        assert session.trace is None
        model(**long)
        assert session.trace.visual_tokens.shape == (2, N_LAYERS)
        model(**short)
    assert session.trace.visual_tokens.tolist() == [[16] * N_LAYERS]
    assert session.trace.kv_lengths == [short["input_ids"].shape[1]] * N_LAYERS


class _Merges(Reducer):
    """Pairs up the visual tokens of each row; the first of a pair carries both."""

    stages = (1,)

    def decide(self, view: View) -> Decision:
        slots = torch.arange(view.visual.shape[1]).expand(view.visual.shape)
        first_of_pair = torch.stack([_pairs(row) for row in view.visual])
        carriers = view.visual & (first_of_pair == slots)
        chosen = torch.stack([row.nonzero()[:, 0] for row in carriers])
        partner = chosen + 1
        rows = torch.arange(len(chosen))[:, None]
        values = (view.hidden[rows, chosen] + view.hidden[rows, partner]) / 2
        scores = torch.linspace(0, 1, view.visual.shape[1]).expand(view.visual.shape)
        return Decision(~view.visual | carriers, chosen, values, torch.where(view.visual, first_of_pair, slots), scores)


def _pairs(visual: torch.Tensor) -> torch.Tensor:
    slots = torch.arange(len(visual))
    start = int(visual.int().argmax())
    return torch.where(visual, start + (slots - start) // 2 * 2, slots)


def test_a_prompt_may_begin_with_its_image():
    visual, active = torch.tensor([[True, True, True, False]]), torch.tensor([[True, False, True, True]])
    trace = Trace(2, visual, torch.ones_like(visual))
    for origin in (None, torch.tensor([[0, 0, 2, 3]])):
        trace.records = [StageRecord(0, active, origin, None)]
        assert trace.kept(0).tolist() == [[True, False, True, False]]
        assert trace.origins(0).tolist() == [[0, -1 if origin is None else 0, 2, 3]]


@torch.no_grad()
def test_merged_tokens_have_origins():
    model = build_once("llava")
    prompt = inputs("llava", model)
    visual = visual_slots(prompt["input_ids"])
    with foveate.apply(model, _Merges()) as session:
        model(**prompt)
    trace = session.trace
    assert trace.visual_tokens.tolist() == [[16, 16, 8, 8, 8, 8]] * 2
    assert trace.kept(1).sum(1).tolist() == [8, 8], "one mark per merged token"
    assert torch.equal(trace.kept(0), visual)
    for row, origins in enumerate(trace.origins(1)):
        assert origins[visual[row]].tolist() == _pairs(visual[row])[visual[row]].tolist()
    assert trace.scores(1).shape == visual.shape
    assert trace.scores(0) is None
