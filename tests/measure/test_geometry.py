"""Presets and configs give the sizes that the models have."""

from __future__ import annotations

import json

import pytest
import transformers as hf

from foveate.measure import PRESETS, Geometry
from tests import families


def test_presets_are_consistent():
    for name, geometry in PRESETS.items():
        assert geometry.name == name
        assert geometry.text_tokens == 118
        assert geometry.heads % geometry.kv_heads == 0
        assert len(geometry.sliding_layers) in (0, geometry.layers)
        assert geometry.note


def test_llava_is_the_paper_s():
    geometry = Geometry.preset("LLaVA-1.5-7B")
    assert (geometry.layers, geometry.hidden_size, geometry.intermediate_size) == (32, 4096, 11008)
    assert geometry.visual_tokens + geometry.text_tokens == 694


def test_gemma_slides_in_five_of_six_layers():
    geometry = Geometry.preset("gemma-3-4b")
    assert [geometry.window(layer) for layer in range(6)] == [1024] * 5 + [None]


@pytest.mark.parametrize("name", ["no-such-model", "llava-1.5"])
@pytest.mark.parametrize("read", [Geometry.preset, Geometry.of])
def test_unknown_name_lists_the_presets(read, name):
    with pytest.raises(ValueError, match=f"{name}.*llava-1.5-7b.*paligemma-3b"):
        read(name)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_config_of_every_family(name):
    config = families.build(name).config
    geometry = Geometry.from_config(config, visual_tokens=30, text_tokens=7)
    assert (geometry.layers, geometry.hidden_size, geometry.intermediate_size) == (6, 64, 128)
    assert (geometry.heads, geometry.kv_heads, geometry.head_dim) == (4, 2, 16)
    assert (geometry.vocab_size, geometry.visual_tokens, geometry.text_tokens) == (200, 30, 7)
    assert (geometry.sliding_window is None) == (name not in ("gemma3", "gemma3_window", "aya_vision", "mistral3"))


@pytest.mark.parametrize(
    "name", ["llava", "vipllava", "internvl", "idefics3", "smolvlm", "gemma3", "paligemma", "aya_vision", "mistral3"]
)
def test_image_tokens_follow_from_the_config(name):
    assert Geometry.from_config(families.build(name).config).visual_tokens == 16


def test_dynamic_resolution_asks_for_the_number():
    with pytest.raises(ValueError, match="visual_tokens"):
        Geometry.from_config(families.build("qwen2_vl").config)


def test_saved_config_equals_the_object(tmp_path):
    config = families.build("llava").config
    config.save_pretrained(tmp_path)
    assert Geometry.of(tmp_path) == Geometry.of(str(tmp_path / "config.json")) == Geometry.of(config)
    assert Geometry.of(tmp_path, visual_tokens=9, text_tokens=3).visual_tokens == 9


def test_a_saved_config_leaves_out_the_defaults(tmp_path):
    """LLaVA's published config.json says almost nothing about its decoder: the class does."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}}))
    assert Geometry.of(path, visual_tokens=576).with_prompt() == Geometry(
        "llava", 32, 4096, 11008, 32, 32, 128, 32064, 576
    )


def test_remote_code_config_is_read_as_it_is(tmp_path):
    decoder = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "my_vlm", "vocab_size": 11, "llm_config": decoder}))
    geometry = Geometry.of(tmp_path)
    assert geometry == Geometry("my_vlm", 3, 64, 96, 4, 4, 16, 11, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "JSON object"),
        ('{"hidden_size": 8}', "num_attention_heads"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "not a valid llama config"),
        ('{"model_type": "llama", "num_hidden_layers": 0}', "layers=0"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Geometry.of(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        Geometry.of(tmp_path / "..")


def test_mixture_of_experts_is_refused():
    with pytest.raises(ValueError, match="mixture of experts"):
        Geometry.of(hf.MixtralConfig())


@pytest.mark.parametrize("prompt", [{"visual_tokens": -1}, {"text_tokens": -5}])
def test_negative_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="at least 0"):
        Geometry.of("llava-1.5-7b", **prompt)
