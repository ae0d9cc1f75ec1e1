"""Where merged tokens go, on two rows that can be followed by eye."""

from __future__ import annotations

import torch

from foveate.ops.recycle import Merged, official_order, slot_order

# Row 0: slots 1 to 6 are visual, 2 and 5 stay, 4, 1 and 6 merge into two tokens centred at 6 and 1.
# Row 1: only 3 stays, 2 and 4 merge into one.
CHOSEN = torch.tensor([[0, 0, 1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0]]).bool()
HIDDEN = torch.arange(16.0).view(2, 8, 1).expand(2, 8, 3).clone()
MERGED = Merged(
    slots=torch.tensor([[4, 1, 6], [2, 4, -1]]),
    number=torch.tensor([[0, 1, 0], [0, 0, 0]]),
    centres=torch.tensor([[6, 1], [4, -1]]),
    states=torch.tensor([[[100.0] * 3, [101.0] * 3], [[102.0] * 3, [0.0] * 3]]),
)


def laid(keep: torch.Tensor, slots: torch.Tensor, values: torch.Tensor) -> list[list[float]]:
    frame = HIDDEN.clone()
    for row in range(2):
        for slot, value in zip(slots[row], values[row]):
            if slot >= 0:
                frame[row, slot] = value
    return [frame[row, keep[row], 0].tolist() for row in range(2)]


def test_in_the_slots_of_the_centres():
    keep, slots, values, origin = slot_order(CHOSEN, MERGED)
    assert [row.nonzero()[:, 0].tolist() for row in keep] == [[1, 2, 5, 6], [3, 4]]
    assert laid(keep, slots, values) == [[101.0, 2.0, 5.0, 100.0], [11.0, 102.0]]
    assert origin.tolist() == [[-1, 1, 2, -1, 6, 5, 6, -1], [-1, -1, 4, 3, 4, -1, -1, -1]]


def test_in_the_official_order():
    keep, slots, values, origin = official_order(HIDDEN, CHOSEN, MERGED)
    assert [row.nonzero()[:, 0].tolist() for row in keep] == [[1, 2, 5, 6], [3, 4]]
    assert slots.tolist() == [[1, 2, 5, 6], [3, 4, -1, -1]]
    assert laid(keep, slots, values) == [[2.0, 5.0, 100.0, 101.0], [11.0, 102.0]]
    assert origin.tolist() == [[-1, 6, 1, -1, 5, 2, 5, -1], [-1, -1, 4, 3, 4, -1, -1, -1]]
