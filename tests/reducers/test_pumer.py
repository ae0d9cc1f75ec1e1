"""PuMer inside ViLT, METER and BridgeTower: fewer tokens, the same in a batch as alone, nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate
from foveate.engine.encoder import EncoderMethod, EncoderSession
from foveate.reducers.pumer import PuMer
from foveate.reduction import OptionError, UnsupportedError, build
from tests.families import build as build_vlm
from tests.reducers.encoders import ENCODERS, LENGTHS, TOKENS, answer, encoder, inputs, one_row
from tests.reference.checks import footprint, largest
from tests.reference.pumer import image_groups, pooled, text_groups

TOLERANCE = 1e-4
SETTING = {"layers": [1, 2], "prune_r": 0.2, "merge_r": 0.3, "merge_text": 0.2}
LEFT = [37, 37, 19]


def pumer(**options: Any) -> PuMer:
    return PuMer(**{**SETTING, **options})


# ---------------------------------------------------------------------------------------------------------- engine
@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_fewer_tokens_and_nothing_left_behind(name: str) -> None:
    model = encoder(name)
    prompt = inputs(model)
    full = answer(model, prompt)
    before = footprint(model)
    lengths = []
    first = model.base_model
    layers = first.encoder.layer if name.startswith("Vilt") else first.cross_modal_image_layers
    module = layers[3].output if name.startswith("Vilt") else layers[3].intermediate
    with EncoderSession(model, pumer()) as session:
        hook = module.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1]))
        reduced = answer(model, prompt)
        hook.remove()
        for trace in session.traces:
            assert trace.visual_tokens[:, :3].tolist() == [LEFT] * 3
    assert len(session.traces) == len(lengths) == (2 if "ImagesAndText" in name else 1)
    expected = 10 + (8 - 1 if name.startswith("Vilt") else 0)
    assert lengths == [expected + (0 if name.startswith("Vilt") else 0)] * len(lengths)
    assert reduced.shape == full.shape
    assert largest(reduced - full) > 1e-3, "the reduction has no effect: the check would be vacuous"
    assert footprint(model) == before
    assert torch.equal(answer(model, prompt), full)
