"""DyCoke against a loop over windows of four frames."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import foveate
from tests import videos
from tests.parity._video import kept_of_video, video_view
from tests.reducers import tower
from tests.reference.checks import assert_exact


def expected(view: foveate.View, counts: list[list[int]]) -> Tensor:
    """(B, S) bool, what goes if the frames of each row's video keep as many as `counts` says."""
    removed = torch.zeros_like(view.visual)
    for row, items in enumerate(view.layout.images):
        for video in items:
            frames = [block.slots for block in video.blocks]
            for start in range(0, len(frames), 4):
                for now, before in ((1, 0), (2, 0), (3, 2)):
                    if start + now < len(frames):
                        a, b = frames[start + now], frames[start + before]
                        alike = cosine_similarity(view.hidden[row, a].double(), view.hidden[row, b].double(), dim=1)
                        removed[row, a[alike.argsort()[counts[row][start + now] :]]] = True
    return removed


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "method", "counts"),
    [
        ("qwen2_vl", foveate.DyCoke(), [[0, 1], [0, 1, 1]]),  # frames of 6 and of 4
        ("qwen2_vl", foveate.DyCoke(merging_ratio=0.5), [[0, 3], [0, 2, 2]]),
        ("llava_onevision", foveate.DyCoke(keep=9), [[0, 2, 2, 1]] * 2),
        ("llava_onevision", foveate.DyCoke(keep=0.75), [[0, 3, 3, 2]] * 2),
    ],
)
def test_it_keeps_what_differs(name: str, method: Any, counts: list[list[int]]):
    model, prompt = videos.build(name), videos.prompt(name)
    view = tower.look(model, prompt, method)
    assert_exact(model, prompt, {-1: expected(view, counts)}, tower.in_place(method))


def kept_per_frame(frames: int, patches: int, method: Any) -> list[int]:
    view = video_view(torch.randn(frames, patches, 16, generator=torch.Generator().manual_seed(frames)))
    kept = kept_of_video(view, method.decide(view).keep)
    return (kept // patches).bincount(minlength=frames).tolist()


@pytest.mark.parametrize("frames", range(1, 10))
def test_every_window_is_treated_alike(frames: int):
    assert kept_per_frame(frames, 10, foveate.DyCoke()) == ([10, 3, 3, 3] * 3)[:frames]


def test_the_first_frame_of_a_window_stays_whatever_the_budget():
    assert kept_per_frame(5, 10, foveate.DyCoke(keep=3)) == [10, 0, 0, 0, 10]
    assert kept_per_frame(5, 10, foveate.DyCoke(keep=0.5)) == [10, 2, 2, 1, 10]
    assert kept_per_frame(5, 10, foveate.DyCoke(keep=48)) == [10, 10, 9, 9, 10]


def test_the_official_frames():
    """An odd last frame is lost, the third of the last window whole, few frames fail."""
    assert kept_per_frame(9, 10, foveate.DyCoke(faithful=True)) == [10, 3, 3, 3, 10, 3, 3, 3, 0]
    assert kept_per_frame(8, 10, foveate.DyCoke(faithful=True)) == [10, 3, 3, 3, 10, 3, 10, 3]
    assert kept_per_frame(8, 10, foveate.DyCoke(keep=44, faithful=True)) == [10, 2, 2, 2, 10, 2, 10, 2]
    with pytest.raises(foveate.UnsupportedError, match="fewer than five frames"):
        kept_per_frame(4, 10, foveate.DyCoke(faithful=True))


def test_of_a_still_video_the_first_patches_stay():
    """Rounding errors decide nothing."""
    frame = torch.randn(1, 10, 16, generator=torch.Generator().manual_seed(0))
    noise = 1 + 1e-7 * torch.randn(4, 10, 16, generator=torch.Generator().manual_seed(1))
    view = video_view(frame * noise)
    kept = kept_of_video(view, foveate.DyCoke().decide(view).keep)
    assert kept.tolist() == [*range(10), *(10 * t + p for t in (1, 2, 3) for p in (0, 1, 2))]


@pytest.mark.parametrize("ratio", [1.0, -0.1, True, "half"])
def test_bad_ratios(ratio: object):
    with pytest.raises(foveate.OptionError, match="merging_ratio"):
        foveate.DyCoke(merging_ratio=ratio)
