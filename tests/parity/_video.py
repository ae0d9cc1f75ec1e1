"""A prompt around one video, as methods are shown it, from nothing but its features."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from foveate.reduction import View

BEFORE, AFTER = 4, 6


def video_view(features: Tensor, row_ends: int = 0) -> View:
    """A view of a video (T, P, D) between a few tokens of text.

    Args:
        features: frame by frame.
        row_ends: a slot that shows no patch follows every so many patches; 0: none.
    """
    frames, patches = features.shape[:2]
    ends = patches // row_ends if row_ends else 0
    place = torch.arange(patches) + (torch.arange(patches) // row_ends if row_ends else 0)
    slots = BEFORE + torch.arange(frames)[:, None] * (patches + ends) + place
    length = BEFORE + frames * (patches + ends) + AFTER
    visual = torch.zeros(1, length, dtype=torch.bool)
    visual[0, BEFORE : length - AFTER] = True
    hidden = torch.zeros(1, length, features.shape[2])
    hidden[0, slots.flatten()] = features.flatten(0, 1)
    video = SimpleNamespace(row=0, images=1, blocks=[SimpleNamespace(kind="frame", slots=part) for part in slots])
    everything = torch.ones_like(visual)
    layout = SimpleNamespace(
        images=[[video]], image_index=torch.where(visual, 0, -1), image_counts=torch.ones(1).long()
    )
    return View(-1, hidden, everything, visual, everything, layout=layout)


def kept_of_video(view: View, keep: Tensor) -> Tensor:
    """Ascending indices, among the slots of the video, of what stays; the text must."""
    assert bool(keep[~view.visual].all())
    return keep[view.visual].nonzero()[:, 0]
