"""EVS against vLLM's code: how many patches of a video stay, and which."""

from __future__ import annotations

from pathlib import Path

import torch

from foveate.reducers.evs import EVS, official_count

from . import Golden
from ._video import video_view


def check(path: Path) -> None:
    """Compare everything in one file of `goldens/evs`."""
    golden = Golden(path)
    (_counts if "num_frames" in golden else _mask)(golden)
    golden.finish()


def _counts(golden: Golden) -> None:
    frame = golden["tokens_per_frame"]
    wanted = official_count(frame * golden["num_frames"], 1 - golden["q"])
    golden.compare("retained", torch.maximum(wanted, frame))


def _mask(golden: Golden) -> None:
    merge, (steps, height, width) = golden.scalar("spatial_merge_size"), golden["thw"].tolist()
    view = video_view(golden["video_embeds"].view(steps, (height // merge) * (width // merge), -1))
    keep = EVS(keep=1 - golden.scalar("q"), faithful=True).decide(view).keep
    assert bool(keep[~view.visual].all())
    golden.compare("mask", keep[view.visual])
    golden.compare("retained", keep[view.visual].sum())
