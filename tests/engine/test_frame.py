"""The frame of a ragged batch: fillers run, and write nothing back."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.engine.decoder.frame import ActiveSet, put_rows, take_rope, take_rows

KEEP = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
FRAME = torch.arange(3 * 5 * 2.0).view(3, 5, 2)


def test_rows_come_back_to_their_slots_and_fillers_nowhere():
    active = ActiveSet.of(KEEP.numpy(), KEEP.device)
    assert active.size == 4
    rows = take_rows(FRAME, active)
    assert torch.equal(rows[1], FRAME[1, :4]), "in order"
    assert torch.equal(rows[2, -1], FRAME[2, 4]), "at the right"
    new = put_rows(FRAME, active, -rows - 1)
    assert torch.equal(new, torch.where(KEEP[..., None], -FRAME - 1, FRAME))


def test_rotations_follow_the_slots_whether_rows_share_them_or_not():
    active = ActiveSet.of(KEEP.numpy(), KEEP.device)
    shared, own = take_rope((FRAME[:1], FRAME), active.index, 5)
    assert torch.equal(own, take_rows(FRAME, active))
    assert torch.equal(shared, take_rows(FRAME[:1].expand(3, -1, -1), active))
    with pytest.raises(foveate.UnsupportedError, match=r"position embeddings of shape \(3, 3, 5, 2\)"):
        take_rope(FRAME.expand(3, -1, -1, -1), active.index, 5)
