"""DART against ZichenWen1/DART: pivots, their order, and what stays."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from foveate.reducers.dart import DART
from foveate.reduction import Tap, View

from . import Golden


def check(path: Path) -> None:
    """Compare everything in one file of `goldens/dart`."""
    golden = Golden(path)
    hidden, key = golden["hidden_normed"], golden["key_states"]
    length, start, text = hidden.shape[1], golden.scalar("image_start"), golden.scalar("text_length")
    tokens = golden.scalar("image_len")
    if text >= 0:
        assert tokens == length - text, "image_len"
    end = start + tokens
    if text >= 0:  # the official code takes the length of the image from the text's
        assert end <= length
    slots = torch.arange(length)[None]
    visual = (slots >= start) & (slots < end)
    count, ratio, retain = (
        golden.scalar("max_num_trunction"),
        golden.scalar("reduction_ratio"),
        golden.scalar("retain_next"),
    )
    variant = golden.arrays["variant"].item()
    golden.unread.discard("variant")
    assert variant in ("llava", "qwen")
    if variant == "qwen":
        keep = 1 - ratio
    elif text >= 0:
        keep = retain
    else:
        keep = count if count >= 0 else 1 - ratio
    pivots = golden.scalar("pivot_image"), golden.scalar("pivot_text")
    reducer = DART(keep=keep, pivot_image=pivots[0], pivot_text=pivots[1], faithful=True)
    reducer.prepare(SimpleNamespace(depth=32, decoder=SimpleNamespace(norm=nn.Identity())))
    orders: list[torch.Tensor] = []
    official = reducer._official

    def remember(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        orders.append(given[0][0])
        ordered, takes = official(*given)
        orders.append(ordered[0])
        return ordered, takes

    reducer._official = remember
    last = torch.tensor([[length - 1]])
    tap = Tap(torch.zeros(1, 1, length), torch.ones(1, 1, dtype=torch.bool), last, slots, key=key)
    everything = torch.ones_like(visual)
    keep_mask = reducer.decide(View(1, hidden, everything, visual, everything, tap)).keep
    assert bool(keep_mask[~visual].all())
    golden.compare("image_pivots", orders[0][: pivots[0]])
    golden.compare("text_pivots", orders[0][pivots[0] :])
    golden.compare("pivot_order", orders[1])
    golden.compare("retained", (keep_mask & visual)[0].nonzero()[:, 0])
    golden.finish()
