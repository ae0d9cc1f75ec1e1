"""FoPru against attention maps and loops."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.reducers.fopru import FoPru
from tests import families
from tests.reducers import tower
from tests.reference.checks import build_once


def twin(strategy: str):
    def decide(view, block: int, budget: int):
        (layer,) = view.vision
        a, alive = tower.attention(view, layer, block), tower.tokens(view, block)
        if strategy == "rank":
            return tower.best(alive, a, budget), {}
        width = int(view.vision[layer].grid[block, 1])
        rows = {row: [j for j in alive if j // width == row] for row in {j // width for j in alive}}
        mean = {row: sum(a[j] for j in part) / len(part) for row, part in rows.items()}
        kept: list[int] = []
        for row in sorted(rows, key=lambda row: -mean[row]):
            kept += tower.best(rows[row], a, budget - len(kept))
        return kept, {}

    return decide


@pytest.mark.parametrize("strategy", ["rank", "row"])
@pytest.mark.parametrize("keep", [7, 0.4])
@pytest.mark.parametrize("name", tower.FAMILIES)
def test_fopru(name: str, strategy: str, keep: int | float):
    trace = tower.check(name, FoPru(keep=keep, strategy=strategy), twin(strategy), keep)
    if isinstance(keep, int):
        assert trace.visual_tokens[:, 0].tolist() == [keep, 2 * keep]


@torch.no_grad()
@pytest.mark.parametrize("faithful", [False, True])
def test_significance_is_read_off_the_whole_map(faithful: bool):
    """The map as the unpatched tower returns it; the third party leaves the CLS token out of rows and columns."""
    model = build_once("llava", "eager")
    inputs = families.inputs("llava", model, batch=2)
    maps = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[-2].mean(1)
    expected = maps[:, 1:, 1:].mean(1) if faithful else maps[:, :, 1:].mean(1)
    if faithful:
        assert bool((expected.var(1) > maps[:, 1:, 1:].mean(2).var(1)).all())
    with foveate.apply(model, FoPru(keep=4, faithful=faithful)) as session:
        model(**inputs)
    visual = families.visual_slots(inputs["input_ids"])
    torch.testing.assert_close(session.trace.scores(-1)[visual].view(2, 16), expected, atol=1e-6, rtol=1e-4)
    top = expected.topk(4, dim=1).indices.sort(1).values
    kept = session.trace.kept(-1)[visual].view(2, 16)
    assert torch.equal(kept.nonzero()[:, 1].view(2, 4), top)


@pytest.mark.parametrize("strategy", ["rank", "row"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_next"])
def test_batch_equals_singles(name: str, strategy: str):
    tower.assert_batch_equals_singles(name, lambda: FoPru(keep=0.4, strategy=strategy))


@pytest.mark.parametrize("strategy", ["rank", "row"])
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_keeping_everything(name: str, strategy: str):
    tower.assert_keeping_everything_changes_nothing(name, lambda: FoPru(keep=1.0, strategy=strategy))


def test_the_third_party_rounds_down():
    assert tower.counts("llava", FoPru(keep=0.36, faithful=True)) == [5, 5]  # 5.76
    assert tower.counts("llava", FoPru(keep=0.6, strategy="row", faithful=True)) == [8, 8]  # 2.4 rows of 4
    assert tower.counts("llava", FoPru(keep=9, strategy="row")) == [9, 9]
    assert tower.counts("llava", FoPru(keep=9, strategy="row", faithful=True)) == [8, 8]


def test_bad_options():
    with pytest.raises(foveate.OptionError, match="strategy='column'"):
        FoPru(keep=4, strategy="column")
    with pytest.raises(foveate.BudgetError, match="keep"):
        FoPru(keep=-1)
