"""PyramidDrop: the row it ranks by, and its schedule."""

import pytest
import torch
import transformers as hf

import foveate
from foveate.engine.decoder.ahead import next_layer_row
from foveate.engine.families.parts import resolve
from foveate.reducers.pyramiddrop import PyramidDrop
from tests import families
from tests.reference.checks import assert_exact


@pytest.mark.parametrize("name", ["llava", "internvl", "gemma3", "gemma3_window", "paligemma", "mistral3"])
@torch.no_grad()
def test_the_row_is_the_one_the_next_layer_computes(name):
    model = families.build(name, impl="eager")
    _assert_rows_of_next_layers(model, families.inputs(name, model, batch=1))


@torch.no_grad()
def test_the_row_in_layers_with_a_scaling_of_their_own_a_softcap_and_windows():
    config = hf.Gemma2Config(
        **families.DECODER, head_dim=16, sliding_window=12, query_pre_attn_scalar=1, attn_logit_softcapping=0.7
    )
    model = families.spread_weights(hf.Gemma2ForCausalLM(config))
    model.set_attn_implementation("eager")
    ids = torch.randint(5, 140, (1, 30), generator=torch.Generator().manual_seed(0))
    _assert_rows_of_next_layers(model, {"input_ids": ids})


def _assert_rows_of_next_layers(model, inputs):
    output = model(**inputs, output_attentions=True, output_hidden_states=True)
    anatomy = resolve(model, text_only="pixel_values" not in inputs)
    slots = torch.arange(inputs["input_ids"].shape[1])[None]
    for layer in range(1, families.N_LAYERS):
        hidden = output.hidden_states[layer]
        row = next_layer_row(anatomy, layer, hidden, slots, slots, torch.ones_like(slots, dtype=torch.bool))
        assert torch.allclose(row[:, :, 0], output.attentions[layer][:, :, -1], atol=1e-5)


@pytest.mark.parametrize("keep", [3, 5, 10, 0.3, 0.469, 0.9, 1.0])
@torch.no_grad()
def test_keep_is_the_mean_over_the_layers(keep):
    model = families.build("llava")
    inputs = families.inputs("llava", model)
    with foveate.apply(model, PyramidDrop(keep)) as session:
        model(**inputs)
    entered = session.trace.visual_tokens
    wanted = keep if isinstance(keep, int) else keep * 16
    assert bool(((entered.double().mean(1) - max(wanted, 21 / 6)).abs() <= 0.5).all())
    assert bool((entered.diff(dim=1) <= 0).all())


def test_the_papers_setting_averages_to_270():
    reducer = PyramidDrop(270)
    reducer.prepare(_Anatomy(32))
    assert reducer._lists[0] == [8, 16, 24]
    visual = torch.arange(700)[None] < 576
    view = foveate.View(7, torch.zeros(1, 700, 4), torch.ones_like(visual), visual, torch.ones_like(visual))
    layers, counts, _ = reducer._plan(view)
    assert layers.tolist() == [[8, 16, 24]]
    assert counts.tolist() == [[288, 144, 72]]


class _Anatomy:
    mrope, sliding_windows = True, ()

    def __init__(self, depth: int):
        self.depth, self.decoder = depth, None


@torch.no_grad()
def test_engine_and_method_agree_with_the_masked_reference():
    model = families.build("qwen2_vl")  # positions "keep", ranked by the substitute row
    inputs = families.inputs("qwen2_vl", model)
    reducer = PyramidDrop(7)
    with foveate.apply(model, reducer) as session:
        model(**inputs)
    trace, removed, before = session.trace, {}, inputs["attention_mask"].bool()
    for stage in trace.stages:
        removed[stage] = before & ~trace.active(stage)
        before = before & trace.active(stage)
    assert_exact(model, inputs, {s: r for s, r in removed.items() if r.any()}, reducer)


def test_layers_beyond_the_depth():
    model = families.build("llava")
    with pytest.raises(foveate.OptionError, match="decoder layers"):
        foveate.apply(model, PyramidDrop(layers=[8, 16, 24], ratios=[0.5, 0.25, 0.125]))
