"""VisPruner against Theia-4869/VisPruner: the important patches and the mask. In float32, as the method is brittle."""

from __future__ import annotations

from pathlib import Path

import torch

from foveate.ops.select import top_k_mask
from foveate.reducers.vispruner import VisPruner

from . import Golden
from ._tower import decide, patches


def check(path: Path) -> None:
    """Compare everything in one file of `goldens/vispruner`."""
    golden = Golden(path)
    features, attention = golden["features"], golden["cls_attention"]
    images, tokens = features.shape[:2]
    keep, ratio = golden.scalar("visual_token_num"), golden.scalar("important_ratio")
    scores = attention.mean(1)
    important = top_k_mask(
        scores, torch.ones_like(scores, dtype=torch.bool), torch.tensor([int(keep * ratio)] * images)
    )
    golden.compare("important_idx", important.nonzero()[:, 1].view(images, -1))
    # The choice follows differences of 1e-7: compare in the precision in which the order of operations does not matter.
    vision = {-2: patches(tokens, images, attention=attention, features=features.double())}
    decision, _ = decide(VisPruner(keep=keep, important_ratio=ratio, faithful=True), vision, features)
    golden.compare("mask", decision.keep.gather(1, vision[-2].slots))
    assert bool((golden["mask"].sum(1) == keep).all())
    golden.finish()
