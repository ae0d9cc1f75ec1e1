"""Timing by phase, peak memory against the system's own numbers, the limit, random models of real geometry."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import time

import pytest
import torch

import foveate
from foveate.measure import PRESETS, Geometry, memory, prefill_flops, random_models
from foveate.measure.bench import FULL, LIMIT, Spread, bench, counted_flops
from foveate.measure.latency import timed
from foveate.measure.memory import free_bytes, peak_memory
from foveate.measure.prompt import with_text_tokens
from foveate.measure.random_models import _families, random_model
from foveate.reduction import TapSpec
from tests.families import build, inputs
from tests.reference.checks import footprint

pytestmark = pytest.mark.slow  # whole measurements

MB = 1 << 20


class Slow(foveate.Reducer):
    """Removes half after layer 0 and takes its time."""

    stages = (0,)
    taps = {0: TapSpec(queries="last")}  # noqa: RUF012
    seconds = 0.2

    def decide(self, view: foveate.View) -> foveate.Decision:
        time.sleep(self.seconds)
        return foveate.Decision(keep=~view.visual | (view.visual.cumsum(1) % 2 == 0))


# ----------------------------------------------------------------------------------------------------------- latency
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_phases_are_told_apart(name: str):
    model = build(name)
    given = inputs(name, model)
    before = footprint(model)
    slow, full = timed(model, given, Slow(), 3), timed(model, given, None, 3)
    assert slow.timing.reduce >= 1000 * Slow.seconds
    assert full.timing.reduce == 0
    assert full.trace is None
    for found in (slow.timing, full.timing):
        assert found.vision > 0
        assert found.decoder > 0
        assert found.prefill == pytest.approx(found.vision + found.reduce + found.decoder)
        assert found.total == pytest.approx(found.prefill + 2 * found.decode)
        assert 0 < found.prefill_cpu <= found.total_cpu
    assert slow.cache_bytes < full.cache_bytes
    assert footprint(model) == before, "nothing is left in the model"


def test_deciding_inside_the_tower_is_not_vision(monkeypatch: pytest.MonkeyPatch):
    model = build("llava")
    given = inputs("llava", model)
    method = foveate.ToMe(keep=0.5)
    match = type(method.tower).match

    def slow(*arguments):
        time.sleep(0.1)
        return match(*arguments)

    monkeypatch.setattr(type(method.tower), "match", slow)
    found = timed(model, given, method, 1).timing
    assert found.reduce >= 200  # merges in two layers at least
    assert found.decode == 0


# ---------------------------------------------------------------------------------------------------- the whole bench
def test_bench_measures_everyone_in_turns_and_leaves_the_model_alone():
    model = build("llava")
    given = inputs("llava", model)
    before, steps = footprint(model), []
    method = {"fastv": foveate.FastV(keep=0.5, layer=2)}
    rows = bench(model, given, method, 2, 2, counted=True, progress=lambda done, total: steps.append((done, total)))
    assert [row.name for row in rows] == [FULL, "fastv", LIMIT]
    assert steps == [(i + 1, 12) for i in range(12)]
    assert footprint(model) == before
    full, fastv, limit = rows
    assert [len(row.runs) for row in rows] == [2, 2, 2]
    assert (full.entering, limit.entering, limit.after) == (16, 0, 0)
    assert fastv.after < fastv.entering < 16
    for row in rows:
        assert row.flops.total == pytest.approx(row.counted, rel=0.02)
        # The last token is not cached: nothing follows it.
        shape = Geometry.from_config(model.config, 0, 0)
        one_token = 2 * shape.layers * shape.kv_heads * shape.head_dim * 4 * len(given["input_ids"])
        assert row.kv_bytes + one_token == row.runs[0].cache_bytes
        assert row.peak.peak >= row.peak.before > 0
    assert full.speedup(full) == Spread(1, 1, 1)
    assert limit.flops.decoder < fastv.flops.decoder < full.flops.decoder


def test_counting_leaves_the_attention_as_it_was():
    model = build("qwen2_vl")
    given = inputs("qwen2_vl", model)
    counted = counted_flops(model, given, None)
    assert model.config.text_config._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert counted == pytest.approx(prefill_flops(model, None, given).total, rel=0.005)


def test_a_prompt_without_an_image_is_refused():
    model = build("llava")
    with pytest.raises(foveate.UnsupportedError, match="holds no visual token"):
        bench(model, {"input_ids": torch.tensor([[1, 7, 8, 9]])}, {"fastv": foveate.FastV(keep=4, layer=1)}, 1, 1)


def test_spread():
    assert Spread.of([3.0]) == Spread(3, 3, 3)
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3, 2, 4)
    assert Spread.of([1.0, 2.0]).to_json() == {"median": 1.5, "q1": 1.25, "q3": 1.75}


# ------------------------------------------------------------------------------------------------------------ memory
def test_a_short_peak_is_seen_and_an_earlier_one_is_not():
    earlier = bytearray(96 * MB)
    earlier[::4096] = b"x" * len(earlier[::4096])
    del earlier
    with peak_memory() as found:
        short = bytearray(48 * MB)
        short[::4096] = b"x" * len(short[::4096])
        del short
    assert found.added is not None
    assert found.added == pytest.approx(48 * MB, rel=0.1)


CHILD = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("memory", sys.argv[1])
memory = sys.modules["memory"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)
with memory.peak_memory() as found:
    states = torch.randn(2000, 10000)
    del states
print(found.peak)
"""


# A child of this big process would inherit its high-water mark: a small one starts it.
OUTER = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True, check=True)
print(done.stdout, 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stdout)
print(done.stderr, file=sys.stderr)
"""


def test_peak_memory_agrees_with_what_is_seen_from_outside():
    """The largest resident size of a whole process: `/usr/bin/time -v` where there is one, and the kernel's account."""
    timer = shutil.which("time")
    command = [*([timer, "-v"] if timer else []), sys.executable, "-c", CHILD, memory.__file__]
    done = subprocess.run([sys.executable, "-c", OUTER, *command], capture_output=True, text=True, check=True)
    inside, outside = map(int, done.stdout.split())
    assert inside > 80e6
    assert inside == pytest.approx(outside, rel=0.1)
    if timer:
        line = next(line for line in done.stderr.splitlines() if "Maximum resident set size" in line)
        assert inside == pytest.approx(1024 * int(line.split()[-1]), rel=0.1)


def test_free_memory_is_known_here():
    assert free_bytes() > MB


# ------------------------------------------------------------------------------------------------------------ prompts
def test_a_prompt_of_another_length():
    model = build("qwen2_vl")
    given = {**inputs("qwen2_vl", model, batch=1)}
    visual = given["input_ids"] == 150
    text = int((~visual).sum())
    for count in (text + 25, text, text - 3):
        changed = with_text_tokens(given, visual, count)
        ids = changed["input_ids"]
        assert int((ids != 150).sum()) == count
        assert torch.equal(ids == 150, changed["mm_token_type_ids"] == 1)
        assert changed["attention_mask"].shape == ids.shape
        assert changed["pixel_values"] is given["pixel_values"]
        assert ids[0, -1] == given["input_ids"][0, -1]
    with pytest.raises(ValueError, match="at least 8 tokens"):
        with_text_tokens(given, visual, 3)


# ------------------------------------------------------------------------------------------------- random geometries
def test_every_preset_can_be_built():
    assert set(_families()) == set(PRESETS)


@pytest.mark.parametrize(("name", "gigabytes"), [("llava-1.5-7b", 14.1), ("qwen2.5-vl-7b", 16.6), ("gemma-3-4b", 8.6)])
def test_a_geometry_has_the_published_size(name: str, gigabytes: float):
    drawn = random_model(name)
    assert drawn.weight_bytes(torch.bfloat16) / 1e9 == pytest.approx(gigabytes, rel=0.01)
    read = Geometry.from_config(drawn.config, drawn.geometry.visual_tokens, drawn.geometry.text_tokens)
    for field in ("layers", "hidden_size", "intermediate_size", "heads", "kv_heads", "head_dim", "vocab_size"):
        assert getattr(read, field) == getattr(PRESETS[name], field)
    assert read.sliding_layers == PRESETS[name].sliding_layers


@pytest.mark.parametrize("name", ["llava-next-7b", "qwen3-vl-8b", "smolvlm-2.2b", "internvl3-8b"])
def test_the_prompt_of_a_geometry_fits_its_tower(name: str):
    """`prefill_flops` refuses a prompt whose slots are not as many as the features."""
    drawn = random_model(name, layers=1, text_tokens=12)
    given = drawn.inputs(batch=2)
    image = drawn.geometry.vocab_size - 1
    assert int((given["input_ids"] == image).sum()) == 2 * drawn.geometry.visual_tokens
    assert given["input_ids"].shape[1] == drawn.geometry.visual_tokens + 12
    assert prefill_flops(drawn._shell(torch.float32), None, given).vision > 1e11


@pytest.mark.parametrize(("name", "pixels"), [("llava-1.5-7b", 5 * 3 * 336 * 336), ("qwen3-vl-8b", 4 * 2880 * 1536)])
def test_a_prompt_has_the_visual_tokens_asked_for(name: str, pixels: int):
    """Several images of LLaVA-1.5, one large image of a Qwen."""
    drawn = random_model(name, layers=1, visual_tokens=2880)
    given = drawn.inputs()
    assert int((given["input_ids"] == drawn.geometry.vocab_size - 1).sum()) == drawn.geometry.visual_tokens == 2880
    assert given["pixel_values"].numel() == pixels
    assert prefill_flops(drawn._shell(torch.float32), None, given).vision > 1e11


@pytest.mark.parametrize(("name", "count"), [("llava-1.5-7b", 100), ("qwen2.5-vl-7b", 0), ("gemma-3-4b", 512)])
def test_visual_tokens_that_a_geometry_cannot_have(name: str, count: int):
    with pytest.raises(ValueError, match=f"visual-tokens={count}: {name} cannot"):
        random_model(name, visual_tokens=count)


def test_a_random_model_answers(monkeypatch: pytest.MonkeyPatch):
    """The real thing in small: the geometry's own code, with narrow layers."""
    small = dataclasses.replace(
        PRESETS["paligemma-3b"], layers=2, hidden_size=64, intermediate_size=64, head_dim=16, vocab_size=20000
    )
    tower = dataclasses.replace(_families()["paligemma-3b"], options={"projection_dim": 64})
    tower.vision.update(num_hidden_layers=1, intermediate_size=64, hidden_size=64)
    monkeypatch.setattr(random_models, "_families", lambda: {"paligemma-3b": tower})
    drawn = random_models.RandomModel(small, tower)
    model, given = drawn.build(), drawn.inputs(batch=2)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings().weight.detach().std().item() == pytest.approx(0.02, rel=0.05)
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    with foveate.apply(model, foveate.Random(keep=100)) as session, torch.no_grad():
        logits = model(**given).logits
    assert logits.isfinite().all()
    assert session.trace.visual_tokens.tolist() == [[100, 100]] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llava-9",), "llava-9"),
        (("llava-1.5-7b", 33), "layers=33: llava-1.5-7b has 32"),
        (("llava-1.5-7b", 2, 1), "prompt-tokens=1"),
    ],
)
def test_a_geometry_that_cannot_be(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        random_model(*arguments)
