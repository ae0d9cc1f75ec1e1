"""EVS against vLLM's code: how many patches of a video stay, and which."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from foveate.reducers.evs import EVS, official_count
from foveate.reduction import View

from . import Golden

BEFORE, AFTER = 4, 6


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
    states, merge = golden["video_embeds"], golden.scalar("spatial_merge_size")
    steps, height, width = golden["thw"].tolist()
    grid = height // merge, width // merge
    slots = BEFORE + torch.arange(len(states)).view(steps, -1)
    visual = torch.zeros(1, BEFORE + len(states) + AFTER, dtype=torch.bool)
    visual[0, slots.flatten()] = True
    hidden = torch.zeros(1, visual.shape[1], states.shape[1])
    hidden[0, slots.flatten()] = states
    video = SimpleNamespace(row=0, blocks=[SimpleNamespace(kind="frame", slots=part, grid=grid) for part in slots])
    count = torch.ones(1, dtype=torch.long)
    layout = SimpleNamespace(images=[[video]], image_index=torch.where(visual, 0, -1), image_counts=count)
    everything = torch.ones_like(visual)
    reducer = EVS(keep=1 - golden.scalar("q"), faithful=True)
    keep = reducer.decide(View(-1, hidden, everything, visual, everything, layout=layout)).keep
    assert bool(keep[~visual].all())
    golden.compare("mask", keep[visual])
    golden.compare("retained", keep[visual].sum())
