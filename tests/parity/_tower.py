"""A vision tower made of arrays, and what the language model would be handed after a decision."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from foveate.reduction import Decision, Patches, Reducer, View

from . import Golden

BEFORE, AFTER = 4, 3


def patches(tokens: int, images: int, **read: Tensor) -> Patches:
    """Images of equal size, one in each row of a batch."""
    slots = BEFORE + torch.arange(tokens).expand(images, -1)
    side = round(tokens**0.5)
    grid = torch.tensor([[side, side] if side * side == tokens else [1, tokens]]).expand(images, -1)
    return Patches(torch.arange(images), slots, grid, **read)


def with_cls(values: Tensor, name: str, heads: int = 1) -> dict[str, Tensor]:
    """(I, N + 1, C), CLS first, as the keyword arguments of `Patches`; `heads` is 0 for features."""
    if heads:
        values = values.unflatten(2, (heads, -1))
    return {name: values[:, 1:], f"cls_{name}": values[:, 0]}


def anatomy(layer: int = -2) -> Any:
    """What `prepare` asks of a model like LLaVA."""
    return SimpleNamespace(
        vision_layer=layer, mrope=False, sliding_windows=(None,), decoder=SimpleNamespace(rotary_emb=None)
    )


def decide(reducer: Reducer, vision: dict[int, Patches], features: Tensor) -> tuple[Decision, list[Tensor]]:
    """The decision, and for each image the tokens that stay, in the order of the prompt; the projector does nothing.

    Args:
        reducer: the method.
        vision: by layer.
        features: (I, N, C), at the visual slots.
    """
    images, tokens, width = features.shape
    hidden = torch.randn(images, BEFORE + tokens + AFTER, width, generator=torch.Generator().manual_seed(0))
    hidden[:, BEFORE : BEFORE + tokens] = features
    visual = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    visual[:, BEFORE : BEFORE + tokens] = True
    everything = torch.ones_like(visual)
    reducer.prepare(anatomy())
    view = View(-1, hidden.clone(), everything, visual, everything, vision=vision, project=lambda x: x)
    decision = reducer.decide(view)
    assert bool(decision.keep[~visual].all())
    if decision.slots is not None:
        rows, columns = (decision.slots >= 0).nonzero(as_tuple=True)
        hidden[rows, decision.slots[rows, columns]] = decision.values[rows, columns].float()
    return decision, [hidden[row][decision.keep[row] & visual[row]] for row in range(images)]


def compare_ranking(golden: Golden, name: str, ours: Tensor, scores: Tensor) -> Tensor:
    """Compare a ranking (I, K) of indices into scores (I, N); of equal scores (float32) either may come first.

    Returns:
        (I, K) long: at which of our places each official one is.
    """
    theirs = golden[name]
    assert theirs.shape == ours.shape, f"{name}: shape {tuple(ours.shape)}, official {tuple(theirs.shape)}"
    assert bool(((theirs >= 0) & (theirs < scores.shape[1])).all()), name
    moved = theirs != ours
    same = torch.isclose(scores.gather(1, theirs), scores.gather(1, ours), rtol=1e-6, atol=0)
    assert bool((same | ~moved).all()), f"{name}: {int((~same & moved).sum())} indices differ"
    assert torch.equal(theirs.sort(1).values, ours.sort(1).values), f"{name}: other indices"
    place = torch.empty_like(ours)
    return place.scatter(1, theirs.argsort(dim=1, stable=True), ours.argsort(dim=1, stable=True))
