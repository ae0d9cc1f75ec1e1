"""`apply` never changes the method it was given: it works with a copy, bound to one model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

import foveate
from foveate.reduction import Decision, Reducer, View
from tests import families
from tests.engine.test_usage import _video_prompt
from tests.reducers.encoders import encoder, inputs
from tests.reducers.test_matrix import METHODS
from tests.reducers.test_on_videos import METHODS as ON_VIDEOS
from tests.reference.checks import build_once

MAKES: dict[str, Callable[[], Reducer]] = {
    **{name: lambda make=make: make(0.5) for name, make in METHODS.items()},
    "downsample": lambda: foveate.Downsample(keep=0.5),
    **{name: lambda make=make: make(0.5) for name, make in ON_VIDEOS.items()},
    "pitome in the tower": lambda: foveate.PiToMe(keep=0.5),
    "tome in the tower": lambda: foveate.ToMe(keep=0.5),
    "pyramiddrop faithful": lambda: foveate.PyramidDrop(faithful=True, layers=(1, 2, 3)),
    "vtw in the middle": lambda: foveate.VTW(),
    "fastv at a fraction": lambda: foveate.FastV(keep=4, layer=0.5),
}


def family(method: str) -> str:
    return "qwen2_vl" if method in ON_VIDEOS else "llava"


def prompt(method: str) -> dict[str, torch.Tensor]:
    return _video_prompt("qwen2_vl") if method in ON_VIDEOS else families.inputs("llava", build_once("llava"))


def contents(reducer: Any) -> Any:
    """Everything a method holds, members of a chain included, in a form that compares."""
    held = copy.deepcopy(vars(reducer))
    return {
        name: [contents(each) for each in value] if name == "members" else value for name, value in held.items()
    } | {"class": {name: value for name, value in vars(type(reducer)).items() if not name.startswith("__")}}


def deep(method: str, depth: int) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.DECODER, "num_hidden_layers", depth)
        return families.build(family(method))


@torch.no_grad()
@pytest.mark.parametrize("method", MAKES)
def test_a_method_is_what_it_was_before(method: str):
    reducer, model = MAKES[method](), build_once(family(method))
    before = contents(reducer)
    with foveate.apply(model, reducer) as session:
        assert contents(reducer) == before, "by apply"
        model(**prompt(method))
        assert session.trace is not None
    assert contents(reducer) == before, "by a forward"


@torch.no_grad()
@pytest.mark.parametrize("method", MAKES)
def test_one_method_serves_a_shallow_and_a_deep_model_at_once(method: str):
    shallow, deeper, inputs_ = deep(method, 4), deep(method, 12), prompt(method)
    alone = []
    for model in (shallow, deeper):
        with foveate.apply(model, MAKES[method]()) as session:
            alone.append((model(**inputs_).logits, session.trace.visual_tokens))
    reducer = MAKES[method]()
    with foveate.apply(shallow, reducer) as first, foveate.apply(deeper, reducer) as second:
        for model, session, (logits, tokens) in zip((shallow, deeper), (first, second), alone):
            assert torch.equal(model(**inputs_).logits, logits)
            assert torch.equal(session.trace.visual_tokens, tokens)


@torch.no_grad()
def test_pumer_is_what_it_was_before():
    reducer = foveate.PuMer(task="vqav2")
    before = contents(reducer)
    model = encoder("ViltForQuestionAnswering")
    with foveate.apply(model, reducer):
        model(**inputs(model))
    assert contents(reducer) == before


class _Halves(Reducer):
    """As users write them: no `super().__init__()`, and a `decide` chosen when it is made."""

    def __init__(self) -> None:
        self.decide = self._withdraw

    def prepare(self, anatomy: Any) -> None:
        self.stages = (anatomy.depth // 2,)

    def _withdraw(self, view: View) -> Decision | None:
        return Decision(view.active & ~view.visual) if view.stage in self.stages else None


class _Foreign:
    """Not even a subclass: what `apply` asks for and no more."""

    stages, taps, vision_taps, positions = (1,), {}, {}, "keep"

    def decide(self, view: View) -> Decision:
        return Decision(view.active & ~view.visual)


@torch.no_grad()
def test_methods_of_users_are_bound_as_well():
    shallow, deeper, given = deep("vtw", 4), deep("vtw", 12), prompt("vtw")
    reducer = _Halves()
    with foveate.apply(shallow, reducer) as first, foveate.apply(deeper, reducer) as second:
        for model, session in ((shallow, first), (deeper, second)):
            model(**given)
            depth = model.config.text_config.num_hidden_layers
            assert session.trace.visual_tokens[0].tolist() == [16] * (depth // 2 + 1) + [0] * (depth // 2 - 1)
    assert vars(reducer).keys() == {"decide"}
    assert reducer.decide.__self__ is reducer
    with foveate.apply(shallow, _Foreign()) as session:  # type: ignore[arg-type]
        shallow(**given)
        assert session.trace.visual_tokens[0].tolist() == [16, 16, 0, 0]


class _Words:
    def __call__(self, texts: list[str], **_: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[1, 2, 3]] * len(texts))}


@torch.no_grad()
def test_a_companion_is_left_where_it_is():
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    companion = CLIPModel(
        CLIPConfig(
            text_config={**small, "vocab_size": 50, "eos_token_id": 3},
            vision_config={**small, "image_size": 32, "patch_size": 8},
            projection_dim=16,
        )
    )
    moves: list[Any] = []
    companion.to = lambda *args, **kwargs: moves.append(args) or companion  # type: ignore[method-assign]
    reducer = foveate.CDPruner(keep=0.5, clip=(companion, _Words()), question="what is it")
    before = {name: id(value) for name, value in vars(reducer).items()}
    scorer = dict(vars(reducer._scorer))
    model = build_once("llava")
    with foveate.apply(model, reducer) as session:
        model(**prompt("cdpruner"))
        assert session.reducer._scorer is not reducer._scorer
    assert not moves
    assert companion.training
    assert {name: id(value) for name, value in vars(reducer).items()} == before
    assert vars(reducer._scorer) == scorer
