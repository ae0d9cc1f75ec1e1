"""ToMe against facebookresearch/ToMe: matching, merging, schedule, and proportional attention."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from foveate.ops.attention import attention_rows
from foveate.ops.bipartite import Merging, merge_schedule, soft_matching

from . import Golden

RTOL, ATOL = 1e-4, 1e-6


def check(path: Path) -> None:
    """Compare everything in one file of `goldens/tome`."""
    golden = Golden(path)
    if "table" in golden:
        _schedule(golden)
    elif "w_qkv" in golden:
        _attention(golden)
    else:
        _merging(golden)
    golden.finish()


def _schedule(golden: Golden) -> None:
    layers = golden.scalar("L")
    table = [[merge_schedule(layers, r, f) for f in golden["inflect"].tolist()] for r in golden["r"].tolist()]
    golden.compare("table", table)


def _merging(golden: Golden) -> None:
    metric, x = golden["metric"], golden["x"]
    sized = "size_in" in golden
    size = golden["size_in"] if sized else None
    distill = golden.scalar("distill_token")
    merging = soft_matching(metric, golden.scalar("r"), golden.scalar("class_token"), distill)
    golden.compare("r_effective", metric.shape[1] - merging.length)
    mean, total = merging.mean(x, size)
    golden.compare("out_wavg", mean, rtol=RTOL, atol=ATOL)
    golden.compare("out_size", total, rtol=RTOL)
    golden.compare("out_mean", merging.mean(x)[0], rtol=RTOL, atol=ATOL)
    golden.compare("source", merging.membership())
    if not distill:
        golden.compare("unmerged", merging.unmerge(mean), rtol=RTOL, atol=ATOL)
        return
    # The official values are in wrong places here; ours are right, theirs are ours under its own arithmetic of places.
    assert torch.equal(merging.unmerge(mean), torch.einsum("bot,bod->btd", merging.membership().float(), mean))
    golden.compare("unmerged", _official_unmerge(merging, mean), rtol=RTOL, atol=ATOL)


def _official_unmerge(merging: Merging, mean: Tensor) -> Tensor:
    """Looks for [unmerged, targets] in an output that begins with class and distillation token."""
    place, alone = merging.index, merging.length - merging.index.shape[1] // 2
    expected = torch.where(place == 1, alone, torch.where((place > 1) & (place <= alone), place - 1, place))
    return mean.gather(1, expected[..., None].expand(-1, -1, mean.shape[2]))


def _attention(golden: Golden) -> None:
    x, heads = golden["x"], golden.scalar("num_heads")
    batch, tokens, width = x.shape
    query, key, value = (x @ golden["w_qkv"].T).view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    golden.compare("metric", key.mean(1), rtol=RTOL, atol=ATOL)
    rows = torch.arange(tokens).expand(batch, -1)
    for name, bias in (("out_proportional", golden["size"].log()[:, None].transpose(2, 3)), ("out_plain", None)):
        weights = attention_rows(query, key, rows, None, bias, query.shape[-1] ** -0.5, None)
        ours = (weights @ value).transpose(1, 2).reshape(batch, tokens, width) @ golden["w_proj"].T
        golden.compare(name, ours, rtol=RTOL, atol=ATOL)
