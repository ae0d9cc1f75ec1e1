"""Choosing tokens row by row, and lists of indices against masks."""

from __future__ import annotations

import torch

from foveate.ops import select as op
from foveate.ops.select import ranks_within, top_k_mask

MASK = torch.tensor([[True, False, True, False], [False, False, False, True]])
LISTED = [[0, 2], [3, -1]]


def test_ranks_within_groups_against_a_loop():
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        groups, eligible = torch.randint(4, (2, 17), generator=generator), torch.rand(2, 17, generator=generator) > 0.3
        scores = torch.randint(3, (2, 17), generator=generator).float()  # many ties
        ranks = ranks_within(groups, eligible, scores)
        for row in range(2):
            for slot in range(17):
                others = [s for s in range(17) if eligible[row, s] and groups[row, s] == groups[row, slot]]
                order = sorted(others, key=lambda s: (-float(scores[row, s]), s))
                assert int(ranks[row, slot]) == (order.index(slot) if eligible[row, slot] else 17)


def test_of_equal_scores_the_lower_slot_stays():
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 1.0, 2.0], [0.0] * 6, [-0.0, 0.0, -0.0, 0.0, -0.0, 0.0]])
    eligible = torch.tensor([[True] * 6, [False, True, True, True, True, True], [True] * 6])
    kept = top_k_mask(scores, eligible, torch.tensor([2, 3, 2]))
    assert [row.nonzero()[:, 0].tolist() for row in kept] == [[1, 2], [1, 2, 3], [0, 1]]
    many = torch.zeros(1, 5000)  # an unstable sort shows at this length
    assert top_k_mask(many, many == 0, 77)[0].nonzero()[:, 0].tolist() == list(range(77))


def test_the_highest_are_chosen_among_the_eligible() -> None:
    scores, eligible = torch.tensor([[1.0, 3.0, 2.0, 9.0]]), torch.tensor([[True, True, True, False]])
    assert op.ranked(scores, eligible).tolist() == [[1, 2, 0, 3]]
    assert op.ranked(torch.tensor([[1.0, 2.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool)).tolist() == [[1, 2, 0]]
    assert top_k_mask(scores, eligible, torch.tensor([2])).tolist() == [[False, True, True, False]]
    assert top_k_mask(scores, eligible, torch.tensor([7])).tolist() == eligible.tolist()
    assert op.first_k_mask(torch.tensor([[3, 0, 2, 1]]), eligible, 2).tolist() == [[True, False, False, False]]
    index, exists = op.top_k_indices(scores, eligible, 4)
    assert index[0, :3].tolist() == [1, 2, 0]
    assert exists.tolist() == [[True, True, True, False]]


def test_masks_become_lists() -> None:
    assert op.padded_indices(MASK, 2).tolist() == LISTED
    assert op.padded_indices(MASK, 1).tolist() == [[0], [3]]
    for align, exists in (("left", [True, False]), ("right", [False, True])):
        index, valid = op.true_indices(MASK, 2, align)
        assert index[0].tolist() == [0, 2]
        assert valid.tolist() == [[True, True], exists]
        assert index[1][valid[1]].tolist() == [3]
        assert not MASK[1, index[1][~valid[1]]].any(), "an invalid entry points at what is not listed"


def test_lists_become_masks() -> None:
    assert torch.equal(op.index_mask(torch.tensor(LISTED), 4), MASK)
    assert torch.equal(op.index_mask(torch.tensor([[2, 0], [4, 3]]), 4), MASK), "any order, the length as padding"
    assert op.index_mask(torch.zeros(2, 0, dtype=torch.long), 3).tolist() == [[False] * 3] * 2


def test_padding_is_put_nowhere() -> None:
    base, values = torch.full((2, 4), 7), torch.tensor([[1, 2], [3, 4]])
    assert op.put(base, torch.tensor(LISTED), values).tolist() == [[1, 7, 2, 7], [7, 7, 7, 3]]
    x, tokens = torch.arange(16.0).view(2, 4, 2), torch.full((2, 2, 2), -5.0, dtype=torch.float64)
    out = op.put_tokens(x, torch.tensor([[0, 2], [1, -1]]), tokens, 3)
    assert out.dtype == x.dtype
    expected = x.clone()
    expected[0, [0, 2]] = expected[1, 1] = -5.0
    assert torch.equal(out, expected)


def test_tokens_by_index() -> None:
    x = torch.arange(16.0).view(2, 4, 2)
    assert torch.equal(op.gather_tokens(x, torch.tensor([[2, 0], [3, -1]])), torch.stack([x[0, [2, 0]], x[1, [3, 0]]]))
    order = torch.tensor([[2, 0, 1], [0, 2, 1]])
    assert op.inverse(order).tolist() == [[1, 2, 0], [0, 2, 1]]
