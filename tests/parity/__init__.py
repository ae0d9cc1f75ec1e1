"""Foveate against numbers that the official codes produced: one module per method, each with `check(path)`.

`check` runs our code on the inputs of one golden file and compares every output in it. Here live the helpers that the
end-to-end checks share.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate.engine.compat import CACHE_NAME, returned_cache

LOGIT_TOLERANCE = 1e-3


class Golden:
    """The arrays of one golden file; `finish` fails if one of them was never looked at."""

    def __init__(self, path: Path):
        with np.load(path) as file:
            self.arrays: dict[str, np.ndarray] = {name: file[name] for name in file.files}
        self.path, self.unread = path, set(self.arrays)

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> Tensor:
        assert name in self.arrays, f"{self.path.name}: no array {name!r}"
        self.unread.discard(name)
        return torch.from_numpy(np.atleast_1d(self.arrays[name]))

    def scalar(self, name: str) -> Any:
        """The one number of an array."""
        value = self[name]
        assert value.numel() == 1, f"{self.path.name}: {name} is no scalar"
        return value.item()

    def compare(self, name: str, ours: Any, atol: float = 0.0, rtol: float = 0.0) -> None:
        """Compare an output; without a tolerance it must be equal."""
        theirs, ours = self[name], torch.atleast_1d(torch.as_tensor(ours))
        assert ours.shape == theirs.shape, f"{name}: shape {tuple(ours.shape)}, official {tuple(theirs.shape)}"
        ours, theirs = ours.double(), theirs.double()
        worst = (ours - theirs).abs().max().item() if theirs.numel() else 0.0
        close = torch.isclose(ours, theirs, rtol=rtol, atol=atol).all()
        assert close, f"{self.path.name}: {name} differs by up to {worst:.2e} (allowed {atol:g} + {rtol:g} relative)"

    def finish(self) -> None:
        """Fail for arrays that nothing was compared with or fed to."""
        assert not self.unread, f"{self.path.name}: arrays without a check: {sorted(self.unread)}"


@dataclass
class LayerRecord:
    """What one pass brought to each decoder layer."""

    hidden: list[Tensor] = field(default_factory=list)
    """Per layer (B, n, D): the rows that really ran."""
    cosines: list[Tensor] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        return [hidden.shape[1] for hidden in self.hidden]


@contextmanager
def observed(model: nn.Module) -> Iterator[list[LayerRecord]]:
    """Record, pass by pass, what the layers of a Llama compute on. Looks inside the layers, behind Foveate's hooks."""
    passes: list[LayerRecord] = []

    def normed(module: nn.Module, args: tuple, index: int) -> None:
        if index == 0:
            passes.append(LayerRecord())
        passes[-1].hidden.append(args[0].detach().clone())

    def attends(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        passes[-1].cosines.append(kwargs["position_embeddings"][0].detach())

    hooks = []
    for i, layer in enumerate(model.get_decoder().layers):
        hooks.append(layer.input_layernorm.register_forward_pre_hook(lambda m, a, i=i: normed(m, a, i)))
        hooks.append(layer.self_attn.register_forward_pre_hook(attends, with_kwargs=True))
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def positions(model: nn.Module, cosines: Tensor, longest: int = 1024) -> Tensor:
    """(n,) position whose rotary cosines (1, n, d) a layer was handed."""
    decoder = model.get_decoder()
    table = decoder.rotary_emb(cosines, torch.arange(longest)[None])[0][0]
    return torch.cdist(cosines[0].double(), table.double()).argmin(1)


def visual_slots(folder: Path) -> Tensor:
    """(1, S) bool: where the image is in the prompts of the tiny Llama."""
    config = next(
        p for p in (folder / "e2e_config.json", folder.parent / "sparsevlm" / "e2e_config.json") if p.exists()
    )
    sizes = json.loads(config.read_text())
    start, n_visual, n_text = sizes["n_system"], sizes["n_visual"], sizes["n_text"]
    slots = torch.arange(start + n_visual + n_text)
    return ((slots >= start) & (slots < start + n_visual))[None]


@dataclass
class Answer:
    """A prefill and a few greedy steps, token by token."""

    logits: Tensor
    """(S, V) of the prefill."""
    tokens: list[int]
    """The first is what the prefill predicts."""
    decode_logits: Tensor
    """(steps, V)"""
    stored: list[int]
    """Keys per layer after the prefill."""
    passes: list[LayerRecord]


@torch.no_grad()
def answer(model: nn.Module, inputs_embeds: Tensor, steps: int) -> Answer:
    """Prefill and decode greedily without `generate`, as the golden files were made."""
    with observed(model) as passes:
        output = model(inputs_embeds=inputs_embeds, use_cache=True)
        cache, logits = returned_cache(output), output.logits[0]
        stored = [layer.keys.shape[-2] for layer in cache.layers]
        tokens, decoded = [int(logits[-1].argmax())], []
        for _ in range(steps):
            output = model(input_ids=torch.tensor([[tokens[-1]]]), use_cache=True, **{CACHE_NAME: cache})
            decoded.append(output.logits[0, -1])
            tokens.append(int(decoded[-1].argmax()))
    return Answer(logits, tokens, torch.stack(decoded), stored, passes)
