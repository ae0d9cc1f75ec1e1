"""VisionZip against loops over patches; its official order on tiles."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.ops.visionzip import mosaic_order
from foveate.reducers.visionzip import VisionZip
from tests import families
from tests.reducers import tower
from tests.reference.checks import build_once


def twin(contextual: int | float):
    def decide(view, block: int, budget: int):
        (layer,) = view.vision
        a, alive = tower.attention(view, layer, block), tower.tokens(view, block)
        x, _ = tower.states(view, layer, block)
        metric = view.vision[layer].key[block].mean(1)
        count = contextual if isinstance(contextual, int) else int(budget * contextual + 0.5)
        count = min(count, max(budget - 1, 0))
        kept = tower.best(alive, a, budget - count)
        rest = [j for j in alive if j not in kept]
        targets = rest[:: max(1, len(rest) // max(count, 1))][:count]
        sources: dict[int, list[int]] = {t: [] for t in targets}
        for j in rest:
            if targets and j not in targets:
                sources[tower.nearest(metric, j, targets, 1)[0]].append(j)
        if not any(sources.values()):
            return kept + targets, {}
        return kept, {t: (s, x[[t, *s]].mean(0)) for t, s in sources.items()}

    return decide


@pytest.mark.parametrize("contextual", [0, 2, 0.4])
@pytest.mark.parametrize("name", tower.FAMILIES)
def test_visionzip(name: str, contextual: int | float):
    trace = tower.check(name, VisionZip(keep=8, contextual=contextual), twin(contextual), 8)
    assert trace.visual_tokens[:, 0].tolist() == [8, 16]


@pytest.mark.parametrize("contextual", [100, 0.99])
def test_more_contextual_tokens_than_patches(contextual: int | float):
    assert tower.counts("llava", VisionZip(keep=15, contextual=contextual), batch=2) == [15, 15]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_next"])
def test_batch_equals_singles(name: str):
    tower.assert_batch_equals_singles(name, lambda: VisionZip(keep=0.4))


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_keeping_everything(name: str):
    tower.assert_keeping_everything_changes_nothing(name, lambda: VisionZip(keep=1.0))


@torch.no_grad()
def test_official_order_of_tiles():
    """Whole image first; then all tiles' patches row by row, their CLS tokens, their contextual tokens."""
    model = build_once("llava_next")
    inputs = families.inputs("llava_next", model, batch=3)  # the third image fills 2 x 2 tiles without padding
    reducer = VisionZip(keep=40, contextual=2, faithful=True)
    view = tower.look(model, inputs, reducer)
    decision = reducer.decide(view)
    states = view.hidden[2].clone()
    real = decision.slots[2] >= 0
    states[decision.slots[2][real]] = decision.values[2][real]
    laid = states[decision.keep[2] & view.visual[2]]
    patches = view.vision[-2]
    blocks = (patches.rows == 2).nonzero()[:, 0].tolist()
    assert len(blocks) == 5
    assert bool(patches.valid[blocks].all())
    tiles, dominant = [], []
    for block in blocks:
        a, everything = tower.attention(view, -2, block), list(range(16))
        kept = sorted(tower.best(everything, a, 5))
        rest = [j for j in everything if j not in kept]
        targets = rest[:: len(rest) // 2][:2]
        x, metric = patches.features[block], patches.key[block].mean(1)
        sources: dict[int, list[int]] = {t: [] for t in targets}
        for j in rest:
            if j not in targets:
                sources[tower.nearest(metric, j, targets, 1)[0]].append(j)
        merged = [x[t] + (x[s].mean(0) if s else 0) for t, s in sources.items()]
        tiles.append(torch.stack([patches.cls_features[block], *x[kept], *merged]))
        dominant.append([0, *(j + 1 for j in kept)])
    order = mosaic_order(torch.tensor(dominant[1:]), 8, 2, 2, side=4)
    expected = torch.cat([tiles[0], torch.cat(tiles[1:])[order]])
    torch.testing.assert_close(laid, view.project(expected), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_every_patch_is_carried_by_a_token_that_stays():
    """Dominant ones by themselves, all others by one of the two contextual ones."""
    model = build_once("llava")
    inputs = families.inputs("llava", model)
    visual = families.visual_slots(inputs["input_ids"])
    with foveate.apply(model, VisionZip(keep=6, contextual=2)) as session:
        model(**inputs)
    origins, kept = session.trace.origins(-1), session.trace.kept(-1)
    for row in range(2):
        carriers, members = origins[row, visual[row]].unique(return_counts=True)
        assert carriers.tolist() == kept[row].nonzero()[:, 0].tolist()
        assert sorted(members.tolist())[:4] == [1] * 4
        assert len(carriers) == 6


def test_the_official_code_needs_a_cls_token():
    with pytest.raises(foveate.UnsupportedError, match=r"CLS token.*faithful=False"):
        tower.counts("paligemma", VisionZip(keep=8, faithful=True))
    with pytest.raises(foveate.BudgetError, match="keep=2"):
        tower.counts("llava", VisionZip(keep=2, contextual=1, faithful=True))
    with pytest.raises(foveate.UnsupportedError, match="contextual"):
        tower.counts("llava", VisionZip(keep=4, contextual=0, faithful=True))
    assert tower.counts("llava", VisionZip(keep=8, faithful=True), batch=2) == [8, 8]


@pytest.mark.parametrize("contextual", [-1, True, 1.0, "ten"])
def test_bad_options(contextual: object):
    with pytest.raises(foveate.OptionError, match="contextual="):
        VisionZip(keep=4, contextual=contextual)


@pytest.mark.parametrize("keep", [0, None, 1.5])
def test_bad_budgets(keep: object):
    with pytest.raises(foveate.BudgetError, match="keep"):
        VisionZip(keep=keep)
