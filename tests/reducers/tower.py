"""What the methods that decide from the vision tower are held against: loops over images and tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import foveate
from foveate.reduction import Budget, Patches, Reducer, View
from tests import families
from tests.reference.checks import assert_exact, build_once
from tests.reference.masked import MaskedReference

FAMILIES = ["llava", "paligemma", "qwen2_5_vl", "internvl", "llava_next"]
"""CLIP; SigLIP without a CLS token; 2 x 2 patches to a token; CLIP-like with pixel shuffle; tiles and row ends."""
Groups = dict[int, tuple[list[int], Tensor]]
"""Token -> (the tokens that are in it, its state before the projector)."""
Twin = Callable[[View, int, int], tuple[list[int], Groups]]
"""(view, block, tokens that may stay) -> tokens that stay as they are, and the merged ones."""


class _Look(Reducer):
    def __init__(self, reducer: Reducer):
        self.reducer, self.stages = reducer, (-1,)
        self.views: list[View] = []

    def prepare(self, anatomy: Any) -> None:
        self.reducer.prepare(anatomy)
        self.vision_taps = self.reducer.vision_taps

    def decide(self, view: View) -> None:
        self.views.append(view)


def look(model: Any, inputs: dict, reducer: Reducer) -> View:
    """What the method is shown."""
    watcher = _Look(reducer)
    with foveate.apply(model, watcher), torch.no_grad():
        model(**inputs)
    return watcher.views[-1]


def in_place(reducer: Reducer) -> Reducer:
    """The method with positions left as they are, so that the masked reference applies."""

    class InPlace(type(reducer)):
        def prepare(self, anatomy: Any) -> None:
            super().prepare(anatomy)
            self.positions = "keep"

    reducer = copy.copy(reducer)
    reducer.__class__ = InPlace
    return reducer


def shares(view: View, patches: Patches, keep: int | float) -> list[int]:
    """Tokens of each block, in proportion to its size, by largest remainder."""
    owner = [
        (row, next(i for i, im in enumerate(view.layout.images[row]) if int(slots.max()) in im.slots.tolist()))
        for row, slots in zip(patches.rows.tolist(), patches.slots)
    ]
    found = [0] * len(owner)
    for image in dict.fromkeys(owner):
        mine = [i for i, other in enumerate(owner) if other == image]
        size = {i: int(patches.valid[i].sum()) for i in mine}
        total = min(Budget(keep).of(len(view.layout.images[image[0]][image[1]].slots)), sum(size.values()))
        exact = {i: total * size[i] / sum(size.values()) for i in mine}
        late = sorted(mine, key=lambda i: (-(total * size[i] % sum(size.values())), i))
        for i in mine:
            found[i] = int(exact[i])
        for i in late[: total - sum(found[i] for i in mine)]:
            found[i] += 1
    return found


def states(view: View, layer: int, block: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    patches = view.vision[layer]
    if view.project is not None:
        return patches.features[block], view.project
    return view.hidden[patches.rows[block], patches.slots[block].clamp_min(0)], lambda x: x


@torch.no_grad()
def check(name: str, reducer: Reducer, twin: Twin, keep: int | float | None, images: Sequence[int] = (1, 2)) -> Any:
    """The model under the method computes what the masked reference computes under the twin. Returns the trace."""
    model = build_once(name)
    inputs = families.inputs(name, model, batch=len(images), images=list(images))
    view = look(model, inputs, reducer)
    patches = next(iter(view.vision.values()))
    budget = shares(view, patches, keep) if keep is not None else [-1] * len(patches.rows)
    removed, overwritten = view.visual.clone(), {}
    for block, row in enumerate(patches.rows.tolist()):
        kept, groups = twin(view, block, budget[block])
        for token in (*kept, *groups):
            removed[row, patches.slots[block, token]] = False
        for token, (_, state) in groups.items():
            layer = min(view.vision)
            value = states(view, layer, block)[1](state[None, None])[0, 0]
            overwritten[row, int(patches.slots[block, token])] = value

    def merge(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        for (row, slot), value in overwritten.items():
            hidden[row, slot] = value
        return hidden

    reference = MaskedReference(model, {-1: removed}, merge={-1: merge} if overwritten else None)
    return assert_exact(model, inputs, {-1: removed}, in_place(reducer), reference)


def attention(view: View, layer: int, block: int) -> list[float]:
    return view.vision[layer].attention[block].mean(0).tolist()


def tokens(view: View, block: int) -> list[int]:
    return next(iter(view.vision.values())).valid[block].nonzero()[:, 0].tolist()


def best(candidates: list[int], scores: Sequence[float], count: int) -> list[int]:
    return sorted(candidates, key=lambda j: -scores[j])[:count]


def weighted_group(x: Tensor, weights: Sequence[float], members: list[int]) -> Tensor:
    share = torch.tensor([weights[j] for j in members], dtype=x.dtype)
    return (share[:, None] * x[members]).sum(0) / share.sum()


def nearest(
    key: Tensor, centre: int, candidates: list[int], count: int, bonus: Sequence[float] | None = None
) -> list[int]:
    units = normalize(key.float(), dim=-1)
    score = [float(units[centre] @ units[j]) + (bonus[j] if bonus is not None else 0) for j in range(len(units))]
    return best(candidates, score, count)


def singles(model: Any, name: str, inputs: dict, rows: int) -> list[dict]:
    """Each row on its own, without padding; one image in each."""
    out = []
    for row in range(rows):
        start = int(inputs["attention_mask"][row].argmax())
        one = {
            k: v[row : row + 1, start:]
            for k, v in inputs.items()
            if v.dim() == 2 and v.shape == inputs["input_ids"].shape
        }
        one |= {k: v[row : row + 1] for k, v in inputs.items() if k not in one and k != "pixel_values"}
        pixels = inputs["pixel_values"]
        if "image_grid_thw" in inputs:
            ends = [0, *inputs["image_grid_thw"].prod(1).cumsum(0).tolist()]
            one["pixel_values"] = pixels[ends[row] : ends[row + 1]]
        else:
            one["pixel_values"] = pixels[row : row + 1]
        out.append(one)
    return out


@torch.no_grad()
def assert_batch_equals_singles(name: str, make: Callable[[], Reducer]) -> None:
    model = build_once(name)
    inputs = families.inputs(name, model, batch=3)
    with foveate.apply(model, make()) as session:
        together = model(**inputs).logits[:, -1]
        counts = session.trace.visual_tokens[:, 0].tolist()
        for row, one in enumerate(singles(model, name, inputs, 3)):
            torch.testing.assert_close(model(**one).logits[0, -1], together[row], atol=3e-5, rtol=0)
            assert session.trace.visual_tokens[0, 0] == counts[row]


@torch.no_grad()
def assert_keeping_everything_changes_nothing(name: str, make: Callable[[], Reducer]) -> None:
    model = build_once(name)
    inputs = families.inputs(name, model, batch=2)
    expected = model(**inputs).logits
    with foveate.apply(model, make()):
        assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
def counts(name: str, reducer: Reducer, **options: Any) -> list[int]:
    """Visual tokens of each row that enter layer 0."""
    model = build_once(name)
    with foveate.apply(model, reducer) as session:
        model(**families.inputs(name, model, **options))
    return session.trace.visual_tokens[:, 0].tolist()
