"""What the defaults mend: every documented difference from the official code, on the smallest input that shows it.

Shown elsewhere: rounding (`test_fastv`, `test_fopru`), odd numbers in VisPruner (`test_vispruner`), question and text
vector (`test_recoverable`), duplicates and used-up rank (`test_before_layers`).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import foveate
from foveate.reduction import Decision, Patches, Tap, View
from tests.parity._tower import BEFORE, decide, patches


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spikes(tokens: int, count: int, seed: int = 0) -> Tensor:
    """(N,) attention without outliers, but for `count` at the places 0, 2, 4, ..."""
    values = torch.linspace(1.0, 1.5, tokens)[torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))]
    values[: 2 * count : 2] = 5.0 + torch.arange(count)
    return values


def tower(attention: Tensor, features: Tensor, key: Tensor | None = None, **cls: Tensor) -> dict[int, Patches]:
    """What PruMerge, VisionZip and the like read: attention (I, N), features (I, N, C)."""
    images, tokens = attention.shape
    read = patches(
        tokens, images, attention=attention[:, None], key=(features if key is None else key)[:, :, None],
        features=features, **cls,
    )  # fmt: skip
    return {-2: read, -1: read}


def counts(reducer: Any, vision: dict[int, Patches], features: Tensor) -> list[int]:
    return [len(left) for left in decide(reducer, vision, features)[1]]


# ---------------------------------------------------------------------------------------------------------- PruMerge
def test_prumerge_counts_outliers_image_by_image():
    attention, features = torch.stack([spikes(64, 8), spikes(64, 0, 1)]), draw(2, 64, 6)
    vision = tower(attention, features)
    assert counts(foveate.PruMerge(), vision, features) == [8, 1]
    assert counts(foveate.PruMerge(faithful=True), vision, features) == [4 + 1] * 2, "pooled, and one token more"
    assert counts(foveate.PruMerge(keep=5), vision, features) == [5, 5]
    assert counts(foveate.PruMerge(keep=5, extra=True), vision, features) == [5, 5]


def test_prumerge_merges_pruned_patches_only():
    attention, features = spikes(40, 2)[None], draw(1, 40, 6)
    key = draw(1, 40, 5, seed=1)
    key[0, 2] = key[0, 0]  # the two that stay are each other's nearest
    vision = tower(attention, features, key)
    _, (mended,) = decide(foveate.PruMerge(keep=2, neighbours=1), vision, features)
    _, (official,) = decide(foveate.PruMerge(keep=3, neighbours=1, faithful=True), vision, features)
    x, a, units = features[0], attention[0], normalize(key[0], dim=-1)
    others = (units @ units[0]).index_fill(0, torch.tensor([0, 2]), -1)
    near = int(others.argmax())
    torch.testing.assert_close(mended, torch.stack([x[0] + a[near] * x[near], x[2] + a[near] * x[near]]))
    torch.testing.assert_close(official[:2], torch.stack([x[2] + a[0] * x[0], x[0] + a[2] * x[2]]))


def test_prumerge_reads_the_models_own_heads():
    features, attention = draw(1, 30, 4), spikes(30, 3)[None]
    key, query = draw(1, 30, 8, seed=1), draw(1, 8, seed=2)
    vision = tower(attention, features, key, cls_query=query[:, None], cls_key=draw(1, 8, seed=3)[:, None])
    options = {"neighbours": 0}
    mended, _ = decide(foveate.PruMerge(keep=3, **options), vision, features)
    official, _ = decide(foveate.PruMerge(keep=4, faithful=True, **options), vision, features)
    kept = [d.keep[0, BEFORE : BEFORE + 30].nonzero()[:, 0].tolist() for d in (mended, official)]
    assert kept[0] == [0, 2, 4]
    one_head = (key[0] @ query[0]).topk(3).indices.tolist()
    assert set(one_head) <= set(kept[1])


@pytest.mark.parametrize(("tokens", "outliers"), [(96, 0), (96, 20), (100, 24), (31, 5)])
def test_prumerge_plus_serves_any_share_of_outliers(tokens: int, outliers: int):
    """None, above a sixth (the official grid then has every patch), a quarter, fewer patches than neighbours."""
    attention, features = spikes(tokens, outliers)[None], draw(1, tokens, 6)
    vision = tower(attention, features)
    expected = min(tokens, 4 * outliers) if outliers else -(-tokens // 16)
    assert counts(foveate.PruMergePlus(), vision, features) == [expected]
    for keep in (1, 7, tokens // 2, tokens):
        assert counts(foveate.PruMergePlus(keep=keep), vision, features) == [keep]
    official = foveate.PruMergePlus(faithful=True)
    if not outliers:
        with pytest.raises(foveate.UnsupportedError, match=r"0\.000"):
            decide(official, vision, features)
    elif 6 * outliers > tokens:
        assert counts(official, vision, features) == [tokens], "nothing is reduced"


def test_prumerge_plus_serves_shares_above_a_third():
    """Of the values of a real image; Tukey's fence finds no more than a quarter of them."""
    features = draw(2, 36, 4)
    vision = tower(torch.stack([spikes(36, 3), spikes(36, 6)]), features)
    assert counts(foveate.PruMergePlus(keep=0.75), vision, features) == [27, 27]
    assert counts(foveate.PruMergePlus(), vision, features) == [12, 24]
    with pytest.raises(foveate.UnsupportedError, match="2 images"):
        decide(foveate.PruMergePlus(faithful=True), vision, features)
    with pytest.raises(foveate.UnsupportedError, match="more tokens"):
        decide(foveate.PruMergePlus(keep=0.75, faithful=True), tower(spikes(36, 3)[None], features[:1]), features[:1])


# --------------------------------------------------------------------------------------------------------- VisionZip
def test_visionzip_averages_and_needs_no_cls_token():
    attention, features = spikes(49, 5)[None], draw(1, 49, 8) + 3
    cls = draw(1, 8, seed=5)
    vision = tower(attention, features, cls_features=cls, cls_key=cls[:, None])
    _, (mended,) = decide(foveate.VisionZip(keep=8, contextual=2), vision, features)
    _, (official,) = decide(foveate.VisionZip(keep=8, contextual=2, faithful=True), vision, features)
    assert len(mended) == len(official) == 8
    assert not bool((mended == cls).all(1).any())
    assert torch.equal(official[0], cls[0])
    best = attention[0].topk(6).indices.sort().values
    assert all(bool((mended == features[0, j]).all(1).any()) for j in best), "six patches stay as they are"
    assert sum(bool((official == features[0, j]).all(1).any()) for j in best) == 5, "the CLS token has one's place"
    rest = [j for j in range(49) if j not in best.tolist()]
    merged = [row for row in mended if not bool((features[0] == row).all(1).any())]
    assert len(merged) == 2
    # Means of their groups, so within the cloud of the patches; the official ones are target plus mean, twice as long.
    assert max(row.norm() for row in merged) < 1.2 * features[0, rest].mean(0).norm()
    assert min(row.norm() for row in official[6:]) > 1.6 * features[0, rest].mean(0).norm()


def test_visionzip_with_no_and_too_many_contextual_tokens():
    features = draw(1, 12, 4)
    vision = tower(spikes(12, 2)[None], features, cls_features=draw(1, 4), cls_key=draw(1, 4)[:, None])
    for contextual in (0, 5, 100):
        assert counts(foveate.VisionZip(keep=9, contextual=contextual), vision, features) == [9]
    with pytest.raises(foveate.UnsupportedError, match="contextual"):
        decide(foveate.VisionZip(keep=9, contextual=0, faithful=True), vision, features)


# --------------------------------------------------------------------------------------------------------- VisPruner
def test_vispruner_keeps_the_order_of_the_image_and_float32():
    centres = draw(20, 16)
    features = centres[torch.randint(20, (100,), generator=torch.Generator().manual_seed(1))] + 0.2 * draw(100, 16)
    features = features.bfloat16()[None]
    attention = spikes(100, 0)[None]

    def kept(given: Tensor, **options: Any) -> Tensor:
        vision = {-2: patches(100, 1, attention=attention[:, None], features=given)}
        decision, _ = decide(foveate.VisPruner(keep=20, **options), vision, features.float())
        return decision.keep[0, BEFORE : BEFORE + 100]

    assert torch.equal(kept(features), kept(features.float())), "half precision is compared in float32"
    noise = [1 + 1e-6 * draw(1, 100, 16, seed=seed) for seed in range(3)]
    assert all(torch.equal(kept(features.float() * n), kept(features)) for n in noise)
    assert not torch.equal(kept(features), kept(features, faithful=True))
    assert int(kept(features).sum()) == 20


# ---------------------------------------------------------------------------------------------------------- CDPruner
def crops(tiles: int, tokens: int, newline: bool = False) -> tuple[Tensor, Any]:
    """One row whose image has `tiles` crops of `tokens` patches, and perhaps a learnt row end: visual slots, layout."""
    length = 2 + tiles * tokens + newline + 3
    slots = 2 + torch.arange(tiles * tokens).view(tiles, tokens)
    visual = torch.zeros(1, length, dtype=torch.bool)
    visual[0, 2 : length - 3] = True
    parts = [SimpleNamespace(slots=part, grid=(1, tokens)) for part in slots]
    image = SimpleNamespace(row=0, slots=visual[0].nonzero()[:, 0], blocks=parts)
    index = torch.where(visual, 0, -1)
    return visual, SimpleNamespace(images=[[image]], image_index=index, image_counts=torch.ones(1, dtype=torch.long))


def answer(reducer: Any, visual: Tensor, layout: Any, hidden: Tensor) -> Decision:
    everything = torch.ones_like(visual)
    return reducer.decide(View(-1, hidden, everything, visual, everything, layout=layout))


def test_cdpruner_takes_all_crops_of_an_image_as_one_set():
    visual, layout = crops(2, 12)
    hidden = draw(1, visual.shape[1], 20)
    relevance = torch.where(torch.arange(visual.shape[1]) < 14, 1.0, 0.3)[None]  # the first crop is what is asked for
    options = {"keep": 10, "similarity": lambda view: relevance}
    kept = answer(foveate.CDPruner(**options), visual, layout, hidden).keep[0]
    assert int(kept[2:14].sum()) == 10
    official = answer(foveate.CDPruner(**options, faithful=True), visual, layout, hidden).keep[0]
    assert [int(official[2:14].sum()), int(official[14:26].sum())] == [5, 5]


def test_cdpruner_constant_relevance_and_row_ends():
    visual, layout = crops(1, 12, newline=True)
    hidden = draw(1, visual.shape[1], 20)
    options = {"similarity": lambda view: torch.zeros(view.active.shape)}
    kept = answer(foveate.CDPruner(keep=6, **options), visual, layout, hidden).keep[0]
    assert int(kept[2:14].sum()) == 6
    assert not bool(kept[14]), "a row end shows nothing that could be relevant"
    assert int(answer(foveate.CDPruner(keep=13, **options), visual, layout, hidden).keep[0, 2:15].sum()) == 13
    broken = answer(foveate.CDPruner(keep=6, faithful=True, **options), visual, layout, hidden).keep[0]
    assert int(broken[2:14].sum()) < 6, "NaN is chosen again and again"


# -------------------------------------------------------------------------------------------------------------- DART
def dart(reducer: Any, hidden: Tensor, key: Tensor, visual: Tensor) -> Tensor:
    reducer.prepare(SimpleNamespace(depth=4, decoder=SimpleNamespace(norm=nn.Identity())))
    slots, rows = torch.arange(visual.shape[1])[None], torch.ones(1, 1, dtype=torch.bool)
    tap = Tap(torch.zeros(1, 1, visual.shape[1]), rows, slots[:, -1:], slots, key=key)
    everything = torch.ones_like(visual)
    return reducer.decide(View(1, hidden, everything, visual, everything, tap)).keep[0]


def test_dart_keeps_its_budget_and_lets_pivots_choose_by_norm():
    slots = torch.arange(100)[None]
    visual = (slots >= 10) & (slots < 80)
    hidden, key = draw(1, 100, 12), draw(1, 3, 100, 8, seed=1)
    kept = dart(foveate.DART(30), hidden, key, visual)
    assert int(kept[visual[0]].sum()) == 30
    assert int(dart(foveate.DART(30, faithful=True), hidden, key, visual)[visual[0]].sum()) == 4 + 8 * (30 // 8)
    norm, units = key[0].abs().sum((0, 2)), normalize(hidden[0], dim=-1)
    image = sorted(range(10, 80), key=lambda j: -norm[j])[:4]
    text = sorted(range(80, 100), key=lambda j: -norm[j])[:4]
    expected, left = set(image), [j for j in range(10, 80) if j not in image]
    for pivot, share in zip([*image, *text], [4, 4, 3, 3, 3, 3, 3, 3]):  # 26 in equal parts, the first ones one more
        taken = sorted(left, key=lambda j: float(units[pivot] @ units[j]))[:share]
        expected |= set(taken)
        left = [j for j in left if j not in taken]
    assert set((kept & visual[0]).nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("keep", [1, 2, 69, 70, 1.0])
def test_dart_with_little_text_and_any_budget(keep: int | float):
    slots = torch.arange(82)[None]
    visual = (slots >= 10) & (slots < 80)
    kept = dart(foveate.DART(keep), draw(1, 82, 12), draw(1, 3, 82, 8, seed=1), visual)
    assert int(kept[visual[0]].sum()) == (keep if isinstance(keep, int) else 70)
    assert bool(kept[~visual[0]].all())


# ------------------------------------------------------------------------------------------------------- PyramidDrop
def test_pyramiddrop_scales_with_the_depth():
    def stages(depth: int, **options: Any) -> tuple[int, ...]:
        reducer = foveate.PyramidDrop(**options)
        reducer.prepare(SimpleNamespace(depth=depth, mrope=True, sliding_windows=(), decoder=None))
        return tuple(reducer.stages)

    assert stages(32) == stages(32, faithful=True) == (7, 15, 23)
    assert stages(40) == (9, 19, 29)
    assert stages(16) == (3, 7, 11)
    assert stages(40, faithful=True) == (7, 15, 23)
    assert stages(16, faithful=True) == (7,), "what is beyond the depth is left out"


# ------------------------------------------------------------------------------------------- Recoverable Compression
def test_recoverable_pools_the_rest_without_centres_and_means_are_means():
    attention, features = spikes(64, 3)[None], draw(1, 64, 6) + 4
    vision = tower(attention, features, cls_query=draw(1, 6)[:, None], cls_key=draw(1, 6, seed=1)[:, None])
    similarity = torch.zeros(1, BEFORE + 64 + 3)

    def scorer(view: View) -> Tensor:
        return similarity

    _, (mended,) = decide(foveate.Recoverable(similarity=scorer), vision, features)
    added = [row for row in mended if not bool((features[0] == row).all(1).any())]
    assert added, "the rest is there, in one token at least"
    assert all(row.norm() < 1.3 * features[0].norm(dim=-1).mean() for row in added), "a mean of patches, not a sum"
    for keep in (1, 2, 9, 64):
        assert counts(foveate.Recoverable(keep=keep, similarity=scorer), vision, features) == [keep]


# ------------------------------------------------------------------------------------------------------------ PiToMe
def test_pitome_merges_by_its_own_rule_in_every_layer():
    default, official = foveate.PiToMe(ratio=0.9).tower, foveate.PiToMe(ratio=0.9, faithful=True).tower
    assert {default.preset.rule(layer, 23) for layer in range(23)} == {"pitome"}
    assert [official.preset.rule(layer, 23) for layer in range(23)] == ["tome"] * 13 + ["pitome"] * 10
    assert (default.metric, default.place, default.weighted) == ("key", "between", True)
    assert (official.metric, official.place, official.weighted) == ("hidden", "after", False)
