"""Which slots a patch of the vision tower is in, found by changing it, against the slots for which it is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import foveate
from foveate.engine.families.parts import Anatomy, resolve
from foveate.reduction import Decision, Reducer, View, VisionSpec

__all__ = ["disagreements"]


class _Probe(Reducer):
    """Remembers, by slot, what was read and what entered the decoder."""

    stages = (-1,)

    def __init__(self, anatomy: Anatomy, seen: dict[str, Tensor]):
        self.vision_taps = {anatomy.vision_layer: VisionSpec(attention=None, features=True)}
        self.seen = seen

    def decide(self, view: View) -> Decision:
        (read,) = view.vision.values()
        batch, length = view.visual.shape
        weights = torch.randn(read.features.shape[-1], generator=torch.Generator().manual_seed(2))
        self.seen["read"] = read.to_slots(read.features @ weights, batch, length)
        self.seen["entered"] = view.hidden.detach().clone()
        return Decision()


@torch.no_grad()
def disagreements(model: Any, prompt: dict[str, Any], step: int = 3) -> tuple[list[str], int]:
    """Patches whose slots and readings differ, and how many slots were changed in all."""
    anatomy = resolve(model)
    layer = anatomy.parent(anatomy.vision_attention()[anatomy.vision_layer])
    changed: dict[str, int | None] = {"patch": None}
    seen: dict[str, Tensor] = {}
    calls: list[int] = []

    def change(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        first, flat = sum(calls), hidden.reshape(-1, hidden.shape[-1]).clone()
        calls.append(len(flat))
        if changed["patch"] is not None and 0 <= changed["patch"] - first < len(flat):
            flat[changed["patch"] - first] += torch.randn(flat.shape[1], generator=torch.Generator().manual_seed(1))
        flat = flat.view(hidden.shape)
        return (flat, *output[1:]) if isinstance(output, tuple) else flat

    def look(patch: int | None) -> dict[str, Tensor]:
        changed["patch"] = patch
        calls.clear()
        with foveate.apply(model, _Probe(anatomy, seen)):
            model(**prompt)
        return dict(seen)

    handle = layer.register_forward_hook(change, prepend=True)  # before transformers records what leaves the layer
    try:
        before, wrong, found = look(None), [], 0
        for patch in range(0, sum(calls), step):
            after = look(patch)
            made = (after["entered"] - before["entered"]).abs().amax(-1) > 1e-5
            judged = (after["read"] - before["read"]).abs() > 1e-5
            found += int(made.sum())
            # A class token is a token, too: it changes no slot, and none may be read from it.
            if not torch.equal(made, judged):
                wrong.append(f"patch {patch} is in {made.nonzero().tolist()}, read for {judged.nonzero().tolist()}")
    finally:
        handle.remove()
    return wrong, found
