"""The formulas against torch's own counter on real modules, and against the figures of the papers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.engine.compat import returned_cache
from foveate.measure import (
    PAPER_FORMULA,
    PRESETS,
    Geometry,
    exact_flops,
    kv_bytes,
    paper_macs,
    report,
    schedule,
)
from foveate.reduction import BudgetError, Decision, OptionError, Reducer, UnsupportedError
from tests import families

SIZES = {"num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50, "max_position_embeddings": 256}
DECODERS = {
    "llama": hf.LlamaConfig(hidden_size=64, intermediate_size=160, **SIZES),
    "llama, medium": hf.LlamaConfig(hidden_size=256, intermediate_size=704, **SIZES),
    "qwen2, GQA": hf.Qwen2Config(hidden_size=64, intermediate_size=96, num_key_value_heads=1, **SIZES),
    "gemma, wide heads": hf.GemmaConfig(
        hidden_size=64, intermediate_size=96, num_key_value_heads=2, head_dim=40, **SIZES
    ),
    "gemma 3, sliding": hf.Gemma3TextConfig(
        hidden_size=64, intermediate_size=96, num_key_value_heads=2, head_dim=40, sliding_window=8, **SIZES
    ),
    "qwen3": hf.Qwen3Config(hidden_size=64, intermediate_size=96, num_key_value_heads=2, head_dim=24, **SIZES),
    "starcoder2, plain MLP": hf.Starcoder2Config(
        hidden_size=64, intermediate_size=96, num_key_value_heads=2, sliding_window=None, **SIZES
    ),
}  # fmt: skip


def counted(model, **inputs) -> tuple[int, object]:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        output = model(**inputs)
    return counter.get_total_flops(), output


def decoder(config):
    config = type(config).from_dict(config.to_dict())
    config._attn_implementation = "eager"  # torch does not count SDPA on the CPU
    return hf.AutoModelForCausalLM.from_config(config).eval()


class CutAt(Reducer):
    """Keep the first `keep` visual tokens from a stage on."""

    def __init__(self, stage, keep):
        self.stages, self.keep = (stage,), keep

    def decide(self, view):
        return Decision(keep=view.active & ~(view.visual & (view.visual.cumsum(1) > self.keep)))


# ---------------------------------------------------------------------------------------------------- exact FLOPs
@pytest.mark.parametrize("logits", [1, 30])
@pytest.mark.parametrize("name", DECODERS)
def test_exact_flops_of_a_whole_prompt(name, logits):
    geometry = Geometry.from_config(DECODERS[name], visual_tokens=20, text_tokens=10)
    found, _ = counted(
        decoder(DECODERS[name]), inputs_embeds=torch.randn(1, 30, geometry.hidden_size), logits_to_keep=logits
    )
    assert exact_flops(geometry, logits=logits) == found


@pytest.mark.parametrize("stage", [-1, 1])
@pytest.mark.parametrize("name", DECODERS)
def test_exact_flops_of_a_reduced_prompt(name, stage):
    geometry = Geometry.from_config(DECODERS[name], visual_tokens=20, text_tokens=10)
    model = decoder(DECODERS[name])
    visual = torch.zeros(1, 30, dtype=torch.bool)
    visual[:, 4:24] = True
    with foveate.apply(model, foveate.Random(keep=5, layer=stage), visual=visual) as session:
        found, _ = counted(model, inputs_embeds=torch.randn(1, 30, geometry.hidden_size), logits_to_keep=1)
    entering = [20, 20, 5] if stage == 1 else [5, 5, 5]
    assert session.trace.visual_tokens.tolist() == [entering]
    assert exact_flops(geometry, session.trace) == exact_flops(geometry, entering) == found


def test_exact_flops_of_a_vision_language_model():
    """The decoder's share of a whole VLM: what the counter finds below the language model."""
    model = families.build("llava", impl="eager")
    inputs = families.inputs("llava", model, batch=1)
    geometry = Geometry.from_config(model.config, text_tokens=int((inputs["input_ids"] != families.IMAGE_TOKEN).sum()))
    for reducer in (None, foveate.Random(keep=6, layer=1)):
        counter = FlopCounterMode(display=False)
        session = foveate.apply(model, reducer) if reducer else None
        with torch.no_grad(), counter:
            model(**inputs, logits_to_keep=1)
        found = sum(counter.get_flop_counts()["LlavaForConditionalGeneration.model.language_model"].values())
        assert exact_flops(geometry, session.trace if session else None, logits=0) == found
        if session:
            session.remove()


def test_ragged_rows_are_added_up():
    geometry = Geometry.from_config(DECODERS["llama"], visual_tokens=20, text_tokens=10)
    model = decoder(DECODERS["llama"])
    visual = torch.zeros(2, 30, dtype=torch.bool)
    visual[0, 4:24] = True
    visual[1, 4:12] = True
    with foveate.apply(model, CutAt(0, 6), visual=visual) as session, torch.no_grad():
        model(inputs_embeds=torch.randn(2, 30, 64))
    rows = [geometry.with_prompt(20, 10), geometry.with_prompt(8, 22)]
    plans = [[20, 6, 6], [8, 6, 6]]
    for cost in (paper_macs, exact_flops, kv_bytes):
        assert cost(geometry, session.trace) == sum(cost(g, p) for g, p in zip(rows, plans))


# ---------------------------------------------------------------------------------------------- the papers' formula
def test_llava_costs_what_the_paper_says():
    assert paper_macs(Geometry.preset("llava-1.5-7b")) / 1e12 == pytest.approx(4.62, abs=0.005)


@pytest.mark.parametrize(
    ("slots", "tokens", "cut", "tflops"),
    [((309, 204, 113), 192, 0.537, 2.14), ((312, 117, 39), 128, 0.628, 1.72), ((82, 32, 18), 64, 0.719, 1.30)],
)
def test_sparsevlm_schedules_cost_what_the_paper_says(slots, tokens, cut, tflops):
    """Official v1.5 schedules (layers 2, 6, 15): the paper's FLOPs are those at the layers' inputs."""
    a, b, c = slots
    geometry = Geometry.preset("llava-1.5-7b")
    cost = paper_macs(geometry, [576] * 3 + [a] * 4 + [b] * 9 + [c] * 16)
    assert cost / 1e12 == pytest.approx(tflops, abs=0.02)
    assert 1 - cost / paper_macs(geometry) == pytest.approx(cut, abs=0.005)
    after = [576] * 2 + [a] * 4 + [b] * 9 + [c] * 17
    assert sum(after) / 32 == pytest.approx(tokens, abs=1)
    assert 1 - paper_macs(geometry, after) / paper_macs(geometry) > cut + 0.015


@pytest.mark.parametrize(("layer", "cut"), [(13, 0.519), (15, 0.464), (16, 0.437), (20, 0.328)])
def test_withdrawal_as_derived_from_the_formula(layer, cut):
    geometry = Geometry.of("llava-1.5-7b", text_tokens=85)
    found = 1 - paper_macs(geometry, [576] * layer + [0] * (32 - layer)) / paper_macs(geometry)
    assert found == pytest.approx(cut, abs=0.002)


def test_multiply_adds_are_half_of_exact_flops_without_grouped_queries():
    geometry = Geometry.preset("llava-1.5-7b")
    assert exact_flops(geometry, logits=0) == 2 * paper_macs(geometry)
    assert exact_flops(geometry, logits=0) == 1e12 * report(geometry, "random", 0.5)["tflops_full"]  # one unit
    grouped = Geometry.preset("qwen2.5-vl-7b")
    assert exact_flops(grouped, logits=0) < 2 * paper_macs(grouped)


@pytest.mark.parametrize("cost", [paper_macs, exact_flops, kv_bytes])
def test_another_depth_is_refused(cost):
    with pytest.raises(ValueError, match="32 layers"):
        cost(Geometry.preset("llava-1.5-7b"), [576] * 31)


# ------------------------------------------------------------------------------------------------------- KV cache
@pytest.mark.parametrize("name", ["llama", "qwen2, GQA", "gemma, wide heads", "gemma 3, sliding"])
@pytest.mark.parametrize("reduced", [False, True])
def test_kv_bytes_are_those_of_the_cache(name, reduced):
    geometry = Geometry.from_config(DECODERS[name], visual_tokens=20, text_tokens=10)
    model = decoder(DECODERS[name])
    visual = torch.zeros(1, 30, dtype=torch.bool)
    visual[:, 4:24] = True
    session = foveate.apply(model, CutAt(0, 5), visual=visual) if reduced else None
    with torch.no_grad():
        cache = returned_cache(model(inputs_embeds=torch.randn(1, 30, geometry.hidden_size)))
    found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_bytes(geometry, session.trace if session else None, dtype_bytes=4) == found
    if session:
        session.remove()


def test_paper_s_cache_is_the_visual_part():
    visual_only = Geometry.of("llava-1.5-7b", text_tokens=0)
    assert kv_bytes(visual_only) / 1e6 == pytest.approx(302.4, rel=0.005)
    assert kv_bytes(visual_only, [192] * 32) / 1e6 == pytest.approx(100.8, rel=0.005)


# ------------------------------------------------------------------------------------------------------- schedules
def test_schedule_runs_the_method_itself():
    geometry = Geometry.preset("llava-1.5-7b")
    entering, after = schedule(geometry, CutAt(1, 100))
    assert entering.tolist() == [576] * 2 + [100] * 30
    assert after.tolist() == [576] + [100] * 31
    assert schedule(geometry, CutAt(1, 100)).mean_entering == pytest.approx((576 * 2 + 100 * 30) / 32)
    assert schedule(geometry, CutAt(-1, 100)).mean_after == 100


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_schedule_of_every_preset(name):
    geometry = PRESETS[name]
    entering, _ = schedule(geometry, foveate.build("fastv", keep=0.25))
    assert len(entering) == geometry.layers
    assert int(entering[0]) == geometry.visual_tokens
    assert int(entering[-1]) < geometry.visual_tokens / 2


def test_schedule_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    first = schedule(Geometry.preset("llava-1.5-7b"), CutAt(1, 100))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.entering, schedule(Geometry.preset("llava-1.5-7b"), CutAt(1, 100)).entering)


@pytest.mark.slow
@pytest.mark.parametrize("visual", [576, 660, 101])  # a square, a rectangle, a line
def test_methods_that_read_the_vision_tower(visual):
    geometry = Geometry.of("llava-1.5-7b", visual_tokens=visual)
    for method in ("visionzip", "fopru", "vispruner"):
        assert schedule(geometry, foveate.build(method, keep=50)).entering.tolist() == [50] * 32


def test_methods_that_work_in_the_vision_tower():
    geometry = Geometry.preset("llava-1.5-7b")
    assert schedule(geometry, foveate.build("tome", keep=0.25)).entering.tolist() == [144] * 32


@pytest.mark.parametrize(("method", "visual", "why"), [
    ("evs", 660, "acts on videos"),
    ("vidcom2", 576, "acts on videos"),
    ("tome", 660, "cannot be followed without a model: .*needs layers like those of CLIP"),
])  # fmt: skip
def test_what_cannot_be_followed_says_why(method, visual, why):
    with pytest.raises(UnsupportedError, match=f"{method} {why}"):
        schedule(Geometry.of("llava-1.5-7b", visual_tokens=visual), foveate.build(method, keep=0.5))


def test_a_prompt_without_text_or_image_is_refused():
    for prompt in ({"visual_tokens": 0}, {"text_tokens": 0}):
        with pytest.raises(ValueError, match="needs visual and text tokens"):
            schedule(Geometry.of("llava-1.5-7b", **prompt), CutAt(1, 10))


# ---------------------------------------------------------------------------------------------------------- report
def test_report_has_the_agreed_keys():
    found = report("llava-1.5-7b", "random", "192")
    assert list(found) == [
        "geometry", "method", "keep", "tmacs", "tmacs_full", "tflops", "tflops_full", "reduction",
        "visual_tokens_entering", "visual_tokens_after", "kv_mb", "kv_mb_full", "formula",
    ]  # fmt: skip
    assert (found["geometry"], found["method"], found["keep"]) == ("llava-1.5-7b", "random", 192)
    assert found["tmacs_full"] == pytest.approx(4.62, abs=0.005)  # SparseVLM's Table 1, "TFLOPs"
    assert found["tflops_full"] == 2 * found["tmacs_full"]
    assert found["tflops"] == 2 * found["tmacs"]
    assert found["reduction"] == pytest.approx(1 - found["tflops"] / found["tflops_full"])
    assert found["formula"] == PAPER_FORMULA
    assert found["kv_mb"] < found["kv_mb_full"]


def test_vtw_saves_more_than_forty_percent():
    found = report("llava-1.5-7b", "vtw", layer=16)
    assert found["reduction"] > 0.4
    assert (found["visual_tokens_entering"], found["visual_tokens_after"]) == (288, 270)


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize(("keep", "cut"), [(192, 0.537), (128, 0.628), (64, 0.719)])
def test_sparsevlm_saves_what_the_paper_says(keep, cut, faithful):
    if "sparsevlm" not in foveate.names():
        pytest.skip("SparseVLM is not registered")
    found = report("llava-1.5-7b", "sparsevlm", keep, faithful=faithful)
    assert found["reduction"] == pytest.approx(cut, abs=0.03)
    assert found["visual_tokens_after"] == pytest.approx(keep, rel=0.03)


def test_report_of_another_prompt():
    longer = report("llava-1.5-7b", "random", 0.5, text_tokens=1000)
    assert longer["tmacs_full"] > 9
    assert longer["visual_tokens_entering"] == 288
    assert report("llava-1.5-7b", "random", 0.5, visual_tokens=100)["visual_tokens_entering"] == 50


def test_report_of_a_method_that_is_built():
    found = report(Geometry.preset("llava-1.5-7b"), CutAt(-1, 64))
    assert (found["method"], found["keep"], found["visual_tokens_entering"]) == ("CutAt", 64, 64)
    with pytest.raises(ValueError, match="built already"):
        report("llava-1.5-7b", CutAt(-1, 64), keep=3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("llava-9", "random", 3), ValueError, "llava-9"),
        (("llava-1.5-7b", "random", "abc"), BudgetError, "abc"),
        (("llava-1.5-7b", "random", 0), BudgetError, "keep=0"),
        (("llava-1.5-7b", "nothing", 3), OptionError, "unknown method 'nothing'"),
    ],
)
def test_report_names_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        report(*arguments)


def test_trace_of_another_model_is_refused():
    trace = foveate.Trace(3, torch.ones(1, 4).bool(), torch.ones(1, 4).bool())
    with pytest.raises(ValueError, match="the trace 3"):
        paper_macs(Geometry.preset("llava-1.5-7b"), trace)
    assert dataclasses.is_dataclass(trace)
