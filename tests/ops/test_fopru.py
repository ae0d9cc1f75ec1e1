"""Attention among the patches, and the choice of patches and rows, against the whole map and loops."""

from __future__ import annotations

import torch

from foveate.ops import fopru as op


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_given_and_received_are_means_of_the_map() -> None:
    query, key = draw(2, 11, 3, 4), draw(2, 11, 3, 4, seed=1)
    maps = (query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * 0.5).softmax(-1)[:, :, 1:, 1:].mean(1)
    given, received = op.given_and_received(query[:, 1:], key[:, 1:], key[:, 0], 0.5, block=4)
    torch.testing.assert_close(given, maps.mean(2))
    torch.testing.assert_close(received, maps.mean(1))
    assert torch.equal(op.significance(given, received), received)
    assert torch.equal(op.significance(received, given), received)


def test_rows() -> None:
    scores = torch.tensor([[1.0, 9, 0, 4, 4, 4, 7, 8, 0.0], [3.0, 1, 2, 0, 5, 4, 9, 9, 9]])
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 6:] = False
    kept = op.best_rows(scores, valid, torch.tensor([3, 2]), torch.tensor([5, 3]))
    # Means of the first image: 3.3, 4, 5. Of the second, in rows of two: 2, 1, 4.5.
    assert kept[0].nonzero()[:, 0].tolist() == [3, 4, 6, 7, 8]
    assert kept[1].nonzero()[:, 0].tolist() == [0, 4, 5]
    for count in range(7):
        assert (
            op.best_rows(scores, valid, torch.tensor([3, 3]), torch.tensor([count, count])).sum(1).tolist()
            == [count] * 2
        )
