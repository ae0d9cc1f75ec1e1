"""PiToMe against hchautran/PiToMe: energy, matchings, and merging."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from foveate.ops.bipartite import cosines, energy_matching, feature_energy, soft_matching

from . import Golden

RTOL, ATOL = 1e-4, 1e-6


def check(path: Path) -> None:
    """Compare everything in one file of `goldens/pitome`."""
    golden = Golden(path)
    metric, cls = golden["metric"], golden.scalar("class_token")
    ratio, margin = golden.scalar("ratio"), golden.scalar("margin")
    tokens = metric.shape[1] - cls
    r = math.floor(tokens - tokens * ratio)
    similarity = cosines(metric[:, 1:] if cls else metric)
    if "mask_in" in golden:
        _text(golden, similarity, r, margin)
    else:
        _vision(golden, similarity, r, margin)
    golden.finish()


def _text(golden: Golden, similarity: Tensor, r: int, margin: float) -> None:
    # The energy of PiToMe for text, which no method here uses: mean_j N(1 - S_ij; 0, (1 - margin)^2).
    sigma = 1 - margin
    energy = (torch.exp(-0.5 * ((1 - similarity) / sigma) ** 2) / (sigma * (2 * torch.pi) ** 0.5)).mean(-1)
    merging = energy_matching(similarity, energy, r, golden.scalar("class_token"), "halves")
    mean, size = merging.mean(golden["x"])
    golden.compare("out_wavg", mean, rtol=RTOL, atol=ATOL)
    golden.compare("out_wavg_size", size, rtol=RTOL)
    golden.compare("mask_out_amax", merging.maximum(golden["mask_in"]), rtol=RTOL)
    golden.compare("source", merging.membership())


def _vision(golden: Golden, similarity: Tensor, r: int, margin: float) -> None:
    metric, x, size, cls = golden["metric"], golden["x"], golden["size_in"], golden.scalar("class_token")
    golden.compare("r", r)
    energy = feature_energy(similarity, margin, golden.scalar("alpha"))
    golden.compare("energy", energy, rtol=RTOL, atol=ATOL)
    golden.compare("order", energy.argsort(dim=1, descending=True, stable=True))
    merging = energy_matching(similarity, energy, r, cls)
    for name, weights in (("out_wavg", None), ("out_sized", size)):
        mean, total = merging.mean(x, weights)
        golden.compare(name, mean, rtol=RTOL, atol=ATOL)
        golden.compare(f"{name}_size", total, rtol=RTOL)
    golden.compare("out_mean", merging.mean(x)[0], rtol=RTOL, atol=ATOL)
    golden.compare("out_prune", merging.prune(x), rtol=RTOL, atol=ATOL)
    golden.compare("source", merging.membership())

    by_similarity = energy_matching(similarity, energy, r, cls, pairs="all")
    mean, total = by_similarity.mean(x, size)
    golden.compare("out_bsm_pitome", mean, rtol=RTOL, atol=ATOL)
    golden.compare("out_bsm_pitome_size", total, rtol=RTOL)
    golden.compare("source_bsm_pitome", by_similarity.membership())

    tokens = metric.shape[1]
    plain = soft_matching(metric, math.floor(tokens - tokens * golden.scalar("ratio")), cls, cap=False)
    mean, total = plain.mean(x, size)
    golden.compare("out_tome", mean, rtol=RTOL, atol=ATOL)
    golden.compare("out_tome_size", total, rtol=RTOL)
