"""Tokens are removed physically: fewer operations, fewer keys, no more memory, and the host hardly ever waits."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from tests.families import DECODER, FAMILIES, N_LAYERS, inputs, spread_weights
from tests.reference.checks import build_once
from tests.reference.meters import flops, peak_memory
from tests.reference.plans import Fixed, KeepAll, TopOfLast, Watch, draw_removed
from torch.nn.functional import pad

import foveate
from foveate.engine.compat import CACHE_NAME, returned_cache
from foveate.measure.launches import Launches
from foveate.reduction import TapSpec

LENGTH, VISUAL = 600, slice(20, 580)
COUNTS = {0: 300, 2: 100, 4: 0}
"""Visual tokens left after each stage."""


@functools.cache
def _decoder() -> hf.PreTrainedModel:
    model = spread_weights(hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)))
    model.set_attn_implementation("eager")  # the operations of its attention are plain matrix products
    return model


def _prompt(length: int = LENGTH) -> dict[str, torch.Tensor]:
    return {"inputs_embeds": torch.randn(1, length, 64, generator=torch.Generator().manual_seed(0))}


def _visual() -> torch.Tensor:
    visual = torch.zeros(1, LENGTH, dtype=torch.bool)
    visual[:, VISUAL] = True
    return visual


def _removed() -> dict[int, torch.Tensor]:
    left, removed = _visual(), {}
    for stage, count in COUNTS.items():
        slots = left[0].nonzero()[:, 0]
        gone = torch.zeros_like(left)
        gone[0, slots[torch.arange(len(slots) - count)]] = True
        removed[stage], left = gone, left & ~gone
    return removed


def _run(model: hf.PreTrainedModel, prompt: dict[str, torch.Tensor]) -> Callable[[], object]:
    return lambda: model(**prompt, logits_to_keep=1)


def _layers(length: int) -> float:
    """Operations of one decoder layer on `length` tokens."""
    return flops(lambda: _decoder().model(**_prompt(length))) / N_LAYERS


def _expected(entering: list[int]) -> float:
    head = flops(_run(_decoder(), _prompt())) - flops(lambda: _decoder().model(**_prompt()))
    return head + sum(map(_layers, entering))


def test_operations_are_those_of_the_tokens_left():
    entering = [600, 340, 340, 140, 140, 40]
    with foveate.apply(_decoder(), Fixed(_removed()), visual=_visual()) as session:
        used = flops(_run(_decoder(), _prompt()))
    assert session.trace.kv_lengths == entering
    assert used <= 1.02 * _expected(entering)
    assert used >= 0.98 * _expected(entering)


def test_reading_attention_costs_next_to_nothing():
    with foveate.apply(_decoder(), TopOfLast(40), visual=_visual()):
        used = flops(_run(_decoder(), _prompt()))
    assert used <= 1.02 * _expected([600, 600, 80, 80, 80, 80])


def test_before_layer_0_no_layer_is_long():
    removed = {-1: _visual() & (torch.arange(LENGTH) % 14 > 0)}
    entering = [40 + 40] * N_LAYERS
    with foveate.apply(_decoder(), Fixed(removed), visual=_visual()) as session:
        used = flops(_run(_decoder(), _prompt()))
    assert session.trace.kv_lengths == entering
    assert used <= 1.02 * _expected(entering)


@torch.no_grad()
def test_the_cache_stays_small_while_decoding():
    with foveate.apply(_decoder(), Fixed(_removed()), visual=_visual()):
        output = _decoder().generate(
            **_prompt(), max_new_tokens=6, do_sample=False, pad_token_id=0, return_dict_in_generate=True
        )
    lengths = [layer.keys.shape[-2] for layer in returned_cache(output).layers]
    assert lengths == [n + 5 for n in (600, 340, 340, 140, 140, 40)]
    assert returned_cache(output).get_seq_length() == LENGTH + 5, "the logical length"


@pytest.mark.parametrize("reducer", [KeepAll(), Fixed(_removed()), TopOfLast(40)], ids=["keep all", "fixed", "last"])
def test_peak_memory_is_not_above_the_full_model(reducer: foveate.Reducer):
    """Also with the taps and the decisions; a frame or two (600 x 64 floats) of slack."""
    model = _decoder()
    full = peak_memory(_run(model, _prompt()))
    with foveate.apply(model, reducer, visual=_visual()):
        reduced = peak_memory(_run(model, _prompt()))
    frame = LENGTH * 64 * 4
    assert reduced <= full + 2 * frame


def test_peak_memory_falls_when_the_first_layer_is_short():
    removed = {-1: _visual() & (torch.arange(LENGTH) % 14 > 0)}
    full = peak_memory(_run(_decoder(), _prompt()))
    with foveate.apply(_decoder(), Fixed(removed), visual=_visual()):
        assert peak_memory(_run(_decoder(), _prompt())) <= 0.7 * full


@torch.no_grad()
@pytest.mark.parametrize("taps", [{}, {1: TapSpec("last")}, {1: TapSpec("text_after")}], ids=["no tap", "last", "text"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in FAMILIES])
def test_the_host_waits_once_per_stage_and_never_while_decoding(name: str, taps: dict[int, TapSpec]):
    """Once per stage (how many tokens stay?), once per tap (how many rows?), once more (is there an image?)."""
    model = build_once(name)
    prompt = inputs(name, model)
    reducer = Watch(draw_removed(prompt["input_ids"], {-1: [9, 9], 1: [4, 7], 3: [2, 0]}), taps)
    takes_mask = not hasattr(model.base_model, "get_rope_index")
    mask = {"attention_mask": pad(prompt["attention_mask"], (0, 1), value=1)} if takes_mask else {}

    def waits() -> tuple[Counter[str], Counter[str]]:
        with Launches() as prefill:
            cache = returned_cache(model(**prompt, use_cache=True))
        with Launches() as step:
            model(input_ids=prompt["input_ids"][:, -1:], **mask, **{CACHE_NAME: cache})
        # What a stage hands over are several tensors, in one copy from a device; on the CPU each one is counted.
        for found in (prefill.waits, step.waits):
            found["numpy"] = -(-found["numpy"] // 4)
        return prefill.waits, step.waits

    full = waits()
    with foveate.apply(model, reducer):
        reduced = waits()
    assert reduced[0].total() - full[0].total() <= len(reducer.stages) + len(taps) + 1, reduced[0] - full[0]
    assert reduced[1].total() <= full[1].total(), reduced[1] - full[1]
