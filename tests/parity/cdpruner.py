"""CDPruner against Theia-4869/CDPruner: the scaled relevance and what stays of each crop."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.functional import normalize

from foveate.reducers.cdpruner import CDPruner
from foveate.reduction import View

from . import Golden

BEFORE, AFTER = 3, 5


def check(path: Path) -> None:
    """Compare everything in one file of `goldens/cdpruner`."""
    golden = Golden(path)
    features, crops = golden["features"], golden["image_embeds"]
    blocks, tokens, width = features.shape
    length = BEFORE + blocks * tokens + AFTER
    slots = BEFORE + torch.arange(blocks * tokens).view(blocks, tokens)
    visual = torch.zeros(1, length, dtype=torch.bool)
    visual[0, slots.reshape(-1)] = True
    hidden = torch.zeros(1, length, width)
    hidden[0, slots] = features

    def negative_clip_similarity(view: View) -> torch.Tensor:
        cosines = normalize(crops, dim=-1) @ normalize(golden["text_embeds"], dim=-1).T
        return torch.zeros(1, length).masked_scatter(view.visual, -cosines.mean(-1))

    parts = [SimpleNamespace(slots=part, grid=(1, tokens)) for part in slots]
    image = SimpleNamespace(row=0, slots=slots.flatten(), blocks=parts)
    index = torch.where(visual, 0, -1)
    layout = SimpleNamespace(images=[[image]], image_index=index, image_counts=torch.ones(1, dtype=torch.long))
    everything = torch.ones_like(visual)
    per_crop = golden.scalar("visual_token_num")
    reducer = CDPruner(keep=blocks * per_crop, similarity=negative_clip_similarity, faithful=True)
    decision = reducer.decide(View(-1, hidden, everything, visual, everything, layout=layout))
    assert bool(decision.keep[~visual].all())
    golden.compare("relevance", decision.scores[0, slots], rtol=1e-3, atol=3e-7)
    golden.compare("mask", decision.keep[0, slots])
    assert bool((golden["mask"].sum(1) == per_crop).all())
    golden.finish()
