"""PruMerge and PruMerge+ against loops over patches, in every kind of family."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.ops.outliers import upper_outliers
from foveate.ops.prumerge import evenly_spaced
from foveate.reducers.prumerge import PruMerge, PruMergePlus
from tests import families
from tests.reducers import tower
from tests.reference.checks import build_once
from tests.reference.renumbered import decoder_inputs, shorter_prompt


def layers(view) -> tuple[int, int]:
    """Of the features, of attention and keys."""
    return min(view.vision), max(view.vision)


def outliers(a: list[float], alive: list[int]) -> int:
    values = torch.tensor([[a[j] for j in alive]])
    return int(upper_outliers(values, torch.ones_like(values, dtype=torch.bool)))


def twin(plus: bool, neighbours: int = 32, mean: bool = False, extra: bool = False):
    def decide(view, block: int, budget: int):
        low, high = layers(view)
        a, alive = tower.attention(view, high, block), tower.tokens(view, block)
        x, _ = tower.states(view, low, block)
        key = view.vision[high].key[block].flatten(1)
        found = outliers(a, alive)
        fixed = budget >= 0
        if not fixed:
            if plus:
                budget = min(len(alive), 4 * found if found else -(-len(alive) // 16))
            else:
                budget = min(len(alive), max(found, 1))
        pooled = extra and 1 < budget < len(alive)
        wanted = budget - pooled
        kept = tower.best(alive, a, min(found, -(-wanted // 2) if fixed else wanted) if plus else wanted)
        if plus:
            others = [j for j in alive if j not in kept]
            even = evenly_spaced(torch.ones(1, len(others), dtype=torch.bool), torch.tensor([wanted - len(kept)]))[0]
            kept += [j for j, take in zip(others, even.tolist()) if take]
        pruned = [j for j in alive if j not in kept]
        groups = {}
        for c in kept if pruned else []:
            near = tower.nearest(key, c, pruned, neighbours)
            if mean:
                groups[c] = (near, tower.weighted_group(x, a, [c, *near]))
            else:
                groups[c] = (near, x[c] + sum(a[j] * x[j] for j in near))
        if pooled:
            groups[pruned[-1]] = (pruned, tower.weighted_group(x, a, pruned))
        return [c for c in kept if c not in groups], groups

    return decide


@pytest.mark.parametrize("name", tower.FAMILIES)
def test_prumerge(name: str):
    trace = tower.check(name, PruMerge(keep=6, neighbours=4), twin(False, 4), 6)
    assert trace.visual_tokens[:, 0].tolist() == [6, 12]


@pytest.mark.parametrize("name", tower.FAMILIES)
def test_prumerge_plus(name: str):
    trace = tower.check(name, PruMergePlus(keep=0.5, neighbours=4), twin(True, 4), 0.5)
    images = [[len(image.slots) for image in row] for row in trace.layout.images]
    assert trace.visual_tokens[:, 0].tolist() == [sum(round(n / 2) for n in row) for row in images]


def test_means_and_the_additional_token():
    tower.check("llava", PruMerge(keep=5, merge="mean", extra=True), twin(False, 32, True, True), 5)
    tower.check("llava", PruMerge(keep=5, merge="mean"), twin(False, 32, True), 5)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("plus", [False, True])
def test_adaptive_budgets_are_ragged(name: str, plus: bool):
    reducer = PruMergePlus() if plus else PruMerge()
    trace = tower.check(name, reducer, twin(plus), None, images=(1, 2, 1) if name != "llava_next" else (1, 1, 1))
    assert len(set(trace.visual_tokens[:, 0].tolist())) > 1


@pytest.mark.parametrize("make", [lambda: PruMerge(keep=4), PruMerge, lambda: PruMergePlus(keep=5), PruMergePlus])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_next"])
def test_batch_equals_singles(name: str, make):
    tower.assert_batch_equals_singles(name, make)


@pytest.mark.parametrize("cls", [PruMerge, PruMergePlus])
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_keeping_everything(name: str, cls):
    tower.assert_keeping_everything_changes_nothing(name, lambda: cls(keep=1.0))


@torch.no_grad()
def test_positions_are_renumbered():
    """Pruning alone equals a prompt in which the pruned tokens never were."""
    model = build_once("llava")
    inputs = families.inputs("llava", model, batch=2)
    embeddings = decoder_inputs(model, inputs)
    with foveate.apply(model, PruMerge(keep=4, neighbours=0)) as session:
        actual = model(**inputs).logits[:, -1]
    removed = families.visual_slots(inputs["input_ids"]) & ~session.trace.kept(-1)
    short, _ = shorter_prompt(embeddings, inputs["attention_mask"], {-1: removed})
    torch.testing.assert_close(model(**short).logits[:, -1], actual, atol=2e-5, rtol=0)


def test_origins_name_the_token_that_carries_a_patch():
    model = build_once("llava")
    inputs = families.inputs("llava", model, batch=2)
    with foveate.apply(model, PruMerge(keep=4)) as session, torch.no_grad():
        model(**inputs)
    origins, kept = session.trace.origins(-1), session.trace.kept(-1)
    visual = families.visual_slots(inputs["input_ids"])
    carried = origins[visual]
    assert bool((carried >= 0).all())  # 32 neighbours: everything is merged somewhere
    assert bool(kept.gather(1, origins.clamp_min(0))[visual].all())


@pytest.mark.parametrize("keep", [None, 1])
def test_the_official_crash_is_a_clear_error_and_the_default_works(keep: int | None):
    with pytest.raises(foveate.UnsupportedError, match=r"PruMerge\+ with faithful=True.*faithful=False"):
        tower.counts("llava", PruMergePlus(keep=keep, faithful=True), batch=2)
    assert all(n >= 1 for n in tower.counts("llava", PruMergePlus(), batch=2))
    assert tower.counts("llava", PruMerge(keep=5, faithful=True), batch=2) == [5, 5]
    assert tower.counts("llava", PruMerge(keep=0.25, faithful=True), batch=2) == [5, 5]  # int(16 / 4) and one more


@pytest.mark.parametrize(
    ("options", "culprit"), [({"neighbours": -1}, "neighbours=-1"), ({"merge": "max"}, "merge='max'")]
)
def test_bad_options(options: dict, culprit: str):
    with pytest.raises(foveate.OptionError, match=culprit):
        PruMerge(keep=4, **options)


@pytest.mark.parametrize("keep", [0, "abc", 1.5])
def test_bad_budgets(keep: object):
    with pytest.raises(foveate.BudgetError, match="keep"):
        PruMergePlus(keep=keep)


def test_features_without_their_image():
    model = build_once("llava")
    inputs = families.inputs("llava", model, batch=1)
    embeddings = decoder_inputs(model, inputs)
    visual = families.visual_slots(inputs["input_ids"])
    with (
        pytest.raises(foveate.UnsupportedError, match="vision tower"),
        foveate.apply(model.model.language_model, PruMerge(keep=4), visual=visual),
    ):
        model.model.language_model(inputs_embeds=embeddings)
