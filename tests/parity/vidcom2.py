"""VidCom2 against its code: the scores, the budget of each frame, and which patches stay."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from foveate.ops.vidcom2 import frame_shares, likeness, rounded_counts
from foveate.reducers.vidcom2 import VidCom2

from . import Golden
from ._video import kept_of_video, video_view


def check(path: Path) -> None:
    """Compare everything in one file of `goldens/vidcom2`."""
    golden = Golden(path)
    frames, patches, base = (golden.scalar(name) for name in ("frames", "tokens_per_frame", "base"))
    features = golden["features"].float().view(frames, patches, -1)
    valid = torch.ones(1, frames, patches, dtype=torch.bool)
    to_video, to_frame = likeness(features[None], valid)
    shares = frame_shares(to_video, valid, torch.tensor([base]))
    golden.compare("video_score", to_video[0], rtol=1e-4)
    golden.compare("frame_score", to_frame[0], rtol=1e-4)
    golden.compare("scales", shares[0].clamp_max(1.0), rtol=2e-3)
    golden.compare("counts", rounded_counts(shares, valid.sum(2))[0])

    method = VidCom2(keep=base, faithful=True)
    view = video_view(features)
    golden.compare("keep", kept_of_video(view, method.decide(view).keep))
    if "keep_with_newlines" in golden:
        side = round(patches**0.5)
        view = video_view(features, row_ends=side)
        ours = kept_of_video(view, method.decide(view).keep)
        golden.compare("keep_with_newlines", _ends_behind(ours, side))
    golden.finish()


def _ends_behind(kept: Tensor, side: int) -> Tensor:
    """The official order: the row ends of a frame behind what is left of its patches; here they lie in their rows."""
    frame, is_end = kept // (side * (side + 1)), kept % (side + 1) == side
    return kept[(frame * 2 + is_end).argsort(stable=True)]
