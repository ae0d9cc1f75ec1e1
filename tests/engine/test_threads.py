"""Several threads in one model: every answer is that of the request alone, and every thread has its own trace."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.families import inputs
from tests.reducers.encoders import encoder
from tests.reducers.encoders import inputs as encoder_inputs
from tests.reference.checks import build_once, footprint, generate, largest
from torch import Tensor
from transformers import PreTrainedModel

import foveate
from foveate.engine.families.parts import resolve
from foveate.reduction import Reducer

KINDS: dict[str, Callable[[], Reducer]] = {
    "before the decoder": lambda: foveate.DivPrune(keep=0.4),
    "by the tower": lambda: foveate.VisionZip(keep=0.4),
    "in the tower": lambda: foveate.ToMe(keep=0.5),
    "by attention": lambda: foveate.FastV(keep=0.4, layer=1),
    "layer by layer": lambda: foveate.SparseVLM(keep=0.4),
    "all of them": lambda: foveate.VTW(layer=2),
    "two at once": lambda: foveate.Chain(foveate.VisionZip(keep=0.5), foveate.FastV(keep=0.5, layer=2)),
}


@pytest.fixture(autouse=True)
def often() -> Iterator[None]:
    """Threads take turns all the time."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


def requests(model: PreTrainedModel, number: int) -> list[dict[str, Any]]:
    """Prompts of unlike lengths, batches and images; every third one has no image at all."""
    made = []
    for i in range(number):
        prompt = inputs("llava", model, batch=1 + i % 2, before=2 + i, after=4 + (7 * i) % 5, seed=i)
        if i % 3 == 2:
            ids = prompt["input_ids"].clamp_max(139)
            prompt = {"input_ids": ids, "attention_mask": prompt["attention_mask"]}
        made.append(prompt)
    return made


def ask(model: PreTrainedModel, prompt: dict[str, Any]) -> Tensor:
    return torch.stack(generate(model, prompt, steps=3).logits)


@torch.no_grad()
@pytest.mark.parametrize("threads", [pytest.param(2, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_traces_are_those_of_the_request_alone(kind: str, threads: int):
    model = build_once("llava")
    before = footprint(model)
    asked = requests(model, threads)
    alone = []
    for prompt in asked:
        with foveate.apply(model, KINDS[kind]()) as session:
            alone.append((ask(model, prompt), session.trace))
    wrong: list[str] = []

    def work(number: int) -> None:
        right, trace = alone[number]
        with torch.no_grad():
            for _ in range(3):
                got = ask(model, asked[number])
                if largest(got - right) > 1e-4:
                    wrong.append(f"request {number} off by {largest(got - right)}")
                mine = session.trace
                if (mine is None) != (trace is None) or (
                    trace is not None and not torch.equal(mine.visual_tokens, trace.visual_tokens)
                ):
                    wrong.append(f"request {number}: the trace of somebody else")

    with foveate.apply(model, KINDS[kind]()) as session, ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, number) for number in range(threads)]:
            done.result()
        nobody = session.trace
    assert not wrong
    assert nobody is None, "several threads have traces, this one has none"
    assert footprint(model) == before


@torch.no_grad()
def test_a_session_of_one_thread_serves_another():
    """As streamers do it: apply here, generate there; the trace is that of the only thread that called the model."""
    model = build_once("llava")
    prompt = inputs("llava", model)
    with foveate.apply(model, foveate.FastV(keep=0.4, layer=1)):
        right = ask(model, prompt)
    got: list[Tensor] = []
    with foveate.apply(model, foveate.FastV(keep=0.4, layer=1)) as session:
        thread = threading.Thread(target=lambda: got.append(ask(model, prompt)))
        thread.start()
        thread.join()
    assert largest(got[0] - right) <= 1e-5
    assert session.trace is not None


@torch.no_grad()
def test_asyncio_with_an_executor():
    model = build_once("llava")
    asked = requests(model, 6)
    with foveate.apply(model, foveate.DivPrune(keep=0.4)):
        right = [ask(model, prompt) for prompt in asked]

    async def serve() -> list[Tensor]:
        return await asyncio.gather(*(asyncio.to_thread(ask, model, prompt) for prompt in asked))

    with foveate.apply(model, foveate.DivPrune(keep=0.4)):
        got = asyncio.run(serve())
    assert all(largest(a - b) <= 1e-4 for a, b in zip(got, right))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_call_that_failed_in_another_thread_holds_nobody_up(kind: str):
    model = build_once("llava")
    prompt, layer = inputs("llava", model), model.get_decoder().layers[4]
    if kind == "encoder":
        model = model.model.vision_tower
        prompt, layer = {"pixel_values": prompt["pixel_values"]}, resolve(build_once("llava")).vision_attention()[0]

    def fail(*call: object) -> None:
        raise ZeroDivisionError

    session = foveate.apply(model, foveate.ToMe(keep=0.5))
    handle = layer.register_forward_pre_hook(fail)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ZeroDivisionError):
            pool.submit(model, **prompt).result()
        handle.remove()
        leaver = threading.Thread(target=session.remove)
        leaver.start()
        leaver.join(5)
        assert not leaver.is_alive()


@torch.no_grad()
def test_leaving_waits_for_calls_of_other_threads():
    """A call that began reduced ends reduced; none is left half way with its hooks gone."""
    model = build_once("llava")
    prompt = inputs("llava", model)
    with foveate.apply(model, foveate.FastV(keep=0.4, layer=1)):
        right = ask(model, prompt)
    inside, go, got = threading.Event(), threading.Event(), []

    def hold(*call: object) -> None:
        inside.set()
        go.wait(20)

    handle = model.get_decoder().layers[4].register_forward_pre_hook(hold)
    session = foveate.apply(model, foveate.FastV(keep=0.4, layer=1))
    thread = threading.Thread(target=lambda: got.append(ask(model, prompt)))
    thread.start()
    assert inside.wait(20)
    leaver = threading.Thread(target=session.remove)
    leaver.start()
    leaver.join(0.3)
    assert leaver.is_alive(), "the call of the other thread is not over"
    go.set()
    leaver.join(20)
    thread.join(20)
    handle.remove()
    assert largest(got[0] - right) <= 1e-5


@torch.no_grad()
def test_encoders_and_towers_on_their_own():
    vit = build_once("llava").model.vision_tower
    pixels = [torch.randn(1 + i % 2, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    model = encoder("ViltForQuestionAnswering")
    words = [encoder_inputs(model)] * 2
    jobs: list[tuple[Any, Reducer, list[Callable[[], Tensor]]]] = [
        (vit, foveate.ToMe(r=2), [lambda x=x: vit(x).last_hidden_state for x in pixels]),
        (model, foveate.PuMer(prune_r=0.2, merge_r=0.2), [lambda x=x: model(**x).logits for x in words]),
    ]
    for target, reducer, calls in jobs:
        with foveate.apply(target, reducer):
            right = [call() for call in calls]
        with foveate.apply(target, reducer) as session, ThreadPoolExecutor(len(calls)) as pool:

            def work(number: int, calls: Any = calls, right: Any = right, session: Any = session) -> None:
                with torch.no_grad():
                    for _ in range(5):
                        assert largest(calls[number]() - right[number]) <= 1e-5
                        assert len(session.trace.mean_visual_tokens) == len(right[number])

            for done in [pool.submit(work, i) for i in range(len(calls))]:
                done.result()
