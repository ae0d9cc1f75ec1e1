"""The videos of a batch, frame by frame, in one rectangular tensor; and what the methods on videos share."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.host import to_device
from ..reduction import Budget, Decision, Patches, UnsupportedError, View
from ._images import take

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["Videos", "check_takes_videos", "videos_of"]

_GIVEN = ("video_grid_thw", "pixel_values_videos", "video_features")


def check_takes_videos(anatomy: Anatomy, name: str) -> None:
    """Refuse a model into which no video can go. Raises `UnsupportedError`; `name` is the method's."""
    if not anatomy.takes_videos:
        raise UnsupportedError(
            f"{type(anatomy.model).__name__} takes no videos, and {name} leaves images alone; where the frames of a "
            "video go in as images, apply(..., visual=LongTensor (B, S)) that numbers them alike makes them one"
        )


@dataclass(frozen=True)
class Videos:
    """`V` videos of at most `T` frames (time steps of the tower) of at most `P` patches each.

    Attributes:
        view: what the method was shown.
        patches: rows (V,) and slots (V, T * P), frame after frame; -1 for padding and for tokens that are gone.
        frames: T.
        per_row: videos of a row, at most.
    """

    view: View
    patches: Patches
    frames: int
    per_row: int

    @property
    def valid(self) -> Tensor:
        """(V, T, P) bool."""
        return self.by_frame(self.patches.valid)

    @property
    def states(self) -> Tensor:
        """The visual tokens (V, T, P, D) in float32; padding repeats slot 0."""
        return self.by_frame(take(self.view.hidden, self.patches).float())

    def by_frame(self, values: Tensor) -> Tensor:
        """(V, T * P, ...) -> (V, T, P, ...)."""
        return values.unflatten(1, (self.frames, -1))

    def counts(self, budget: Budget) -> Tensor:
        """(V,) tokens of each video that may stay."""
        return budget.per_row(self.patches.valid.sum(1), most=self.patches.slots.shape[1])

    def per_slot(self, values: Tensor) -> Tensor:
        """Values (V, T, P) by slot of the prompt: (B, S), 0 where no patch of a video is."""
        return self.patches.to_slots(values.flatten(1), *self.view.active.shape)

    def keep(self, kept: Tensor) -> Tensor:
        """(B, S) bool: the patches (V, T, P) that stay, and everything that is no patch of a video."""
        shown = self.per_slot(self.valid.float()) > 0
        return self.view.active & (~shown | (self.per_slot(kept.float()) > 0))

    def decision(self, kept: Tensor, scores: Tensor) -> Decision:
        """Keep the patches `kept` (V, T, P); `scores` (V, T, P) are for the record."""
        return Decision(keep=self.keep(kept), scores=self.per_slot(torch.where(self.valid, scores, 0.0)))


def videos_of(view: View) -> Videos | None:
    """The videos of a batch; None without any.

    Raises:
        UnsupportedError: there are videos, but where their frames lie is not known, or each frame is cut into tiles.
    """
    images = [] if view.layout is None else [image for row in view.layout.images for image in row]
    found = [
        (image.row, frames) for image in images if (frames := [b.slots for b in image.blocks if b.kind == "frame"])
    ]
    if any(image.images > 1 and len(image.blocks) > image.images for image in images):
        raise UnsupportedError(
            "images that are numbered as frames of one video were cut into tiles, whose patches cannot be compared "
            "from frame to frame; give frames that the processor leaves whole"
        )
    if not found:
        guessed = view.layout is not None and view.layout.numbered and not view.layout.known
        if guessed or any(view.info.get(name) is not None for name in _GIVEN):
            raise UnsupportedError(
                "which slots of the prompt are which frame of its video is not known for this model; "
                "apply(..., visual=LongTensor (B, S)) that numbers a video's frames alike says so where text stands "
                "between them"
            )
        return None
    longest = max(len(frames) for _, frames in found)
    size = max(len(slots) for _, frames in found for slots in frames)
    table = torch.full((len(found), longest, size), -1)
    for video, (_, frames) in enumerate(found):
        for time, slots in enumerate(frames):
            table[video, time, : len(slots)] = slots
    device, row_of = view.active.device, [row for row, _ in found]
    rows, slots = to_device(row_of, device), to_device(table.flatten(1), device)
    there = (slots >= 0) & view.active[rows[:, None], slots.clamp_min(0)]
    grid = torch.zeros(len(found), 2, dtype=torch.long, device=device)
    return Videos(view, Patches(rows, torch.where(there, slots, -1), grid), longest, max(Counter(row_of).values()))
