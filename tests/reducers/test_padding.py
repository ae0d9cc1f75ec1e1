"""Padding takes no part: a row in a ragged, padded batch keeps what it keeps alone, whoever calls the model and how."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch import Tensor

import foveate
from tests import catalogue
from tests.catalogue.count import judge
from tests.families import inputs
from tests.reducers.test_matrix import METHODS, one_row
from tests.reference.checks import TOLERANCE, build_once, largest

FAMILIES = ["llava", "llava_next", "qwen2_5_vl", "internvl"]
FAITHFUL = {
    "dart faithful": lambda keep: foveate.DART(keep=keep, faithful=True),
    "fopru faithful": lambda keep: foveate.FoPru(keep=keep, faithful=True),
    "pyramiddrop faithful": lambda keep: foveate.PyramidDrop(keep=keep, faithful=True, layers=(1, 3)),
    "sparsevlm paper": lambda keep: foveate.SparseVLM(keep=keep, variant="paper"),
}


def padded(prompt: dict[str, Tensor], left: int, right: int) -> dict[str, Tensor]:
    """The batch with columns of padding on both sides."""
    shape = prompt["input_ids"].shape
    return {
        name: torch.nn.functional.pad(value, (left, right)) if value.shape == shape else value
        for name, value in prompt.items()
    }


def outcome(model: Any, method: str, keep: int | float, prompt: dict[str, Tensor]) -> tuple[list, Tensor]:
    """Kept slots at every stage and logits, without the padding, row by row."""
    make = {**METHODS, **FAITHFUL}[method]
    with foveate.apply(model, make(keep)) as session, torch.no_grad():
        logits = model(**prompt, use_cache=False).logits
    real, trace = prompt["attention_mask"].bool(), session.trace
    last = [int(row.nonzero()[-1]) for row in real]
    kept = [[trace.kept(stage)[row, real[row]] for stage in trace.stages] for row in range(len(real))]
    return kept, torch.stack([logits[row, at] for row, at in enumerate(last)])


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, *FAITHFUL])
@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(FAMILIES),
    seed=st.integers(0, 1000),
    after=st.integers(3, 9),
    left=st.integers(0, 7),
    right=st.integers(0, 4),
    keep=st.sampled_from([4, 0.4]),
)
def test_a_row_in_a_batch_is_the_row_alone(
    method: str, family: str, seed: int, after: int, left: int, right: int, keep: int | float
):
    model = build_once(family)
    prompt = inputs(family, model, batch=3, after=after, seed=seed)
    kept, logits = outcome(model, method, keep, padded(prompt, left, right))
    for row in range(3):
        kept_alone, alone = outcome(model, method, keep, one_row(prompt, row))
        for stage, (batch, single) in enumerate(zip(kept[row], kept_alone[0], strict=True)):
            assert torch.equal(batch, single), f"row {row}, decision {stage}"
        assert largest(alone[0] - logits[row]) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama4", "kimi_k25", "gemma4", "fuyu"])
def test_keys_are_compared_without_their_positions_however_a_decoder_rotates_them(name: str):
    """Complex numbers; a part of each key, at its end or its start; queries and keys one by one."""
    if not catalogue.known(name):
        pytest.skip(f"this transformers has no {name}")
    if name == "llama4" and Version(hf.__version__).release[:2] == (5, 24):
        pytest.skip("transformers 5.24 itself fails on Llama 4 with an image: its outputs have no image_outputs")
    model = catalogue.build(name)
    judge(name, model, "dart", {"keep": 0.5, "layer": 1}, catalogue.inputs(name, model))
