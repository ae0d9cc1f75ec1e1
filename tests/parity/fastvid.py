"""FastVID against its code: segments, anchors per frame, density, what stays, and the merged tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from foveate.ops.fastvid import anchor_counts, cut_segments
from foveate.ops.select import put_tokens
from foveate.reducers._videos import videos_of
from foveate.reducers.fastvid import FastVID, frame_peaks

from . import Golden
from ._video import BEFORE, kept_of_video, video_view


def check(path: Path) -> None:
    """Compare everything in one file of `goldens/fastvid`."""
    golden = Golden(path)
    frames, features = golden["frames"].float(), golden["frame_features"].float()[None]
    attention, number, patches = golden["frame_attention"], len(frames), frames.shape[1]
    share, context, stride = (golden.scalar(name) for name in ("retention_ratio", "stprune_d", "dtm_p"))
    method = FastVID(
        share, segments=golden.scalar("dyseg_c"), threshold=golden.scalar("dyseg_tau"), context=context, stride=stride,
        weight=golden.scalar("dtm_beta"), faithful=True,
    )  # fmt: skip

    runs = cut_segments(features, torch.ones(1, number, dtype=torch.bool), method.segments, method.threshold)
    golden.compare("segment_sizes", runs.number[0].bincount())
    each = int(int(patches * share) * context)
    golden.compare("frame_context", anchor_counts(runs, torch.full((1, number), each), stride)[0])
    salient = attention.argsort(dim=1, descending=True)[:, : int(patches * share) - each]
    rest = torch.ones(number, patches, dtype=torch.bool).scatter(1, salient, False)
    peaks = frame_peaks(frames, rest, torch.ones(number, dtype=torch.long), 1, guarded=False)
    golden.compare("density_score", peaks.score[rest].view(number, -1), atol=1e-5)

    view = video_view(frames)
    videos = videos_of(view)
    decision = method.reduce(videos, videos.states, features, attention[None])
    kept = kept_of_video(view, decision.keep)
    golden.compare("keep", kept)
    rows = put_tokens(view.hidden, decision.slots, decision.values, spare=0)[0]
    golden.compare("values", rows[BEFORE + kept], atol=1e-5)
    golden.finish()
