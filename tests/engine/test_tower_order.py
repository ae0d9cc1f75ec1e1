"""The tower's patches that a method reads for a visual slot are those the slot is made of, in every family.

Checked by changing one patch where it leaves the layer that is read: the slots that change in the decoder's input are
those whose reading changes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from packaging.version import Version
from tests import catalogue
from tests.families import (
    DECODER,
    FAMILIES,
    IMAGE_TOKEN,
    PINPOINTS,
    QWEN_TOKENS,
    TOWER,
    VIDEO_TOKEN,
    build,
    inputs,
    spread_weights,
    token_types,
)
from tests.reference.patches import disagreements
from torch import Tensor
from torch.nn.functional import pad

import foveate
from foveate.engine.families.parts import resolve
from foveate.reduction import View, VisionSpec


def assert_slots_are_judged_by_their_patches(model: Any, prompt: dict[str, Any], step: int = 3) -> None:
    wrong, found = disagreements(model, prompt, step)
    assert not wrong, f"{len(wrong)} patches, such as: {wrong[0]}"
    assert found > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str):
    model = build(name)
    assert_slots_are_judged_by_their_patches(model, inputs(name, model), step=5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "llama4", "video_llava", "lighton_ocr", "granite_docling", "muse_glimmer", "kimi_k25", "molmo2", "gemma4",
        "glm5_next", "lfm2_vl", "minicpm_ocr", "minicpmv4_6", "nemotron_h_omni",
    ],
)  # fmt: skip
def test_other_ways_from_patches_to_slots(name: str, monkeypatch: pytest.MonkeyPatch):
    # Nemotron-H's code still asks its configuration for `torch_dtype`.
    monkeypatch.setattr(hf.configuration_utils.logger, "warning_once", lambda *args, **kwargs: None)
    if not catalogue.known(name):
        pytest.skip(f"this transformers has no {name}")
    if name == "llama4" and Version(hf.__version__).release[:2] == (5, 24):
        pytest.skip("transformers 5.24 itself fails on Llama 4 with an image: its outputs have no image_outputs")
    model = catalogue.build(name)
    assert_slots_are_judged_by_their_patches(model, catalogue.inputs(name, model), step=7)


@pytest.mark.parametrize(("height", "width"), [(4, 16), (16, 4), (6, 8), (4, 6)])
def test_gemma4_says_where_its_patches_lie(height: int, width: int):
    """An oblong image of as many patches as a square one, and padded ones."""
    model = catalogue.build("gemma4")
    prompt = catalogue.inputs("gemma4", model, rows=1)
    places = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1).reshape(-1, 2)
    prompt["image_position_ids"] = pad(places, (0, 0, 0, 64 - height * width), value=-1)[None]
    excess = catalogue.visual_slots("gemma4", prompt)[0].cumsum(0) > height * width // 4
    prompt["input_ids"][0, excess & (prompt["input_ids"][0] == IMAGE_TOKEN)] = 9
    if "mm_token_type_ids" in prompt:
        prompt["mm_token_type_ids"] = (prompt["input_ids"] == IMAGE_TOKEN).int()
    assert_slots_are_judged_by_their_patches(model, prompt, step=5)


def test_molmo2_says_which_patches_are_pooled():
    """An image seen whole and in two crops that overlap: three squares, of which the crops make one oblong."""
    if not catalogue.known("molmo2"):
        pytest.skip("this transformers has no molmo2")
    model = catalogue.build("molmo2")
    prompt = catalogue.inputs("molmo2", model, rows=1)
    crops = torch.arange(64, 192).view(2, 8, 8)
    mosaic = torch.cat([crops[0, :, :6], crops[1, :, 2:]], 1)  # 8 x 12
    table = mosaic.view(4, 2, 6, 2).transpose(1, 2).reshape(24, 4)
    prompt |= {
        "pixel_values": _noise(3, 64, 192),
        "image_token_pooling": torch.cat([prompt["image_token_pooling"], table]),
        "image_grids": torch.tensor([[4, 4, 4, 6]]),
        "image_num_crops": torch.tensor([3]),
    }
    slots = catalogue.visual_slots("molmo2", prompt)[0].nonzero()[:, 0]
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in prompt:
            more = prompt[name][:, slots[:1]].expand(1, 24)
            prompt[name] = torch.cat([prompt[name][:, : slots[0]], more, prompt[name][:, slots[0] :]], 1)
    assert_slots_are_judged_by_their_patches(model, prompt, step=7)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("aria", "AriaCrossAttention"),
        ("granite4_vision", "Blip2QFormerAttention"),
        ("deepseek_ocr2", "queries of its own"),
        ("lfm3_vl", "overlapping windows"),
        ("kosmos-2", "KosmosTextAttention"),
        ("got_ocr2", "computes its attention by itself"),
        ("phi4_multimodal", "names no image encoder"),
    ],
)
def test_slots_without_patches_are_refused_with_the_reason(name: str, reason: str):
    if name == "granite4_vision" and Version(hf.__version__) < Version("5.19"):
        pytest.skip("transformers before 5.19 cannot build a Granite 4 Vision on a plain Llama")
    if not catalogue.known(name):
        pytest.skip(f"this transformers has no {name}")
    model = catalogue.build(name)
    for method in ("visionzip", "fopru"):
        with pytest.raises(foveate.UnsupportedError, match=reason):
            foveate.apply(model, foveate.build(method, keep=0.5))


def test_minicpm_merges_four_patches_less_if_asked_to():
    """Asked by the configuration or in the call, its tower leaves its own merging out."""
    if not catalogue.known("minicpmv4_6"):
        pytest.skip("this transformers has no minicpmv4_6")
    model = catalogue.build("minicpmv4_6")
    prompt = catalogue.inputs("minicpmv4_6", model, rows=1)
    repeats = torch.where(catalogue.visual_slots("minicpmv4_6", prompt)[0], 4, 1)
    for name in ("input_ids", "attention_mask"):
        prompt[name] = prompt[name].repeat_interleave(repeats, 1)
    assert_slots_are_judged_by_their_patches(model, {**prompt, "downsample_mode": "4x"}, step=7)
    model.config.downsample_mode = "4x"
    assert_slots_are_judged_by_their_patches(model, prompt, step=7)


def _noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _prompt(name: str, *ids: int, **pixels: Any) -> dict[str, Any]:
    row = torch.tensor([[1, 5, 6, 7, *ids, 8, 9, 10]])
    return {"input_ids": row, "attention_mask": torch.ones_like(row), **token_types(name, row), **pixels}


def test_paddleocr_lays_patches_row_by_row():
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = hf.PaddleOCRVLConfig(
        text_config={**DECODER, "head_dim": 16, "rope_parameters": rope},
        vision_config={**TOWER, "image_size": 64, "patch_size": 8},
        **QWEN_TOKENS,
    )
    model = spread_weights(hf.PaddleOCRVLForConditionalGeneration(config))
    pixels = {"pixel_values": _noise(48, 3, 8, 8), "image_grid_thw": torch.tensor([[1, 8, 6]])}
    assert_slots_are_judged_by_their_patches(model, _prompt("qwen2_vl", *[IMAGE_TOKEN] * 12, **pixels))


def test_an_unknown_order_of_patches_is_refused():
    model = build("qwen2_vl")
    model.config.model_type = "some_vl"
    refused = pytest.raises(foveate.UnsupportedError, match="in which order 'some_vl' models lay the patches")
    with foveate.apply(model, foveate.VisionZip(keep=0.5)), refused:
        model(**inputs("qwen2_vl", model))


class TestVideos:
    def test_llava_onevision_pools_frames_and_adds_a_newline(self):
        model = build("llava_onevision")
        prompt = _prompt("llava_onevision", *[VIDEO_TOKEN] * 17, pixel_values_videos=_noise(1, 4, 3, 32, 32))
        assert_slots_are_judged_by_their_patches(model, prompt)

    def test_llava_onevision_with_an_odd_number_of_patches_a_side(self):
        config = build("llava_onevision").config
        config.vision_config.image_size = 40  # 5 x 5 patches become 3 x 3, each of its neighbours' too
        model = spread_weights(hf.LlavaOnevisionForConditionalGeneration(config))
        prompt = _prompt("llava_onevision", *[VIDEO_TOKEN] * 19, pixel_values_videos=_noise(1, 2, 3, 40, 40))
        assert_slots_are_judged_by_their_patches(model, prompt)

    def test_llava_next_video_pools_frames(self):
        config = hf.LlavaNextVideoConfig(
            vision_config=build("llava").config.vision_config,
            text_config=hf.LlamaConfig(**DECODER),
            image_token_index=IMAGE_TOKEN,
            video_token_index=VIDEO_TOKEN,
            image_grid_pinpoints=PINPOINTS,
        )
        model = spread_weights(hf.LlavaNextVideoForConditionalGeneration(config))
        prompt = _prompt("llava_next", *[VIDEO_TOKEN] * 16, pixel_values_videos=_noise(1, 4, 3, 32, 32))
        assert_slots_are_judged_by_their_patches(model, prompt)

    @pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
    def test_an_image_and_a_video_in_one_prompt(self, name: str):
        prompt = _prompt(
            name, *[IMAGE_TOKEN] * 12, 11, *[VIDEO_TOKEN] * 32,
            pixel_values=_noise(48, 384), image_grid_thw=torch.tensor([[1, 8, 6]]),
            pixel_values_videos=_noise(128, 384, seed=4), video_grid_thw=torch.tensor([[2, 8, 8]]),
        )  # fmt: skip
        assert_slots_are_judged_by_their_patches(build(name), prompt, step=11)

    def test_images_beside_videos_of_another_size(self):
        prompt = _prompt(
            "llava_onevision", *[IMAGE_TOKEN] * 72, 11, *[VIDEO_TOKEN] * 17,
            pixel_values=_noise(1, 5, 3, 32, 32), image_sizes=torch.tensor([[60, 50]]),
            batch_num_images=torch.tensor([1]), pixel_values_videos=_noise(1, 4, 3, 32, 32, seed=4),
        )  # fmt: skip
        assert_slots_are_judged_by_their_patches(build("llava_onevision"), prompt, step=5)

    @torch.no_grad()
    def test_what_fills_up_a_shorter_block_is_no_patch(self):
        """A tile has 16 patches, a pooled frame 4."""
        prompt = _prompt(
            "llava_onevision", *[IMAGE_TOKEN] * 72, 11, *[VIDEO_TOKEN] * 17,
            pixel_values=_noise(1, 5, 3, 32, 32), image_sizes=torch.tensor([[60, 50]]),
            batch_num_images=torch.tensor([1]), pixel_values_videos=_noise(1, 4, 3, 32, 32, seed=4),
        )  # fmt: skip
        model, seen = build("llava_onevision"), []

        class Look(foveate.Reducer):
            stages, vision_taps = (-1,), {-1: VisionSpec("received", key=True, features=True)}

            def decide(self, view: View) -> None:
                seen.append(view)

        with foveate.apply(model, Look()):
            model(**prompt)
        patches = seen[0].vision[-1]
        assert patches.slots.shape[1] == 16
        assert patches.valid.sum(1).tolist()[-4:] == [4] * 4
        listed = patches.slots[patches.valid]
        assert len(listed.unique()) == len(listed)
        assert bool(seen[0].visual[0, listed].all())
        for values in (patches.attention.mean(1), patches.key.flatten(2).norm(dim=2), patches.features.norm(dim=2)):
            assert bool((values > 0).eq(patches.valid)[-4:].all())

    @torch.no_grad()
    def test_earlier_videos_are_forgotten(self):
        model = build("qwen2_vl")
        image = _prompt(
            "qwen2_vl", *[IMAGE_TOKEN] * 12, pixel_values=_noise(48, 384), image_grid_thw=torch.tensor([[1, 8, 6]])
        )
        video = _prompt(
            "qwen2_vl", *[VIDEO_TOKEN] * 32,
            pixel_values_videos=_noise(128, 384), video_grid_thw=torch.tensor([[2, 8, 8]]),
        )  # fmt: skip
        with foveate.apply(model, foveate.VisionZip(keep=0.5)) as session:
            expected = model(**image).logits
            model(**video)
            assert int(session.trace.visual_tokens[0, 0]) == 16
            assert torch.equal(model(**image).logits, expected)

    @torch.no_grad()
    def test_merging_in_the_tower_is_refused_for_videos(self):
        model = build("llava_onevision")
        prompt = _prompt("llava_onevision", *[VIDEO_TOKEN] * 17, pixel_values_videos=_noise(1, 4, 3, 32, 32))
        refused = pytest.raises(foveate.UnsupportedError, match="not for videos")
        with foveate.apply(model, foveate.ToMe(keep=0.5)), refused:
            model(**prompt)


class TestResampledTokens:
    def idefics2(self) -> Any:
        perceiver = {"hidden_size": 64, "resampler_n_latents": 16, "resampler_depth": 1, "resampler_n_heads": 4}
        config = hf.Idefics2Config(
            text_config=hf.MistralConfig(**DECODER, head_dim=16),
            vision_config={**TOWER, "image_size": 64, "patch_size": 8},
            image_token_id=IMAGE_TOKEN,
            perceiver_config={**perceiver, "resampler_head_dim": 16, "num_key_value_heads": 2},
        )
        return spread_weights(hf.Idefics2ForConditionalGeneration(config))

    def test_methods_that_choose_by_patches_are_refused_at_apply(self):
        model = self.idefics2()
        for name in ("visionzip", "fopru", "recoverable"):
            with pytest.raises(foveate.UnsupportedError, match="Idefics2PerceiverAttention"):
                foveate.apply(model, foveate.build(name, keep=0.5))

    @torch.no_grad()
    def test_other_methods_work_and_claim_no_place_in_the_image(self):
        model = self.idefics2()
        prompt = _prompt("idefics2", *[IMAGE_TOKEN] * 16, pixel_values=_noise(1, 1, 3, 64, 64))
        with foveate.apply(model, foveate.FastV(keep=4, layer=1)) as session:
            model(**prompt)
        assert session.trace.visual_tokens[0, -1] == 4
        assert not session.trace.layout.known


class TestFeatureLayers:
    """`vision_feature_layer` is an index into the hidden states: 0 is the embeddings, -1 the last layer's output."""

    def llava(self, layer: int | list[int]) -> Any:
        config = build("llava").config
        config.vision_feature_layer = layer
        return spread_weights(hf.LlavaForConditionalGeneration(config))

    @pytest.mark.parametrize(
        ("layer", "last"), [(-2, -2), (3, -2), (4, -1), (1, -4), ([-4, -2], -2), ([1, 3], -2), ([4, -3], -1)]
    )
    def test_the_layer_that_is_read_is_the_deepest_that_is_used(self, layer: int | list[int], last: int):
        model = self.llava(layer)
        assert resolve(model).vision_layer == last
        prompt = _prompt("llava", *[IMAGE_TOKEN] * 16, pixel_values=_noise(1, 3, 32, 32))
        assert_slots_are_judged_by_their_patches(model, prompt)

    @torch.no_grad()
    @pytest.mark.parametrize("method", ["tome", "visionzip", "fopru", "recoverable", "prumerge"])
    def test_positive_and_negative_layers_are_one(self, method: str):
        prompt = _prompt("llava", *[IMAGE_TOKEN] * 16, pixel_values=_noise(1, 3, 32, 32))
        logits = []
        for layer in (-2, 3):
            with foveate.apply(self.llava(layer), foveate.build(method, keep=0.5)) as session:
                logits.append(session.anatomy.model(**prompt).logits)
        assert torch.equal(*logits)

    @pytest.mark.parametrize("layer", [0, 5, -5, [-2, 0]])
    def test_layers_outside_the_tower_are_refused(self, layer: int | list[int]):
        with pytest.raises(foveate.UnsupportedError, match="vision_feature_layer"):
            foveate.apply(self.llava(layer), foveate.VisionZip(keep=0.5))

    @torch.no_grad()
    def test_a_call_that_asks_for_another_layer_is_refused(self):
        model = self.llava(-2)
        prompt = _prompt("llava", *[IMAGE_TOKEN] * 16, pixel_values=_noise(1, 3, 32, 32))
        with foveate.apply(model, foveate.VisionZip(keep=0.5)):
            model(**prompt, vision_feature_layer=3)  # the same in other words
            with pytest.raises(foveate.UnsupportedError, match="vision_feature_layer=-1"):
                model(**prompt, vision_feature_layer=-1)
