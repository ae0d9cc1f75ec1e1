"""VisPruner against a loop over rounds."""

from __future__ import annotations

import pytest
from torch.nn.functional import normalize

import foveate
from foveate.reducers.vispruner import VisPruner
from tests.reducers import tower


def twin(ratio: float):
    def decide(view, block: int, budget: int):
        (layer,) = view.vision
        a, alive = tower.attention(view, layer, block), tower.tokens(view, block)
        units = normalize(view.vision[layer].features[block].float(), dim=-1)
        important = tower.best(alive, a, int(budget * ratio))
        left = [j for j in alive if j not in important]
        wanted = budget - len(important)
        while len(left) > wanted:
            even, odd = left[::2], left[1::2]
            most = {i: max((float(units[i] @ units[j]) for j in odd), default=0.0) for i in even}
            gone = sorted(even, key=lambda i: -most[i])[: min(8, len(left) - wanted)]
            left = [j for j in left if j not in gone]
        return important + left, {}

    return decide


@pytest.mark.parametrize(("keep", "ratio"), [(6, 0.5), (0.5, 0.2), (3, 0.0), (5, 1)])
@pytest.mark.parametrize("name", tower.FAMILIES)
def test_vispruner(name: str, keep: int | float, ratio: float):
    trace = tower.check(name, VisPruner(keep=keep, important_ratio=ratio), twin(ratio), keep)
    if isinstance(keep, int):
        assert trace.visual_tokens[:, 0].tolist() == [keep, 2 * keep]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_next"])
def test_batch_equals_singles(name: str):
    tower.assert_batch_equals_singles(name, lambda: VisPruner(keep=0.4))


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_keeping_everything(name: str):
    tower.assert_keeping_everything_changes_nothing(name, lambda: VisPruner(keep=1.0))


@pytest.mark.parametrize("keep", range(1, 17))
def test_odd_and_small_numbers(keep: int):
    assert tower.counts("llava", VisPruner(keep=keep), batch=2) == [keep, keep]


def test_where_the_official_code_fails():
    assert tower.counts("llava", VisPruner(keep=12, faithful=True), batch=2) == [12, 12]
    with pytest.raises(foveate.UnsupportedError, match=r"VisPruner with faithful=True.*faithful=False"):
        tower.counts("llava", VisPruner(keep=6, faithful=True))


@pytest.mark.parametrize("ratio", [-0.1, 1.5, True, "half"])
def test_bad_options(ratio: object):
    with pytest.raises(foveate.OptionError, match="important_ratio="):
        VisPruner(keep=4, important_ratio=ratio)


@pytest.mark.parametrize("keep", [0, None, "x"])
def test_bad_budgets(keep: object):
    with pytest.raises(foveate.BudgetError, match="keep"):
        VisPruner(keep=keep)
