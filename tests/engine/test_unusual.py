"""Models that are built in another way: exact where they are served, a true sentence where they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.families import FAMILIES, IMAGE_TOKEN, build, visual_slots
from tests.reference.checks import assert_exact, footprint
from tests.reference.plans import Fixed, all_removed, draw_removed
from tests.unusual import REFUSED, SOUND, UNUSUAL, omni

import foveate
from foveate.engine.families.parts import resolve


@pytest.mark.parametrize("name", UNUSUAL)
def test_images_without_a_tower_are_reduced_exactly(name: str):
    model, prompt = UNUSUAL[name]()
    if name.startswith("blip2"):
        _assert_exact_round_forward(model, prompt)
    else:
        assert_exact(model, prompt, draw_removed(prompt["input_ids"], {-1: [12, 11], 1: [4, 7]}))


@torch.no_grad()
def _assert_exact_round_forward(model: Any, prompt: dict[str, Any]) -> None:
    """BLIP-2's generate() calls the language model alone; the first logits are those of the reduced forward."""
    removed = draw_removed(prompt["input_ids"], {-1: [6, 7], 1: [3, 5]})
    with foveate.apply(model, Fixed(removed)) as session:
        forward = model(**prompt).logits[:, -1]
        tokens = session.trace.visual_tokens
        output = model.generate(
            **prompt, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        assert torch.equal(session.trace.visual_tokens, tokens)
        assert (output.logits[0] - forward).abs().max() < 2e-4
    assert (model(**prompt).logits[:, -1] - forward).abs().max() > 1e-2
    assert not all_removed(removed)[prompt["input_ids"] != IMAGE_TOKEN].any()


@torch.no_grad()
def test_beams_of_a_generate_that_goes_round_forward():
    model, prompt = UNUSUAL["blip2"]()
    with foveate.apply(model, foveate.Random(keep=4)) as session:
        model.generate(**prompt, max_new_tokens=2, num_beams=2, do_sample=False)
    assert session.trace.visual_tokens[:, 1].tolist() == [4] * 4


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_the_true_reason_before_anything_happens(name: str):
    make, words = REFUSED[name]
    model = make()
    before = footprint(model)
    with pytest.raises(foveate.UnsupportedError, match=words):
        foveate.apply(model, foveate.Random(keep=4))
    assert footprint(model) == before


def test_unusual_decoders_are_refused_with_slots_of_the_callers_own_too():
    make, words = REFUSED["mllama"]
    with pytest.raises(foveate.UnsupportedError, match=words):
        foveate.apply(make(), foveate.Random(keep=4), visual=torch.ones(1, 8, dtype=torch.bool))


class TestSound:
    """Only vision is visual: sound is never removed, and takes no share of a budget."""

    def prompt(self, image: bool) -> dict[str, torch.Tensor]:
        middle = [152, *[IMAGE_TOKEN] * 12, 153, 9, 10] if image else [9]
        ids = torch.tensor([[1, 5, 6, 157, *[SOUND] * 10, 158, 7, 8, *middle, 20, 21, 22]])
        noise = torch.Generator().manual_seed(1)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "input_features": torch.randn(1, 16, 40, generator=noise),
            "feature_attention_mask": torch.ones(1, 40, dtype=torch.long),
        }
        if image:
            inputs |= {
                "pixel_values": torch.randn(48, 384, generator=noise),
                "image_grid_thw": torch.tensor([[1, 8, 6]]),
            }
        return inputs

    @torch.no_grad()
    def test_a_prompt_with_sound_alone(self):
        model, prompt = omni(), self.prompt(image=False)
        plain = model(**prompt).logits
        with foveate.apply(model, foveate.FastV(keep=4, layer=1)) as session:
            reduced = model(**prompt).logits
        assert torch.equal(plain, reduced)
        assert session.trace is None

    @torch.no_grad()
    @pytest.mark.parametrize("keep", [4, 0.5])
    def test_sound_beside_an_image(self, keep: int | float):
        model, prompt = omni(), self.prompt(image=True)
        with foveate.apply(model, foveate.FastV(keep=keep, layer=1)) as session:
            model(**prompt)
        left, sound = session.trace.active(5), prompt["input_ids"] == SOUND
        assert int((left & sound).sum()) == 10
        assert session.trace.visual_tokens[0].tolist() == [12, *[4 if keep == 4 else 6] * 5]

    def test_masks_are_told_apart_by_id_where_a_family_hands_them_over_one_by_one(self):
        anatomy = resolve(omni())
        ids = torch.tensor([[5, SOUND, IMAGE_TOKEN, 6]])
        found = anatomy.visual_of(torch.tensor([[False, True, True, False]]), ids)
        assert found.tolist() == [[False, False, True, False]]
        none = torch.zeros(1, 4, dtype=torch.bool)
        sound = (ids == SOUND)[..., None].expand(-1, -1, 3)
        assert not anatomy.visual_of((none, none, sound), None).any()


@pytest.mark.parametrize("name", FAMILIES)
def test_placeholders_of_every_family_are_known(name: str):
    anatomy = resolve(build(name))
    ids = torch.tensor([[5, IMAGE_TOKEN, 7]])
    assert torch.equal(anatomy.find_placeholders(ids, None), visual_slots(ids))
