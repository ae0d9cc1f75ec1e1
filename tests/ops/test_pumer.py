"""PuMer's mathematics against its token-by-token twin, and the batch against its rows."""

from __future__ import annotations

import pytest
import torch
from tests.reference.pumer import image_groups, pooled, text_groups

from foveate.ops.bipartite import soft_matching
from foveate.ops.pumer import (
    Reduction,
    attention_scores,
    key_scores,
    masked_softmax,
    reduce_image,
    reduce_text,
    token_counts,
)

SETTINGS = [(0.1, 0.3), (0.3, 0.5), (0.0, 0.4), (0.4, 0.0), (0.9, 0.9)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("style", ["tome", "tip", "diff"])
@pytest.mark.parametrize(("prune", "merge"), SETTINGS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 12, 37])
def test_image_tokens_go_where_the_twin_says(tokens: int, prune: float, merge: float, style: str) -> None:
    scores, key, x = random(2, tokens), random(2, tokens, 4, seed=1), random(2, tokens, 6, seed=2)
    reduction = reduce_image(scores, key, torch.ones(2, tokens, dtype=torch.bool), prune, merge, style)
    assert bool(reduction.mask.all())
    for row in range(2):
        groups, average = image_groups(scores[row], key[row], prune, merge, style)
        assert torch.allclose(reduction.apply(x)[row], pooled(x[row], groups, average), atol=1e-6)


@pytest.mark.parametrize("merge", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("words", [3, 4, 5, 16])
def test_words_go_where_the_twin_says(words: int, merge: float) -> None:
    key, x = random(2, words, 4), random(2, words, 6, seed=1)
    reduction = reduce_text(key, torch.ones(2, words), merge)
    for row in range(2):
        assert torch.allclose(reduction.apply(x)[row], pooled(x[row], text_groups(key[row], merge)), atol=1e-6)


@pytest.mark.parametrize("style", ["tome", "tip", "diff"])
def test_a_padded_row_is_reduced_as_alone(style: str) -> None:
    lengths, tokens = [20, 7, 1, 13], 20
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    scores, key, x = random(4, tokens), random(4, tokens, 4, seed=1), random(4, tokens, 6, seed=2)
    together = reduce_image(scores, key, mask, 0.2, 0.3, style)
    text = reduce_text(key, mask.float(), 0.4)
    for row, n in enumerate(lengths):
        single = slice(row, row + 1), slice(0, n)
        alone = reduce_image(scores[single], key[single], mask[single], 0.2, 0.3, style)
        left = int(together.mask[row].sum())
        assert left == alone.length
        assert torch.allclose(together.apply(x)[row, :left], alone.apply(x[single])[0], atol=1e-6)
        words = reduce_text(key[single], mask[single].float(), 0.4)
        expected = x[single][0] if words is None else words.apply(x[single])[0]
        assert torch.allclose(text.apply(x)[row, : len(expected)], expected, atol=1e-6)
        assert text.mask[row].tolist() == [True] * len(expected) + [False] * (text.length - len(expected))


def test_left_padding_of_text_is_cut_off_too() -> None:
    key, x = random(1, 9, 4), random(1, 9, 6, seed=1)
    padded = reduce_text(key, (torch.arange(9) >= 3)[None], 0.4)
    alone = reduce_text(key[:, 3:], torch.ones(1, 6), 0.4)
    assert torch.equal(padded.apply(x), alone.apply(x[:, 3:]))


def test_nothing_to_merge() -> None:
    assert reduce_text(random(1, 9, 4), torch.ones(1, 9), 0.05) is None
    assert reduce_text(random(2, 9, 4), torch.zeros(2, 9), 0.5) is None


@pytest.mark.parametrize("tokens", [8, 37])
def test_the_official_matching_is_the_shared_one(tokens: int) -> None:
    key, x = random(2, tokens, 4), random(2, tokens, 6, seed=1)
    ours = reduce_text(key, torch.ones(2, tokens), 0.3, count_padding=True)
    theirs = soft_matching(key, round(0.3 * tokens), class_token=True)
    assert torch.allclose(ours.apply(x), theirs.mean(x)[0], atol=1e-6)
    assert torch.equal(ours.origin(), theirs.index)


@pytest.mark.parametrize("tokens", [8, 9])
def test_the_official_merge_by_score_takes_half_of_the_tokens_at_most(tokens: int) -> None:
    scores, key, mask = random(1, tokens), random(1, tokens, 4), torch.ones(1, tokens, dtype=torch.bool)
    assert reduce_image(scores, key, mask, 0.0, 0.9, "diff", protect_class=False).length == tokens - tokens // 2
    assert reduce_image(scores, key, mask, 0.0, 0.9, "diff").length == tokens - (tokens - 1) // 2


def test_two_reductions_are_one() -> None:
    scores, x = random(2, 30), random(2, 30, 6, seed=1)
    first = reduce_image(scores, random(2, 30, 4, seed=2), torch.ones(2, 30, dtype=torch.bool), 0.2, 0.3)
    second = reduce_image(random(2, first.length), random(2, first.length, 4, seed=3), first.mask, 0.1, 0.4)
    both = first.then(second)
    assert torch.allclose(both.apply(x), second.apply(first.apply(x)), atol=1e-6)
    dropped = (both.weight == 0).sum(1)
    assert bool((dropped > (first.weight == 0).sum(1)).all())
    assert torch.equal(both.origin()[:, 0], torch.zeros(2, dtype=torch.long)), "class token"


def test_half_precision_and_gradients() -> None:
    place, weight = torch.tensor([[0, 1, 1, 0]]), torch.tensor([[1.0, 0.5, 0.5, 0.0]])
    reduction = Reduction(place, weight, torch.ones(1, 2, dtype=torch.bool))
    x = random(1, 4, 3).bfloat16().requires_grad_()
    out = reduction.apply(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad[0, :, 0].tolist() == [1.0, 0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("tokens", "prune", "merge", "left"),
    [
        (145, 0.1, 0.3, [87, 52, 31, 19]),
        (577, 0.2, 0.2, [347, 209, 125, 75]),
        (577, 0.3, 0.5, [203, 72, 26, 10]),
        (325, 0.3, 0.5, [114, 41, 15]),
    ],
)
def test_token_counts_of_the_released_models(tokens: int, prune: float, merge: float, left: list[int]) -> None:
    for expected in left:
        kept, merged = token_counts(tokens, prune, merge)
        tokens = kept - merged
        assert tokens == expected


def test_scores_count_what_they_should() -> None:
    rows = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    counted = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]])
    scores = attention_scores(rows, counted, counted.sum(1))
    assert torch.allclose(scores[0], rows[0].mean(0).mean(0))
    assert torch.allclose(scores[1], rows[1, :, :2].mean(0).mean(0))
    text, image = random(2, 4, 3), random(2, 5, 3, seed=1)
    by_keys = key_scores(text, image, counted, counted.sum(1))
    assert torch.allclose(by_keys[1], image[1] @ text[1, :2].mean(0), atol=1e-6)


def test_official_softmax_sees_itself_and_fractions() -> None:
    mask = torch.tensor([[1.0, 0.5, 0.0]])
    weights = masked_softmax(torch.zeros(1, 1, 3, 3), mask)[0, 0]
    assert torch.allclose(weights[0], torch.tensor([1 / 1.5, 0.5 / 1.5, 0.0]), atol=1e-5)
    assert torch.allclose(weights[2], torch.tensor([1 / 2.5, 0.5 / 2.5, 1 / 2.5]), atol=1e-5)
    assert bool((weights > 0).all()), "eps / N for every key"
