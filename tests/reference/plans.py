"""Reducers whose decisions are fixed beforehand, so that a reference can be told the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.reduction import Decision, Reducer, TapSpec, View
from tests.families import visual_slots
from tests.reference.masked import to_rows

__all__ = ["Fixed", "KeepAll", "TopOfLast", "Watch", "all_removed", "draw_removed"]


def draw_removed(input_ids: Tensor, counts: Mapping[int, Sequence[int]], seed: int = 0) -> dict[int, Tensor]:
    """Draw which visual tokens go at which stage.

    Args:
        input_ids: (B, S).
        counts: {stage: visual tokens left in each row}.
        seed: of the draw.

    Returns:
        {stage: (B, S) bool, removed at that stage}.
    """
    generator = torch.Generator().manual_seed(seed)
    left, removed = visual_slots(input_ids), {}
    for stage in sorted(counts):
        gone = torch.zeros_like(left)
        for row, n_left in enumerate(counts[stage]):
            slots = left[row].nonzero()[:, 0]
            gone[row, slots[torch.randperm(len(slots), generator=generator)[n_left:]]] = True
        removed[stage], left = gone, left & ~gone
    return removed


def all_removed(removed: Mapping[int, Tensor], until: int = 10**6) -> Tensor:
    """(B, S) bool: everything removed by the stages up to `until`."""
    gone = torch.zeros_like(next(iter(removed.values())))
    for stage, mask in removed.items():
        if stage <= until:
            gone = gone | mask
    return gone


def _fit(removed: Tensor, view: View) -> Tensor:
    """To the rows (beams) and the slots (tokens generated without a cache) of a view."""
    return pad(to_rows(removed, view.visual.shape[0]), (0, view.visual.shape[1] - removed.shape[1]))


class Fixed(Reducer):
    """Removes given slots, optionally after overwriting some: `merge` = {stage: view -> (slots, values)}."""

    def __init__(
        self,
        removed: Mapping[int, Tensor],
        positions: str = "keep",
        merge: Mapping[int, Callable[[Tensor], tuple[Tensor, Tensor]]] | None = None,
    ):
        self.removed, self.positions, self.merge = removed, positions, merge or {}
        self.stages = sorted(removed)

    def decide(self, view: View) -> Decision:
        decision = Decision(keep=~_fit(self.removed[view.stage], view))
        if view.stage in self.merge:
            decision.slots, decision.values = self.merge[view.stage](view.hidden)
        return decision


class Watch(Fixed):
    """`Fixed` that also reads attention and remembers every view it was shown."""

    def __init__(self, removed: Mapping[int, Tensor], taps: Mapping[int, TapSpec] | None = None):
        super().__init__(removed)
        self.taps = taps or {}
        self.views: list[View] = []

    def decide(self, view: View) -> Decision:
        self.views.append(view)
        return super().decide(view)


class KeepAll(Reducer):
    """Looks everywhere and removes nothing."""

    stages = (-1, 1, 3)
    taps = {1: TapSpec("text_after"), 3: TapSpec("last")}  # noqa: RUF012

    def decide(self, view: View) -> Decision:
        return Decision(keep=view.active)


class TopOfLast(Reducer):
    """Keeps the `keep` visual tokens of each row that the last prompt token attends to most: a decision that adapts."""

    stages = (1,)
    taps = {1: TapSpec("last")}  # noqa: RUF012

    def __init__(self, keep: int):
        self.keep = keep
        self.views: list[View] = []

    def decide(self, view: View) -> Decision:
        self.views.append(view)
        scores = view.tap.per_slot(view.visual.shape[1]).masked_fill(~view.active_visual, -1.0)
        best = torch.zeros_like(view.visual).scatter(1, scores.topk(self.keep, dim=1).indices, True)
        return Decision(~view.visual | best, scores=scores)
