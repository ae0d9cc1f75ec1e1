"""EVS against a loop over frames."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import foveate
from tests.engine.test_usage import _video_prompt
from tests.reducers import tower
from tests.reference.checks import assert_exact, build_once


def expected(view: foveate.View, share: float) -> Tensor:
    """(B, S) bool, what goes."""
    removed = torch.zeros_like(view.visual)
    for row, videos in enumerate(view.layout.images):
        for video in videos:
            frames = [block.slots.tolist() for block in video.blocks]
            change = {slot: (0.0, slot) for slot in frames[0]}
            for before, now in itertools.pairwise(frames):
                for a, b in zip(before, now):
                    x, y = (normalize(view.hidden[row, slot], dim=0) for slot in (a, b))
                    change[b] = (float(x @ y), b)
            order = sorted(change, key=change.__getitem__)
            count = max(len(frames[0]), round(share * len(order)))
            removed[row, order[count:]] = True
    return removed


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("keep", [0.7, 0.1])
def test_it_keeps_what_changed(name: str, keep: float):
    model, prompt = build_once(name), _video_prompt(name)
    view = tower.look(model, prompt, foveate.EVS(keep))
    trace = assert_exact(model, prompt, {-1: expected(view, keep)}, foveate.EVS(keep))
    assert trace.visual_tokens[:, 0].tolist() == [max(6, round(12 * keep)), max(4, round(12 * keep))]


def test_rounding_errors_are_no_change():
    """A still picture: the default keeps the first frames, the code what rounding says."""
    model, prompt = build_once("qwen2_vl"), _video_prompt("qwen2_vl")
    view: Any = tower.look(model, prompt, foveate.EVS(0.7))
    for row, videos in enumerate(view.layout.images):
        first, *others = videos[0].blocks
        for number, block in enumerate(others):
            noise = 1 + 1e-7 * torch.randn(1, generator=torch.Generator().manual_seed(number))
            view.hidden[row, block.slots] = view.hidden[row, first.slots] * noise
    kept = foveate.EVS(keep=8).decide(view).keep & view.visual
    for row, slots in enumerate(kept):
        assert slots.nonzero()[:, 0].tolist() == view.visual[row].nonzero()[:8, 0].tolist()
