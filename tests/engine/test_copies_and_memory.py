"""Copies of a model, what comes out again when something fails, and what an open session keeps alive."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import torch
from tests.families import inputs
from tests.reducers.encoders import encoder
from tests.reference.checks import build_once, footprint, generate, largest
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForImageTextToText, PreTrainedModel

import foveate
from foveate.engine.decoder.taps import tap_attention
from foveate.engine.undo import Undo
from foveate.engine.vision import merging
from foveate.engine.vision.merging import TowerReduction
from foveate.reduction import Decision, Reducer, View

KINDS: dict[str, Callable[[], Reducer]] = {
    "before the decoder": lambda: foveate.Random(keep=4),
    "by attention": lambda: foveate.FastV(keep=4, layer=1),
    "by the tower": lambda: foveate.VisionZip(keep=4),
    "in the tower": lambda: foveate.ToMe(keep=0.5),
    "all of them": lambda: foveate.VTW(layer=2),
}
every = pytest.mark.parametrize("kind", KINDS)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def shape(model: nn.Module) -> dict[str, object]:
    """What a model is made of, the same for equal models: attributes, hooks, shared configurations."""
    configs: dict[int, int] = {}
    return {
        name: (
            sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs),
            len(m._forward_pre_hooks_with_kwargs), len(m._forward_hooks_always_called),
            configs.setdefault(id(getattr(m, "config", None)), len(configs)),
        )
        for name, m in model.named_modules()
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- copies
@torch.no_grad()
@every
@pytest.mark.parametrize("copied", ["whole", "averaged", "decoder"])
def test_a_copy_is_a_plain_model_of_its_own(kind: str, copied: str):
    model = build_once("llava")
    prompt, before, made_of = inputs("llava", model), footprint(model), shape(model)
    plain = model(**prompt).logits
    with foveate.apply(model, KINDS[kind]()):
        reduced = model(**prompt).logits
        if copied == "decoder":
            twin = copy.deepcopy(model.get_decoder())
        else:
            twin = copy.deepcopy(model) if copied == "whole" else AveragedModel(model).module
        assert torch.equal(model(**prompt).logits, reduced), "copying changes nothing here"
        if copied == "decoder":
            states = twin(inputs_embeds=torch.randn(1, 5, 64)).last_hidden_state
            assert states.isfinite().all()
            assert hooks(twin) == hooks(copy.deepcopy(twin))
            return
        assert shape(twin) == made_of
        assert torch.equal(twin(**prompt).logits, plain)
        for parameter in twin.parameters():
            parameter.mul_(0.5)
        assert (
            largest(torch.stack(generate(twin, prompt, 2).logits) - torch.stack(generate(model, prompt, 2).logits))
            > 0.1
        )
        with foveate.apply(twin, KINDS[kind]()) as session:
            twin(**prompt)
            assert session.trace is not None
        assert torch.equal(model(**prompt).logits, reduced)
    assert footprint(model) == before


@torch.no_grad()
def test_a_copy_of_an_encoder():
    vilt, tower = encoder("ViltModel"), build_once("llava").model.vision_tower
    for model, method in ((vilt, foveate.PuMer()), (tower, foveate.ToMe(r=2))):
        made_of = shape(model)
        with foveate.apply(model, method):
            assert shape(copy.deepcopy(model)) == made_of


@torch.no_grad()
@every
def test_pickling_is_refused_by_name_and_saving_works(kind: str, tmp_path: Path):
    model = build_once("llava")
    prompt = inputs("llava", model)
    plain = model(**prompt).logits
    with foveate.apply(model, KINDS[kind]()):
        for save in (pickle.dumps, lambda m: torch.save(m, tmp_path / "m.pt")):
            with pytest.raises(foveate.UnsupportedError, match="pickle"):
                save(model)
        model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert largest(loaded(**prompt).logits - plain) <= 1e-5


# ------------------------------------------------------------------------------------------------------------- undo
def test_every_step_is_undone_in_reverse_even_when_one_fails():
    seen: list[int] = []
    undo, module = Undo(), nn.Linear(1, 1)

    def fail() -> None:
        raise LookupError("step 2")

    undo.set(module, "mine", 1)
    undo.then(lambda: seen.append(1))
    undo.then(fail)
    undo.then(lambda: seen.append(3))
    undo.set(module, "mine", 2)
    undo.hook(module, lambda *call: None)
    with pytest.raises(LookupError, match="step 2"):
        undo.close()
    assert seen == [3, 1]
    assert not module._forward_hooks
    assert "mine" not in module.__dict__
    undo.close()


def test_what_somebody_else_has_put_over_ours_stays_theirs():
    model = copy.deepcopy(build_once("llava"))
    session = foveate.apply(model, foveate.Random(keep=4))
    ours = model.generate

    def theirs(*args: object, **kwargs: object) -> object:
        return ours(*args, **kwargs)

    model.generate = theirs
    session.remove()
    assert model.generate is theirs
    prompt = inputs("llava", model)
    assert generate(model, prompt, 2).sequences.shape == generate(build_once("llava"), prompt, 2).sequences.shape


@torch.no_grad()
@pytest.mark.parametrize(
    "members",
    [
        lambda: (foveate.ToMe(keep=0.5), foveate.VisionZip(keep=0.5)),
        lambda: (foveate.PiToMe(keep=0.5), foveate.FoPru(keep=0.5)),
        lambda: (foveate.Downsample(keep=0.5), foveate.VisPruner(keep=0.5)),
    ],
)
def test_a_chain_that_fails_or_is_refused_leaves_the_model_as_it_was(members: Callable[[], tuple[Reducer, ...]]):
    model = build_once("llava")
    prompt, before, number = inputs("llava", model), footprint(model), hooks(model)
    plain = model(**prompt).logits
    try:
        with foveate.apply(model, foveate.Chain(*members())):
            model(**prompt)
    except (foveate.UnsupportedError, foveate.OptionError):
        pass
    assert (footprint(model), hooks(model)) == (before, number)
    assert torch.equal(model(**prompt).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["decoder", "encoder", "cross-modal", "tower alone"])
def test_what_cannot_be_put_in_to_the_end_comes_out_again(kind: str, monkeypatch: pytest.MonkeyPatch):
    model: nn.Module = {
        "decoder": lambda: build_once("llava"),
        "encoder": lambda: copy.deepcopy(build_once("llava").model.vision_tower),
        "cross-modal": lambda: encoder("ViltModel"),
        "tower alone": lambda: copy.deepcopy(build_once("llava").model.vision_tower),
    }[kind]()
    method = foveate.PuMer() if kind == "cross-modal" else foveate.ToMe(keep=0.5)

    def put_in() -> None:
        with foveate.apply(model, method) if kind != "tower alone" else TowerReduction(model, foveate.ToMe(r=3).tower):
            assert footprint(model) != before

    def fail(*call: object, **options: object) -> None:
        raise ZeroDivisionError

    before = footprint(model)
    with monkeypatch.context() as patch:
        patch.setattr(*((merging, "tap_attention") if kind == "tower alone" else (Undo, "copied")), fail)
        with pytest.raises(ZeroDivisionError):
            put_in()
    assert footprint(model) == before
    put_in()
    assert footprint(model) == before


def test_several_listeners_on_one_module():
    model = build_once("llava")
    prompt, before, heard = inputs("llava", model), footprint(model), []
    attention, undo = model.get_decoder().layers[1].self_attn, Undo()
    for name in "ab":
        tap_attention(undo, attention, lambda *call, name=name: heard.append((name, call[1].requires_grad)))
    with torch.enable_grad():
        model(**prompt)
    undo.close()
    assert heard == [("a", False), ("b", False)]
    model(**prompt)
    assert len(heard) == 2
    assert footprint(model) == before


# ----------------------------------------------------------------------------------------------------------- memory
class Scores(Reducer):
    """Hands a score with a graph to the record."""

    stages = (-1,)

    def decide(self, view: View) -> Decision:
        return Decision(keep=view.active, scores=view.hidden.sum(2))


def reachable(root: object) -> list[object]:
    """From an object through containers and instances, but not through models, classes and functions."""
    seen, todo = {}, [root]
    while todo:
        thing = todo.pop()
        if id(thing) not in seen and not isinstance(thing, type | ModuleType | FunctionType | nn.Module):
            seen[id(thing)] = thing
            todo += gc.get_referents(thing)
    return list(seen.values())


def storages(things: list[object]) -> set[int]:
    held = [thing for thing in things if issubclass(type(thing), torch.Tensor)]
    return {tensor.untyped_storage().data_ptr() for tensor in held if tensor.numel()}


@every
def test_nothing_of_a_finished_call_stays_alive_but_its_trace(kind: str):
    """Not the pixels, not the cache, not what was read on the way."""
    model = build_once("llava")
    with torch.no_grad(), foveate.apply(model, KINDS[kind]()) as session:
        model(**inputs("llava", model))  # tables of budgets are made once, for all models
        gc.freeze()  # what is alive already is counted no more
        try:
            for call in (model, functools.partial(model.generate, max_new_tokens=3, pad_token_id=0)):
                call(**inputs("llava", model))
                gc.collect()
                assert session.trace is not None
                assert not storages(gc.get_objects()) - storages(reachable(session.trace))
        finally:
            gc.unfreeze()


def test_a_trace_holds_no_graph():
    model = build_once("llava")
    with foveate.apply(model, Scores()) as session:
        model(**inputs("llava", model))
    assert not session.trace.scores(-1).requires_grad


@torch.no_grad()
@every
@pytest.mark.parametrize(
    "family", ["llava", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llava_next", "qwen2_5_vl", "internvl"))]
)
def test_a_kept_trace_holds_no_model(family: str, kind: str):
    if kind == "in the tower" and family in ("qwen2_5_vl", "internvl"):
        pytest.skip("ToMe does not work in its tower")
    model = copy.deepcopy(build_once(family))
    with foveate.apply(model, KINDS[kind]()) as session:
        model(**inputs(family, model))
    trace, gone = session.trace, weakref.ref(model)
    del model, session
    gc.collect()
    assert gone() is None
    assert len(trace.layout.images) == 2
    assert trace.layout.known


def test_models_live_on_in_nothing():
    """Neither in the engine's own caches."""
    model: PreTrainedModel = copy.deepcopy(build_once("llava"))
    with torch.no_grad(), foveate.apply(model, foveate.SparseVLM(keep=4)):
        generate(model, inputs("llava", model), 2)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
