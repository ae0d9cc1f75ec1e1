"""Every method on every kind of tower: exact, the same in a batch as alone, nothing done at 100 %, nothing left behind.

A new method needs one row in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.reduction import Decision, Reducer, View, info
from tests.families import inputs, visual_slots
from tests.reference.checks import TOLERANCE, build_once, footprint, greedy, largest
from tests.reference.masked import MaskedReference

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("llava_next", "paligemma", "idefics3")]
FAMILIES = ["llava", "qwen2_5_vl", "internvl", *SLOW]
KEEP = 0.4

METHODS: dict[str, Callable[[float], Reducer]] = {
    "averagepool": lambda keep: foveate.AveragePool(keep=keep),
    "cdpruner": lambda keep: foveate.CDPruner(keep=keep),
    "chain": lambda keep: foveate.Chain(foveate.DivPrune(keep=keep), foveate.FastV(keep=keep, layer=3)),
    "dart": lambda keep: foveate.DART(keep=keep),
    "divprune": lambda keep: foveate.DivPrune(keep=keep),
    "fastv": lambda keep: foveate.FastV(keep=keep),
    "fopru": lambda keep: foveate.FoPru(keep=keep),
    "pitome": lambda keep: foveate.PiToMe(keep=keep, where="output"),
    "prumerge": lambda keep: foveate.PruMerge(keep=keep),
    "prumerge+": lambda keep: foveate.PruMergePlus(keep=keep),
    "pyramiddrop": lambda keep: foveate.PyramidDrop(keep=keep),
    "random": lambda keep: foveate.Random(keep=keep, seed=3),
    "recoverable": lambda keep: foveate.Recoverable(keep=keep, similarity="llm"),
    "sparsevlm": lambda keep: foveate.SparseVLM(keep=keep),
    "sparsevlm-2.0": lambda keep: foveate.SparseVLM(keep=keep, variant="2.0"),
    "tome": lambda keep: foveate.ToMe(keep=keep, where="output"),
    "visionzip": lambda keep: foveate.VisionZip(keep=keep),
    "vispruner": lambda keep: foveate.VisPruner(keep=keep),
    "vtw": lambda keep: foveate.VTW(keep=keep),
}
BEFORE_THE_DECODER = [
    "cdpruner", "divprune", "fopru", "pitome", "prumerge", "prumerge+", "random", "recoverable", "tome", "visionzip",
    "vispruner",
]  # fmt: skip
"""Methods that promise exactly `keep` tokens in every layer."""


def test_every_registered_method_has_a_row() -> None:
    elsewhere = {"downsample", "pumer"}  # in the tower, in encoders: tests of their own
    elsewhere |= {name for name in foveate.names() if "on videos" in info(name).acts}
    assert set(foveate.names()) - elsewhere == {name for name in METHODS if name not in ("chain", "sparsevlm-2.0")}


class Recorded(Reducer):
    """A method under observation, at the positions of the full prompt, so that the masked reference can follow it."""

    def __init__(self, method: Reducer):
        self.method = method
        self.decisions: dict[int, Decision] = {}

    def prepare(self, anatomy: Any) -> None:
        self.method.prepare(anatomy)
        self.stages, self.taps = self.method.stages, self.method.taps
        self.vision_taps, self.tower = self.method.vision_taps, self.method.tower

    def decide(self, view: View) -> Decision | None:
        decision = self.method.decide(view)
        if decision is not None:
            decision.positions = "keep"
            self.decisions[view.stage] = decision
        return decision


def one_row(prompt: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """The prompt of a single row, without its padding."""
    tokens = prompt["attention_mask"][row].bool()
    per_image = {}
    grids = prompt.get("image_grid_thw")
    for name, value in prompt.items():
        if value.shape[:2] == prompt["input_ids"].shape:
            per_image[name] = value[row : row + 1, tokens]
        elif name == "pixel_values" and grids is not None:
            per_image[name] = value.split(grids.prod(1).tolist())[row]
        else:
            per_image[name] = value[row : row + 1]
    return per_image


def reference(model: Any, trace: foveate.Trace, decisions: dict[int, Decision]) -> MaskedReference:
    """The full model, told what a prefill removed and merged."""
    removed, left = {}, trace.tokens
    for stage in trace.stages:
        removed[stage] = left & ~trace.active(stage)
        left = trace.active(stage)
    assert any(bool(gone.any()) for gone in removed.values()), "nothing was removed"
    return MaskedReference(model, removed, {s: overwrite(d) for s, d in decisions.items() if d.slots is not None})


def overwrite(decision: Decision) -> Callable[[Tensor], Tensor]:
    def write(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        for row, (slots, values) in enumerate(zip(decision.slots, decision.values)):
            real = slots >= 0
            hidden[row, slots[real]] = values[real].to(hidden.dtype)
        return hidden

    return write


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_exact(method: str, family: str) -> None:
    """The layers compute what the full model computes when it may not look at what the method removed."""
    model = build_once(family)
    prompt = inputs(family, model, batch=2)
    before = footprint(model)
    recorded = Recorded(METHODS[method](KEEP))
    with foveate.apply(model, recorded) as session:
        actual = model(**prompt).logits
        forward = session.trace, dict(recorded.decisions)
        tokens, steps = greedy(model, prompt, 3)  # may decide otherwise: generate() does not number the padding
        generation = session.trace, dict(recorded.decisions)
    assert footprint(model) == before
    with reference(model, *forward):
        expected = model(**prompt).logits
    with reference(model, *generation):
        expected_tokens, expected_steps = greedy(model, prompt, 3)
    left = forward[0].active(forward[0].n_layers)
    assert largest((actual - expected)[left]) <= TOLERANCE
    assert largest(steps - expected_steps) <= TOLERANCE
    assert torch.equal(tokens, expected_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_batch_equals_singles(method: str, family: str) -> None:
    """A row gets in a left-padded, ragged batch what it gets alone."""
    model = build_once(family)
    prompt = inputs(family, model, batch=2)
    with foveate.apply(model, METHODS[method](KEEP)) as session:
        together = greedy(model, prompt, 3)[1]
        batch = session.trace
        for row in range(2):
            alone = greedy(model, one_row(prompt, row), 3)[1]
            tokens = prompt["attention_mask"][row].bool()
            assert torch.equal(session.trace.visual_tokens[0], batch.visual_tokens[row])
            for stage in batch.stages:
                assert torch.equal(session.trace.kept(stage)[0], batch.kept(stage)[row, tokens]), f"stage {stage}"
            assert largest(alone[0] - together[row]) <= TOLERANCE


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_all_tokens_kept_is_bitwise_the_model(method: str, family: str) -> None:
    model = build_once(family)
    prompt = inputs(family, model, batch=2)
    expected, expected_steps = greedy(model, prompt, 3)
    with foveate.apply(model, METHODS[method](1.0)):
        actual, steps = greedy(model, prompt, 3)
    assert torch.equal(actual, expected)
    assert torch.equal(steps, expected_steps)


@pytest.mark.parametrize("keep", [3, 0.25])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "paligemma"])
@pytest.mark.parametrize("method", BEFORE_THE_DECODER)
@torch.no_grad()
def test_the_budget_is_hit(method: str, family: str, keep: float) -> None:
    model = build_once(family)
    prompt = inputs(family, model, batch=2)
    visual = visual_slots(prompt["input_ids"]).sum(1)
    with foveate.apply(model, METHODS[method](keep)) as session:
        model(**prompt)
    promised = torch.tensor([keep if isinstance(keep, int) else round(keep * n) for n in visual.tolist()])
    assert torch.equal(session.trace.visual_tokens, promised[:, None].expand(-1, session.trace.n_layers))
