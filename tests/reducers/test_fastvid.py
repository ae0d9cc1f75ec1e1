"""FastVID against loops over segments, frames and tokens that follow the formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import foveate
from foveate.ops.fastvid import anchor_counts, cut_segments
from foveate.reducers._videos import videos_of
from tests import videos
from tests.parity._video import BEFORE, kept_of_video, video_view
from tests.reducers import tower


def twin(frames: Tensor, attention: Tensor, method: Any, keep: int) -> dict[int, Tensor]:
    """{place: value} of what stays of (T, P, D) with attention (T, P)."""
    number, patches, width = frames.shape
    features = frames.mean(1)
    alike = [float(cosine_similarity(features[t], features[t + 1], dim=0)) for t in range(number - 1)]
    least = sorted(range(number - 1), key=lambda t: alike[t])[: method.segments - 1]
    runs, first = [], 0
    for t in range(number):
        if t == number - 1 or t in least or alike[t] < method.threshold:
            runs.append(range(first, t + 1))
            first = t + 1

    share = [keep // number + (t < keep % number) for t in range(number)]
    context = [int(n * method.context) for n in share]
    salient = [set(attention[t].argsort(descending=True)[: share[t] - context[t]].tolist()) for t in range(number)]
    rest = [[p for p in range(patches) if p not in salient[t]] for t in range(number)]
    anchors: dict[int, list[int]] = {}
    for run in runs:
        holders = [t for t in run if (run[-1] - t) % method.stride == 0]
        each = sum(context[t] for t in run) // len(holders)
        for t in holders:
            anchors[t] = peaks(frames[t], rest[t], width)[:each]
    stays = {(t, p) for t in range(number) for p in (*salient[t], *anchors.get(t, []))}
    free = sorted(((t, p) for t in range(number) for p in range(patches)), key=lambda at: -float(attention[at]))
    extra = set([at for at in free if at not in stays][: keep - len(stays)])

    values = {t * patches + p: frames[t, p] for t, p in stays | extra}
    for run in runs:
        for t in (t for t in run if anchors.get(t)):
            members = [(s, p) for s in run for p in rest[s] if (s, p) not in extra]
            into: dict[int, list[Tensor]] = {p: [] for p in anchors[t]}
            for s, p in members:
                near = max(anchors[t], key=lambda a: float(cosine_similarity(frames[t, a], frames[s, p], dim=0)))
                into[near].append(frames[s, p])
            for p, group in into.items():
                w = max(1 / (len(group) + 1), method.weight)
                values[t * patches + p] = w * frames[t, p] + (1 - w) * torch.stack(group).mean(0)
    return values


def peaks(frame: Tensor, rest: list[int], width: int) -> list[int]:
    """Patches of `rest` by falling density times distance to a denser one."""
    apart = {(i, j): float((frame[i] - frame[j]).norm()) / math.sqrt(width) for i in rest for j in rest}
    density = {i: math.exp(-sum(sorted(apart[i, j] ** 2 for j in rest)[:4]) / 4) for i in rest}
    score = {}
    for i in rest:
        denser = [apart[i, j] for j in rest if density[j] > density[i]]
        score[i] = density[i] * (min(denser) if denser else max(apart.values()))
    return sorted(rest, key=lambda i: -score[i])


def scenes(sizes: list[int], patches: int, seed: int) -> Tensor:
    """Frames that differ little within a scene and much between scenes: (T, P, 16)."""
    generator = torch.Generator().manual_seed(seed)
    offset = [3 * torch.randn(16, generator=generator) for _ in sizes]
    scene = [torch.randn(patches, 16, generator=generator) + o for o in offset]
    near = [[s + 0.3 * torch.randn(patches, 16, generator=generator) for _ in range(n)] for s, n in zip(scene, sizes)]
    return torch.stack([frame for frames in near for frame in frames]).double().float()


def decided(frames: Tensor, attention: Tensor, method: Any) -> tuple[foveate.View, foveate.Decision]:
    view = video_view(frames)
    found = videos_of(view)
    return view, method.reduce(found, found.states, frames.mean(1)[None], attention[None])


@pytest.mark.parametrize("keep", [30, 47, 80])  # 47: 6 frames of 6, then 5; 80: a surplus of salient tokens
@pytest.mark.parametrize("seed", range(3))
def test_it_follows_the_formulas(keep: int, seed: int):
    frames = scenes([5, 1, 2], patches=14, seed=seed)
    attention = torch.rand(8, 14, generator=torch.Generator().manual_seed(seed))
    method = foveate.FastVID(keep, segments=2, context=0.5, stride=2)
    view, decision = decided(frames, attention, method)
    expected = twin(frames, attention, method, keep)
    assert kept_of_video(view, decision.keep).tolist() == sorted(expected)
    assert len(expected) == keep
    hidden = view.hidden[0].clone()
    real = decision.slots[0] >= 0
    hidden[decision.slots[0, real]] = decision.values[0, real]
    for place, value in expected.items():
        assert torch.allclose(hidden[BEFORE + place], value, atol=1e-5)


def test_segments():
    frames = scenes([3, 4, 1], patches=6, seed=0).mean(1)[None]
    there = torch.ones(1, 8, dtype=torch.bool)
    assert cut_segments(frames, there, 1, 0.8).number[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    runs = cut_segments(frames, there, 3, -1)
    assert runs.length[0].tolist() == [3, 3, 3, 4, 4, 4, 4, 1]
    assert runs.to_last[0].tolist() == [2, 1, 0, 3, 2, 1, 0, 0]
    counts = anchor_counts(runs, torch.full((1, 8), 5), 2)
    assert counts[0].tolist() == [7, 0, 7, 0, 10, 0, 10, 5]


def test_padding_is_in_no_segment():
    """A short video beside a long one is cut as by itself."""
    frames = scenes([2, 3], patches=6, seed=0).mean(1)
    alone = cut_segments(frames[None], torch.ones(1, 5, dtype=torch.bool), 2, 0.5)
    both = torch.zeros(2, 9, 16)
    both[0, :5] = frames
    there = torch.arange(9)[None] < torch.tensor([[5], [9]])
    beside = cut_segments(both, there, 2, 0.5)
    assert torch.equal(beside.length[0, :5], alone.length[0])
    assert beside.length[0, 5:].sum() == 0


def test_a_single_frame():
    frames = scenes([1], patches=10, seed=0)
    _, decision = decided(frames, torch.rand(1, 10), foveate.FastVID(4))
    assert int(decision.keep.sum()) == 4 + 10  # and the text


def test_origin_names_an_anchor():
    frames = scenes([5, 1, 2], patches=14, seed=1)
    view, decision = decided(frames, torch.rand(8, 14), foveate.FastVID(40, segments=2, context=0.5))
    gone = view.visual & ~decision.keep
    carriers = decision.origin[gone]
    assert bool((carriers >= 0).all())
    assert set(carriers.tolist()) <= set(decision.slots[decision.slots >= 0].tolist())


def test_where_the_code_fails():
    frames, attention = scenes([8], patches=12, seed=0), torch.rand(8, 12)
    with pytest.raises(foveate.UnsupportedError, match="more anchors than patches"):
        decided(frames, attention, foveate.FastVID(0.5, segments=1, threshold=-1, context=0.8, faithful=True))
    with pytest.raises(foveate.UnsupportedError, match="fewer frames than 9"):
        decided(frames, attention, foveate.FastVID(0.5, segments=9, faithful=True))


@torch.no_grad()
def test_frames_and_attention_are_those_of_the_prompt():
    """With anchors for nothing, the most attended patches of each frame stay."""
    model, prompt = videos.build("llava_onevision"), videos.prompt("llava_onevision")
    method = foveate.FastVID(8, context=0.0)
    view = tower.look(model, prompt, method)
    read = next(iter(view.vision.values()))
    with foveate.apply(model, method) as session:
        model(**prompt)
    for block, (row, slots) in enumerate(zip(read.rows.tolist(), read.slots)):
        best = read.attention[block].mean(0).topk(2).indices
        kept = session.trace.kept(-1)[row, slots].nonzero()[:, 0]
        assert kept.tolist() == sorted(best.tolist())


@pytest.mark.parametrize(
    ("option", "value"),
    [("segments", 0), ("segments", 1.5), ("stride", 0), ("threshold", 2), ("context", -0.1), ("weight", "much")],
)
def test_bad_options(option: str, value: object):
    with pytest.raises(foveate.OptionError, match=option):
        foveate.FastVID(0.5, **{option: value})
