"""A whole prefill on paper against torch's count, for every family, unreduced and reduced, also inside the tower."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf

import foveate
from foveate.engine.compat import returned_cache
from foveate.engine.trace import Trace
from foveate.measure import Geometry, exact_flops, kv_bytes, prefill_flops
from foveate.reduction import UnsupportedError
from tests.families import FAMILIES, build, inputs
from tests.reference.meters import flops


class KeepSome(foveate.Reducer):
    """Keeps the first visual tokens of each row, a share of them, more in later rows."""

    def __init__(self, stage: int, share: float, ragged: int = 0):
        self.stages, self.share, self.ragged = (stage,), share, ragged

    def decide(self, view: foveate.View) -> foveate.Decision:
        count = (view.active_visual.sum(1) * self.share).long() + self.ragged * torch.arange(len(view.active))
        return foveate.Decision(keep=~view.visual | (view.visual.cumsum(1) <= count[:, None]))


def _counted(model: hf.PreTrainedModel, given: dict[str, torch.Tensor]) -> Callable[[], object]:
    return lambda: model(**given, logits_to_keep=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_unreduced_reduced_and_ragged(name: str):
    model = build(name, "eager")
    given = inputs(name, model)  # two rows of different length, padded
    run = _counted(model, given)
    assert prefill_flops(model, None, given).total == pytest.approx(flops(run), rel=0.005)
    with foveate.apply(model, KeepSome(1, 0.3, ragged=3)) as session:
        counted = flops(run)
    found = prefill_flops(model, session.trace, given)
    assert found.total == pytest.approx(counted, rel=0.005)
    assert found.vision > 0
    assert found.connector > 0
    geometry = Geometry.from_config(model.config, 0, 0)
    assert found.decoder == exact_flops(geometry, session.trace, logits=0, fillers=True)
    assert prefill_flops(model, session.trace, given, fillers=False).decoder < found.decoder


@pytest.mark.parametrize("name", ["llava", "llava_next", "paligemma"])
@pytest.mark.parametrize("method", ["tome", "pitome", "downsample"])
def test_fewer_tokens_inside_the_tower(name: str, method: str):
    model = build(name, "eager")
    given = inputs(name, model, batch=1)
    whole = prefill_flops(model, None, given)
    with foveate.apply(model, foveate.build(method, keep=0.5)) as session:
        counted = flops(_counted(model, given))
    found = prefill_flops(model, session.trace, given)
    assert found.total == pytest.approx(counted, rel=0.02)  # comparing tokens costs something as well
    assert found.vision < 0.9 * whole.vision
    assert found.connector == whole.connector


def test_images_that_are_padding_cost_nothing():
    model = build("smolvlm", "eager")
    given = inputs("smolvlm", model, images=[1, 2])
    assert given["pixel_values"].shape[:2] == (2, 2)
    assert prefill_flops(model, None, given).total == pytest.approx(flops(_counted(model, given)), rel=0.005)


def test_a_tower_with_siglip_s_head():
    model = build("paligemma", "eager")
    config = hf.SiglipVisionConfig(**{**model.config.vision_config.to_dict(), "vision_use_head": True})
    model.model.vision_tower = hf.SiglipVisionModel._from_config(config, attn_implementation="eager").eval()
    given = inputs("paligemma", model)
    assert prefill_flops(model, None, given).total == pytest.approx(flops(_counted(model, given)), rel=0.02)


def test_without_pixels_only_the_decoder_is_left():
    model = build("llava", "eager")
    given = inputs("llava", model)
    found = prefill_flops(model, None, {"input_ids": given["input_ids"]}, logits=0)
    assert (found.vision, found.connector, found.head) == (0, 0, 0)
    assert found.decoder == prefill_flops(model, None, given).decoder


def test_weights_are_not_read():
    model = build("qwen2_5_vl", "eager")
    given = inputs("qwen2_5_vl", model)
    assert prefill_flops(model.to("meta"), None, given) == prefill_flops(build("qwen2_5_vl"), None, given)


def test_a_connector_that_cannot_be_followed_is_refused():
    model = build("paligemma")
    given = inputs("paligemma", model)
    visual = given["input_ids"] == model.config.image_token_id
    visual[0, visual[0].nonzero()[0]] = False
    trace = Trace(model.config.text_config.num_hidden_layers, visual, torch.ones_like(visual))
    with pytest.raises(UnsupportedError, match="32 visual tokens expected from its config, the prompt has 31"):
        prefill_flops(model, trace, given)


def test_videos_without_a_grid_are_refused():
    model = build("llava_onevision")
    given = inputs("llava_onevision", model)
    given["pixel_values_videos"] = given.pop("pixel_values")
    with pytest.raises(UnsupportedError, match="videos"):
        prefill_flops(model, None, given)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("reduced", [False, True], ids=["full", "ragged"])
def test_kv_bytes_are_those_of_the_cache(name: str, reduced: bool):
    """Rows of different length, fillers, sliding windows shorter than the prompt."""
    model = build(name)
    given = inputs(name, model)
    geometry = Geometry.from_config(model.config, 0, 0)
    with foveate.apply(model, KeepSome(1, 0.3, ragged=3) if reduced else foveate.Reducer()) as session:
        cache = returned_cache(model(**given, use_cache=True))
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_bytes(geometry, session.trace, dtype_bytes=4, fillers=True) == stored
    if reduced:
        assert kv_bytes(geometry, session.trace, dtype_bytes=4) <= stored  # a full window has no room for fillers
