"""PruMerge and PruMerge+ against 42Shawn/LLaVA-PruMerge: attention, outliers, which patches, and the merged tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from foveate.ops.outliers import upper_outliers
from foveate.ops.prumerge import class_attention, complement, official_selection
from foveate.reducers.prumerge import PruMerge, PruMergePlus

from . import Golden
from ._tower import compare_ranking, decide, patches, with_cls


def _ratio(attention: torch.Tensor) -> float:
    values = attention.reshape(1, -1)
    return upper_outliers(values, torch.ones_like(values, dtype=torch.bool)).item() / values.numel()


def check(path: Path) -> None:
    """Compare everything in one file of `goldens/prumerge`."""
    golden = Golden(path)
    if "ratio_flat" in golden:
        golden.compare("ratio_flat", _ratio(golden["attn"]), rtol=1e-6)
        for row, attention in enumerate(golden["attn"]):
            golden.compare(f"ratio_row{row}", _ratio(attention), rtol=1e-6)
    elif "dim" in golden:
        golden.compare("out", complement(golden["idx"], golden.scalar("dim")))
    else:
        _tokens(golden)
    golden.finish()


def _tokens(golden: Golden) -> None:
    query, key, states = with_cls(golden["q"], "query"), with_cls(golden["k"], "key"), golden["features"]
    images, tokens = states.shape[0], states.shape[1] - 1
    attention = class_attention(query["cls_query"], key["cls_key"], key["key"])
    golden.compare("cls_attn", attention, rtol=1e-4, atol=1e-8)
    adaptive, plus, ratio = (
        bool(golden.scalar("if_adaptive")),
        bool(golden.scalar("plus")),
        golden.scalar("reduction_ratio"),
    )
    if adaptive:
        golden.compare("reduction_ratio", _ratio(attention), rtol=1e-6)
    else:
        assert _ratio(attention) != ratio, "if_adaptive: this is the share of outliers"
    golden.compare("num_topk", int(tokens * ratio))
    place = compare_ranking(golden, "selected_idx", official_selection(attention, ratio, plus, adaptive), attention)
    reducer = (PruMergePlus if plus else PruMerge)(keep=None if adaptive else ratio, faithful=True)
    vision = {
        -1: patches(tokens, images, attention=attention[:, None], **query, **key),
        -2: patches(tokens, images, **with_cls(states, "features", 0)),
    }
    _, left = decide(reducer, vision, states[:, 1:])
    ours = torch.stack(left)
    assert ours.shape[1] == place.shape[1] + 1
    ours = torch.cat([ours.gather(1, place[..., None].expand(-1, -1, ours.shape[2])), ours[:, -1:]], 1)
    golden.compare("out", ours, rtol=1e-4, atol=1e-6)
