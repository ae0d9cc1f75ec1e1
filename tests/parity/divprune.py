"""DivPrune against vbdi/divprune: the order of selection, and what stays."""

from __future__ import annotations

from pathlib import Path

import torch

from foveate.ops.diversity import farthest_points
from foveate.reducers.divprune import DivPrune
from foveate.reduction import View

from . import Golden

BEFORE, AFTER = 35, 4


def check(path: Path) -> None:
    """Compare everything in one file of `goldens/divprune`."""
    golden = Golden(path)
    features, ratio = golden["features"], golden.scalar("ratio")
    length = BEFORE + len(features) + AFTER
    visual = torch.zeros(1, length, dtype=torch.bool)
    visual[:, BEFORE : BEFORE + len(features)] = True
    hidden = torch.randn(1, length, features.shape[1], generator=torch.Generator().manual_seed(0))
    hidden[visual] = features
    reducer = DivPrune(keep=ratio, faithful=True)
    everything = torch.ones_like(visual)
    keep = reducer.decide(View(-1, hidden, everything, visual, everything)).keep
    assert bool(keep[~visual].all())
    golden.compare("kept", keep[visual].nonzero()[:, 0])
    count = golden["order"].shape[0]
    assert count == round(ratio * len(features))
    valid = torch.ones(1, len(features), dtype=torch.bool)
    golden.compare("order", farthest_points(features[None], valid, torch.tensor([count]), repeat=True)[0])
    golden.finish()
