"""A fast part of `make compatibility`: a handful of classes, two methods, and the count itself."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import foveate
from foveate.reduction import Decision, Reducer, View
from tests import catalogue
from tests.catalogue.__main__ import counted, table
from tests.catalogue.count import IN_DECODER, IN_TOWER, OUTSIDE, Wrong, judge

EXACT = ["llama4", "chameleon", "instructblipvideo", "kosmos-2"]


@functools.cache
def made(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    model = catalogue.build(name)
    prompt = catalogue.inputs(name, model)
    with torch.no_grad():
        model(**prompt)
    return model, prompt


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fastv", "sparsevlm"])
@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str, method: str):
    judge(name, made(name)[0], method, IN_DECODER[method], made(name)[1], "else" if name == "kosmos-2" else "same")


class _Idle(Reducer):
    stages = (0,)

    def decide(self, view: View) -> Decision:
        return Decision()


class TestTheCountItself:
    def judged(self, monkeypatch: pytest.MonkeyPatch, reducer: Any) -> None:
        monkeypatch.setattr(foveate, "build", lambda *args, **options: reducer)
        judge("chameleon", *made("chameleon")[:1], "fastv", {}, made("chameleon")[1])

    def test_a_method_that_does_nothing(self, monkeypatch: pytest.MonkeyPatch):
        with pytest.raises(Wrong, match="silent"):
            self.judged(monkeypatch, _Idle())

    def test_positions_that_are_not_the_twins(self, monkeypatch: pytest.MonkeyPatch):
        real = foveate.engine.decoder.layer_inputs.take_rope
        monkeypatch.setattr(
            "foveate.engine.decoder.layer_inputs.take_rope", lambda rope, index, length: real(rope, index * 0, length)
        )
        with pytest.raises(Wrong, match="forward"):
            self.judged(monkeypatch, foveate.FastV(keep=0.5, layer=1))

    def test_a_hang_costs_one_class(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("tests.catalogue.__main__.count", lambda name, impl: __import__("time").sleep(60))
        found = counted("llava", "sdpa", 0.2)
        assert set(found.values()) == {"crash: not done after 0.2 s"}

    def test_what_is_not_exact_is_said_with_its_reason(self):
        methods = [*IN_DECODER, *IN_TOWER]
        refused = dict.fromkeys(methods, "exact") | {"fopru": "refused: no tower"}
        text = table({"a": dict.fromkeys(methods, "exact"), "b": refused}, methods, "Tower")
        assert "1 of 2 classes exact" in text
        assert "b: fopru: refused: no tower" in text


def test_every_class_of_transformers_is_in_the_catalogue():
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as mapped

    assert {catalogue.class_name(name) for name in catalogue.NAMES} == {*mapped.values(), "Phi4MultimodalForCausalLM"}
    assert len(OUTSIDE) == 12


@pytest.mark.parametrize("name", sorted(OUTSIDE))
def test_classes_without_visual_tokens_in_the_sequence_are_refused(name: str):
    with pytest.raises(foveate.UnsupportedError, match=r"cross-attention|encoder-decoder|takes no images|actions"):
        foveate.apply(catalogue.build(name), foveate.Random(keep=0.5))
