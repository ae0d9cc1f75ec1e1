"""Every method on pretended devices: layers on two of them, and one without float64 (Apple's has none)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import foveate
from tests import devices, videos
from tests.devices import Devices, Tagged, plain, shard
from tests.families import build, inputs
from tests.reducers.test_budgets import EVERYTHING
from tests.reducers.test_on_videos import METHODS as ON_VIDEOS
from tests.reference.checks import TOLERANCE, build_once, largest

FAMILIES = ["llava", pytest.param("internvl", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def no_float64(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devices, "FORBID_DOUBLE", True)


def decided(family: str, method: str, keep: int | float, second: str) -> tuple[Tensor, list[Tensor]]:
    """Logits of the last token, and what is left after each stage, with the decoder's layers from 2 on on `second`."""
    prompt = inputs(family, build_once(family))
    with Devices(), torch.no_grad():
        model = shard(build(family), 2, second)
        there = {name: Tagged(value, "meta:0") for name, value in prompt.items()}
        with foveate.apply(model, EVERYTHING[method](keep)) as session:
            logits = plain(model(**there).logits)[:, -1]
        trace = session.trace
        means = [sum(row) / len(row) for row in trace.visual_tokens.tolist()]
        assert trace.mean_visual_tokens.tolist() == pytest.approx(means)
        return logits, [plain(trace.kept(stage)) for stage in trace.stages]


SECOND = [pytest.param("meta:0", marks=pytest.mark.slow, id="one device"), pytest.param("meta:1", id="two devices")]


@pytest.mark.slow
@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", EVERYTHING)
def test_it_decides_what_it_decides_on_one_device(method: str, family: str, second: str):
    keep = 0.4
    model, prompt = build_once(family), inputs(family, build_once(family))
    try:
        with foveate.apply(model, EVERYTHING[method](keep)) as session, torch.no_grad():
            expected = model(**prompt).logits[:, -1]
    except foveate.UnsupportedError:
        pytest.skip("this tower is not served")
    logits, kept = decided(family, method, keep, second)
    for stage, mask in zip(session.trace.stages, kept, strict=True):
        assert torch.equal(mask, session.trace.kept(stage))
    assert largest(logits - expected) <= TOLERANCE


@pytest.mark.parametrize("method", ON_VIDEOS)
def test_videos(method: str):
    prompt = videos.prompt("llava_onevision")
    model = videos.build("llava_onevision")
    with foveate.apply(model, ON_VIDEOS[method](0.4)) as session, torch.no_grad():
        model(**prompt)
    expected = session.trace.kept(-1)
    with Devices(), torch.no_grad():
        model = shard(build("llava_onevision"), 2, "meta:1")
        there = {name: Tagged(value, "meta:0") for name, value in prompt.items()}
        with foveate.apply(model, ON_VIDEOS[method](0.4)) as session:
            model(**there)
        assert torch.equal(plain(session.trace.kept(-1)), expected)
