"""Logits that are no numbers, row by row."""

from __future__ import annotations

import torch

from foveate.ops.logits import has_softmax


def test_what_has_a_softmax() -> None:
    inf = float("inf")
    rows = [[0.0, 1.0], [-inf, 1.0], [-inf, -inf], [inf, 0.0], [float("nan"), 0.0], [1e30, -1e30]]
    expected = [True, True, False, False, False, True]
    logits = torch.tensor(rows)
    assert has_softmax(logits).tolist() == expected
    assert has_softmax(logits.view(2, 3, 2)).tolist() == [expected[:3], expected[3:]]
    assert has_softmax(torch.tensor([0.0, inf]))[()].item() is False
