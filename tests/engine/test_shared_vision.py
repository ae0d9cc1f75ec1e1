"""One pass of the vision tower for several methods changes no answer and leaves nothing behind."""

import functools

import pytest
import torch
from tests.families import inputs as family_inputs
from tests.reference.checks import build_once, footprint

import foveate
from foveate.engine.vision.shared import SharedVision, _same, shareable
from foveate.evaluate.answer import answer, load
from foveate.evaluate.data import load as data
from foveate.evaluate.runner import Runner
from foveate.recipe import Recipe


@pytest.fixture(scope="module")
def vlm():
    return load("zoo:tiny-llava")


def test_what_is_the_same():
    numbers = torch.arange(3)
    assert _same([numbers, {"a": 1}], [numbers.clone(), {"a": 1}])
    others = ([numbers], [numbers, {"a": 1}, None], (numbers, {"a": 1}), [numbers + 1, {"a": 1}], [numbers, {"b": 1}],
              [numbers.int(), {"a": 1}], [numbers, {"a": 1.0}], [numbers, {"a": 1, "b": 1}])  # fmt: skip
    for other in others:
        assert not _same([numbers, {"a": 1}], other)
        assert not _same(other, [numbers, {"a": 1}])


def test_who_may_share(vlm):
    chain = foveate.Chain(foveate.VisionZip(keep=0.5), foveate.VTW(layer=4))
    alone = [foveate.build(name, keep=0.5) for name in ("visionzip", "downsample", "tome", "prumerge")]
    for reducer, may in [(r, False) for r in (*alone, chain)] + [
        (foveate.FastV(keep=4), True),
        (foveate.Random(4), True),
    ]:
        with foveate.apply(vlm.model, reducer) as session:
            assert shareable(session.reducer) is may, reducer
    assert shareable(None)


@pytest.mark.slow
def test_answers_are_the_same_with_and_without(vlm, monkeypatch):
    samples = data("scenes", 8) + data("easy-vqa", 4)
    recipes = [Recipe(name, {}, 0.2) for name in ("averagepool", "visionzip", "sparsevlm", "downsample", "tome")]
    passes = []
    tower = vlm.model.model.vision_tower
    inner = type(tower).forward

    @functools.wraps(inner)
    def counted(*args, **kwargs):
        passes.append(1)
        return inner(*args, **kwargs)

    monkeypatch.setattr(type(tower), "forward", counted)
    found, counts = [], []
    for share in (True, False):
        runner = Runner(vlm, samples, ["exact"] * 12, recipes, batch_size=4, share_vision=share)
        passes.clear()
        found.append([r for g in runner.groups for rs in runner.ask(runner.batch(g), range(6)) for r in rs])
        counts.append(len(passes) / len(runner.groups))
    assert found[0] == found[1]  # to the last bit: KL, too
    assert counts == [4, 6]  # full, averagepool and sparsevlm share one
    assert "forward" not in tower.__dict__


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "idefics3"])
def test_other_families_give_the_same_logits(family):
    model = build_once(family)
    before, given = footprint(model), family_inputs(family, model)
    with torch.no_grad(), foveate.apply(model, foveate.DivPrune(keep=0.5)):
        alone = model(**given).logits
    shared = SharedVision(model)
    with torch.no_grad(), shared.serving():
        model(**given)
    assert footprint(model) == before
    with torch.no_grad():
        for _ in range(2):
            with foveate.apply(model, foveate.DivPrune(keep=0.5)), shared.serving():
                assert torch.equal(model(**given).logits, alone)
    assert len(shared.seen) == 1
    assert footprint(model) == before


def test_another_batch_is_seen_anew(vlm):
    one, two = (vlm.inputs([sample]) for sample in data("scenes", 6)[::5])
    with SharedVision(vlm.model).serving():
        first, second = answer(vlm, one), answer(vlm, two)
    assert torch.equal(second.log_probs, answer(vlm, two).log_probs)
    assert not torch.equal(first.log_probs, second.log_probs)
