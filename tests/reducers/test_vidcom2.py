"""VidCom2 against a loop over frames, and its frame budgets."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import foveate
from foveate.ops.vidcom2 import frame_counts, frame_shares
from tests import videos
from tests.reducers import tower
from tests.reference.checks import assert_exact


def expected(view: foveate.View, keep: int) -> Tensor:
    """(B, S) bool, what goes."""
    removed = torch.zeros_like(view.visual)
    for row, items in enumerate(view.layout.images):
        for video in items:
            frames = [view.hidden[row, block.slots].double() for block in video.blocks]
            every = torch.cat(frames)
            quiet = every.var(0, unbiased=False).argsort()[: every.shape[1] // 2]
            units = [normalize(frame[:, quiet], dim=-1) for frame in frames]
            middle = torch.cat(units).mean(0)
            videoness = [[_gaussians(token, middle) for token in frame] for frame in units]
            likeness = [
                [like + _gaussians(token, frame.mean(0)) for like, token in zip(scores, frame)]
                for scores, frame in zip(videoness, units)
            ]
            odd = torch.softmax(torch.tensor([-sum(s) / len(s) for s in videoness]).double() / 0.01, 0)
            wanted = [keep / len(every) * (1 + float(p) - 1 / len(frames)) * len(f) for p, f in zip(odd, frames)]
            assert all(1 <= w <= len(frame) for w, frame in zip(wanted, frames)), "nothing to share out: the plain case"
            counts = [math.floor(w) for w in wanted]
            rest = sorted(range(len(frames)), key=lambda i: counts[i] - wanted[i])
            for frame in rest[: keep - sum(counts)]:
                counts[frame] += 1
            for block, scores, count in zip(video.blocks, likeness, counts):
                order = torch.tensor(scores).argsort()
                removed[row, block.slots[order[count:]]] = True
    return removed


def _gaussians(x: Tensor, centre: Tensor) -> float:
    apart = float((x - centre).square().sum())
    return sum(math.exp(-apart / (2 * width)) for width in (0.125, 0.25, 0.5, 1, 2))


@torch.no_grad()
@pytest.mark.parametrize(("name", "keep"), [("qwen2_vl", 7), ("llava_onevision", 6)])  # no two remainders alike
def test_it_keeps_what_is_unlike(name: str, keep: int):
    model, prompt = videos.build(name), videos.prompt(name)
    view = tower.look(model, prompt, foveate.VidCom2(keep))
    assert_exact(model, prompt, {-1: expected(view, keep)}, tower.in_place(foveate.VidCom2(keep)))


def shared(odd: list[float], share: float, size: int, total: int) -> list[int]:
    """Counts of frames of `size` tokens whose likeness to the video is such that the softmax is `odd`."""
    like = -0.01 * torch.tensor(odd).log()
    valid = torch.ones(1, len(odd), size, dtype=torch.bool)
    shares = frame_shares(like[None, :, None].expand(-1, -1, size), valid, torch.tensor([share]))
    return frame_counts(shares, valid.sum(2), torch.tensor([total]))[0].tolist()


def test_what_the_oddest_frame_cannot_hold_goes_to_the_others():
    assert shared([0.97, 0.01, 0.01, 0.01], 0.8, 10, 32) == [10, 8, 7, 7]


def test_every_frame_keeps_one_where_there_are_enough():
    assert shared([0.97, 0.01, 0.01, 0.01], 0.125, 10, 5) == [2, 1, 1, 1]
    assert shared([0.97, 0.01, 0.01, 0.01], 0.075, 10, 3) == [1, 1, 1, 0]


@pytest.mark.parametrize("seed", range(20))
def test_counts_sum_up(seed: int):
    """Any shares, frames of any size, none at all among them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 9, (5, 7), generator=generator)
    total = (torch.rand(5, generator=generator) * sizes.sum(1)).long()
    odd = (torch.randn(5, 7, generator=generator) * 3).masked_fill(sizes == 0, -torch.inf)
    shares = (total / sizes.sum(1).clamp_min(1))[:, None] * (1 + odd.softmax(1) - 1 / (sizes > 0).sum(1)[:, None])
    counts = frame_counts(shares.masked_fill(sizes == 0, 0.0), sizes, total)
    assert torch.equal(counts.sum(1), total)
    assert bool(((counts >= 0) & (counts <= sizes)).all())


@torch.no_grad()
def test_a_still_video_is_shared_out_evenly():
    model, prompt = videos.build("llava_onevision"), videos.prompt("llava_onevision", [0])
    prompt["pixel_values_videos"] = prompt["pixel_values_videos"][:, :1].repeat(1, 4, 1, 1, 1)
    with foveate.apply(model, foveate.VidCom2(8)) as session:
        model(**prompt)
    (video,) = session.trace.layout.images[0]
    assert [int(session.trace.kept(-1)[0, block.slots].sum()) for block in video.blocks] == [2, 2, 2, 2]
