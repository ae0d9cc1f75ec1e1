"""VisionZip against dvlab-research/VisionZip: dominant patches, tokens in order, and the order of tiles."""

from __future__ import annotations

from pathlib import Path

import torch

from foveate.ops.attention import attention_rows
from foveate.ops.select import ranked
from foveate.ops.visionzip import mosaic_order
from foveate.reducers.visionzip import VisionZip

from . import Golden
from ._tower import compare_ranking, decide, patches, with_cls


def check(path: Path) -> None:
    """Compare everything in one file of `goldens/visionzip`."""
    golden = Golden(path)
    (_tiles if "width" in golden else _tokens)(golden)
    golden.finish()


def _tiles(golden: Golden) -> None:
    features, dominant = golden["features"], golden["dominant_idx"]
    width, height = golden.scalar("width"), golden.scalar("height")
    assert len(features) == width * height
    ordered = dominant.sort(1).values
    assert bool((ordered[:, 0] == 0).all() & (ordered.diff(dim=1) > 0).all() & (ordered <= 24 * 24).all()), (
        "dominant_idx"
    )
    order = mosaic_order(dominant, features.shape[1], width, height)
    golden.compare("out", features.flatten(0, 1)[order], rtol=1e-4)


def _tokens(golden: Golden) -> None:
    states, attention, metric = golden["hidden"], golden["cls_attention"], golden["metric"]
    images, tokens = states.shape[0], states.shape[1] - 1
    dominant, contextual = golden.scalar("dominant"), golden.scalar("contextual")
    key = with_cls(metric, "key")
    if "q" in golden:
        heads = golden.scalar("num_heads")
        query, key = with_cls(golden["q"], "query", heads), with_cls(golden["k"], "key", heads)
        per_head = [x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (golden["q"], golden["k"])]
        first = torch.zeros(images, 1, dtype=torch.long)
        row = attention_rows(*per_head, first, None, None, query["query"].shape[3] ** -0.5, None)[:, :, 0, 1:]
        golden.compare("cls_attention", row, rtol=1e-4, atol=1e-7)
        golden.compare("metric", golden["k"].unflatten(2, (heads, -1)).mean(2), rtol=1e-4, atol=1e-6)
    scores = attention.sum(1)
    order = ranked(scores, torch.ones_like(scores, dtype=torch.bool))[:, : dominant - 1] + 1
    order, scores = (
        torch.nn.functional.pad(order, (1, 0)),
        torch.nn.functional.pad(scores, (1, 0)),
    )  # 0 is the CLS token
    compare_ranking(golden, "dominant_idx_official_order", order, scores)
    reducer = VisionZip(keep=dominant + contextual, contextual=contextual, faithful=True)
    vision = {-2: patches(tokens, images, attention=attention, **key, **with_cls(states, "features", 0))}
    decision, left = decide(reducer, vision, states[:, 1:])
    golden.compare("out", torch.stack(left), rtol=1e-4, atol=1e-6)
    # Each dominant patch is carried by the slot of its place among the tokens.
    found = []
    for row in range(images):
        carriers = decision.keep[row].nonzero()[:, 0] - vision[-2].slots[row, 0]
        places = carriers[(carriers >= 0) & (carriers < tokens)][1:dominant] + vision[-2].slots[row, 0]
        origin = decision.origin[row, vision[-2].slots[row]]
        found.append(torch.tensor([0] + [int((origin == place).nonzero()[0, 0]) + 1 for place in places]))
    golden.compare("dominant_idx_sorted", torch.stack(found))
