"""Exactness on a device, with nothing of the test suite: a reduced model against the same model that may not look.

The reference removes nothing. It is told what a method did (which slots went at which stage, what was written over
others), closes their columns in the attention mask of every later layer, and must then compute the same logits: in a
prefill of two rows, at the tokens that stayed, and in three steps after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from foveate import Decision, Reducer, View, apply
from foveate.engine.compat import CACHE_NAME, returned_cache
from foveate.engine.families.parts import resolve
from foveate.reduction import bind

TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 4e-2}
"""Largest difference, as a share of the largest logit; bfloat16 has 8 bits of each number, and kernels round apart."""
STEPS = 3


class Told(Reducer):
    """A method at the positions of the full prompt, and what it said."""

    def __init__(self, method: Reducer):
        self._method = method
        self.said: dict[int, Decision] = {}

    def prepare(self, anatomy: Any) -> None:
        self._method = bind(self._method, anatomy)
        for name in ("stages", "taps", "vision_taps", "tower"):
            setattr(self, name, getattr(self._method, name))

    def decide(self, view: View) -> Decision | None:
        decision = self._method.decide(view)
        if decision is not None:
            decision.positions = "keep"  # the reference leaves every token where it is
            self.said[view.stage] = decision
        return decision


def _run(model: Any, prompt: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of a prefill (B, S, V) and of steps with given tokens (B, steps, V)."""
    output = model(**prompt, use_cache=True)
    logits, cache = output.logits, returned_cache(output)
    steps = []
    for step in range(STEPS):
        token = torch.full((len(logits), 1), 7 + step, device=logits.device)
        steps.append(model(input_ids=token, use_cache=True, **{CACHE_NAME: cache}).logits)
    return logits.float(), torch.cat(steps, 1).float()


def _write(decision: Decision | None, hidden: Tensor) -> Tensor:
    """The hidden states (B, S, D) with merged tokens in their slots."""
    if decision is None or decision.slots is None or hidden.shape[1] == 1:
        return hidden
    hidden = hidden.clone()
    for row, (slots, values) in enumerate(zip(decision.slots, decision.values)):
        hidden[row, slots[slots >= 0]] = values[slots >= 0].to(hidden)
    return hidden


@contextmanager
def _blind(model: Any, removed: dict[int, Tensor], said: dict[int, Decision]) -> Iterator[None]:
    """No layer after a stage looks at what the stage removed: {stage: (B, S) bool}."""
    stored = [0]
    handles = []

    def before(index: int) -> Any:
        def hook(layer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            hidden, cache = args[0], next(value for value in kwargs.values() if isinstance(value, Cache))
            if index == 0:
                stored[0] = cache.get_seq_length()
                hidden = _write(said.get(-1), hidden)
            gone = [mask for stage, mask in removed.items() if stage < index]
            if gone:
                kwargs = {**kwargs, "attention_mask": closed(torch.stack(gone).any(0), hidden, kwargs)}
            return (hidden, *args[1:]), kwargs

        return hook

    def closed(gone: Tensor, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        total = stored[0] + hidden.shape[1]
        keys = torch.arange(total, device=hidden.device)
        mask = kwargs.get("attention_mask")
        if mask is None:  # plainly causal: transformers leaves it to the kernel
            mask = keys <= keys[stored[0] :, None]
        elif mask.dtype != torch.bool:
            mask = mask >= 0
        mask = mask & ~torch.nn.functional.pad(gone, (0, total - gone.shape[1]))[:, None, None]
        return mask | ~mask.any(-1, keepdim=True)  # a removed query that sees nothing would be NaN

    def after(index: int) -> Any:
        return lambda layer, args, output: _write(said.get(index), output)

    for index, layer in enumerate(resolve(model).layers):
        handles += [layer.register_forward_pre_hook(before(index), with_kwargs=True)]
        handles += [layer.register_forward_hook(after(index))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def largest_difference(model: Any, prompt: dict[str, Tensor], reducer: Reducer, impl: str) -> tuple[float, int]:
    """How far a reduced model is from its reference, as a share of the largest logit, and how many tokens went.

    Args:
        model: small; the reference always runs with SDPA, which takes any mask.
        reducer: the method.
        impl: the attention of the reduced model.
    """
    told = Told(reducer)
    model.set_attn_implementation(impl)
    try:
        with apply(model, told) as session:
            said: dict[int, Decision] = session.reducer.said
            logits, steps = _run(model, prompt)
            trace = session.trace
    finally:
        model.set_attn_implementation("sdpa")
    removed, left = {}, trace.tokens.to(logits.device)  # wherever a trace is kept
    for stage in trace.stages:
        active = trace.active(stage).to(logits.device)
        removed[stage], left = left & ~active, active
    with _blind(model, removed, said):
        expected, expected_steps = _run(model, prompt)
    scale = max(1.0, expected.abs().max().item())
    difference = torch.cat([(logits - expected)[left].flatten(), (steps - expected_steps).flatten()])
    worst = difference.abs().max().item()
    return (worst / scale if worst == worst else float("inf")), int(sum(mask.sum() for mask in removed.values()))
