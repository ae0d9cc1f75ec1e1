"""Two hundred requests of the fuzz target (`make fuzz` makes 20,000), and that its judge tells right from wrong."""

from __future__ import annotations

import threading

import pytest
import torch

import foveate
from tests.fuzz import judge as judging
from tests.fuzz.__main__ import lot, summary
from tests.fuzz.cases import Call, Request, Row
from tests.fuzz.judge import Verdict, build_once, judge, smallest


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 8))])
def test_mixed_requests(number: int):
    found = lot(number, 25)
    wrong = [(request, verdict.why) for request, verdict in found if verdict.outcome == "wrong"]
    assert not wrong
    assert sum(verdict.outcome == "ok" for _, verdict in found) > 8


FOUND = [
    Request("llava", "dart", {"keep": 17, "layer": 4, "faithful": True}, (Call((Row(2), Row(), Row(seed=3))),)),
    Request("aya_vision", "dart", {"keep": 0.5, "layer": 3}, (Call((Row(), Row(before=1, after=5))),)),
    Request("aya_vision", "dart", {"keep": 0.5, "layer": 4}, (Call((Row(), Row(before=1, after=5))),)),
]
"""Requests that were wrong once, as small as they could be made."""


@pytest.mark.parametrize("request_", FOUND, ids=lambda each: f"{each.family}-{each.method}")
def test_what_was_wrong_once(request_: Request):
    assert judge(request_) == Verdict("ok")


def test_the_same_number_makes_the_same_requests():
    def no_run(request: Request) -> Verdict:
        return Verdict("ok")

    assert lot(5, 20, no_run) == lot(5, 20, no_run)
    assert lot(5, 20, no_run) != lot(6, 20, no_run)


class Neighbours(foveate.Reducer):
    """Wrong on purpose: what stays of a row depends on how many rows there are."""

    stages = (0,)

    def decide(self, view: foveate.View) -> foveate.Decision:
        return foveate.Decision(keep=~view.visual | (view.visual.cumsum(1) % (len(view.visual) + 1) == 0))


class Leaves(Neighbours):
    """Wrong on purpose: changes a weight."""

    def prepare(self, anatomy) -> None:
        with torch.no_grad():
            next(anatomy.model.parameters()).view(-1)[0] += 1


def test_a_wrong_row_is_found_and_made_smaller(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(judging, "_reducer", lambda request: Neighbours())
    rows = (Row(), Row(2, 2, 5, 1), Row(0))
    request = Request(calls=(Call(rows, 4, "left", {"max_new_tokens": 1, "use_cache": False}),), elsewhere=True)
    verdict = judge(request)
    assert verdict.outcome == "wrong"
    assert "visual tokens by layer" in verdict.why
    (call,) = smallest(request).calls
    assert len(call.rows) == 2
    assert (call.padding, call.options) == (0, None)


def test_damage_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(judging, "_reducer", lambda request: Leaves())
    weight = next(build_once("llava").parameters()).view(-1)
    before = weight[0].item()
    try:
        assert judge(Request()).why == "after the session: the weights changed"
    finally:
        with torch.no_grad():
            weight[0] = before


def test_the_slope_of_memory():
    lots = [{"lot": i, "counts": {"ok": 100}, "wrong": [], "mb": 500 + i, "seconds": 1, "process": 1} for i in range(8)]
    assert summary(lots)["mb_per_1000_requests"] == {1: 10.0}
    assert summary(lots)["requests"] == 800


def test_a_projector_is_looked_for_by_two_threads_at_once():
    """The second thread must not read "there is none" while the first is still comparing."""
    model = build_once("llava")
    projector, gate = model.model.multi_modal_projector, threading.Barrier(2)
    first = threading.local()

    def wait(module, args) -> None:
        if args[0].shape[:2] == (1, 1) and not hasattr(first, "seen"):  # a single feature: the comparison
            first.seen = True
            gate.wait(20)

    request = Request("llava", "prumerge", {"keep": 0.5}, (Call((Row(seed=1),)), Call((Row(seed=2),))), threads=2)
    hook = projector.register_forward_pre_hook(wait)
    try:
        answers = judging._together(request, model, foveate.PruMerge(keep=0.5))
    finally:
        hook.remove()
    for call, answer in zip(request.calls, answers):
        assert not isinstance(answer, Exception)
        with foveate.apply(model, foveate.PruMerge(keep=0.5)):
            alone = judging._run(model, "llava", call, None)
        assert torch.allclose(answer.logits, alone.logits, atol=1e-4)
