"""Recoverable Compression against banjiuyufen/Recoverable-Compression: outliers, each step's choice, the tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from foveate.ops.outliers import THRESHOLD, local_outlier_factor
from foveate.ops.prumerge import class_attention
from foveate.ops.recoverable import recover_faithful
from foveate.ops.select import ranked
from foveate.reducers.recoverable import Recoverable
from foveate.reduction import View

from . import Golden
from ._tower import BEFORE, compare_ranking, decide, patches, with_cls


def check(path: Path) -> None:
    """Compare everything in one file of `goldens/recoverable`."""
    golden = Golden(path)
    (_lof if "labels" in golden else _tokens)(golden)
    golden.finish()


def _lof(golden: Golden) -> None:
    factor = local_outlier_factor(golden["data"], golden.scalar("k"))[0]
    golden.compare("offset", -THRESHOLD)
    golden.compare("neg_outlier_factor", -factor, rtol=1e-4)
    golden.compare("labels", torch.where(factor > THRESHOLD, -1, 1))
    golden.compare("ratio", (factor > THRESHOLD).double().mean(), rtol=1e-12)


def _tokens(golden: Golden) -> None:
    query, key, states = with_cls(golden["q"], "query"), with_cls(golden["k"], "key"), golden["features"]
    images, tokens, width = states.shape[0], states.shape[1] - 1, states.shape[2]
    attention = class_attention(query["cls_query"], key["cls_key"], key["key"])
    golden.compare("cls_attn", attention, rtol=1e-4, atol=1e-8)
    similarity = golden["similarity"][:, 0]
    outliers = (local_outlier_factor(attention, 10) > THRESHOLD).double().mean()
    golden.compare("lof_k10_ratio_vision", outliers, rtol=1e-12)
    found = recover_faithful(attention, similarity, width)
    golden.compare("lof_ratio_vision", found.visual_ratio, rtol=1e-12)
    golden.compare("lof_ratio_text", found.text_ratio, rtol=1e-12)
    golden.compare("lof_ratio_rest", found.rest_ratio, rtol=1e-12)
    golden.compare("num_vision", found.visual.sum())
    golden.compare("num_text", found.text.sum())
    golden.compare("num_centers", int(width * found.rest_ratio.item()))
    compare_ranking(golden, "idx_vision", ranked(attention, found.visual)[:, : int(found.visual.sum())], attention)
    compare_ranking(golden, "idx_text", ranked(similarity, found.text)[:, : int(found.text.sum())], similarity)
    golden.compare("idx_main_sorted", found.main.nonzero()[:, 1][None])

    def scorer(view: View) -> torch.Tensor:
        return torch.zeros(view.active.shape).index_copy(1, BEFORE + torch.arange(tokens), similarity)

    vision = {
        -1: patches(tokens, images, attention=attention[:, None], **query, **key),
        -2: patches(tokens, images, **with_cls(states, "features", 0)),
    }
    for variant, name in (("default", "out_default"), ("union", "out_union_variant")):
        reducer = Recoverable(similarity=scorer, faithful=True, variant=variant)
        _, left = decide(reducer, vision, states[:, 1:])
        golden.compare(name, torch.stack(left), rtol=1e-4, atol=1e-6)
