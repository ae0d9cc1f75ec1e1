"""Our METER against the official one in plain PyTorch, its checkpoint layouts, and the manners of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from foveate import models
from foveate.models.meter_keys import convert_state_dict, resize_positions
from tests.reducers.encoders import encoder, inputs, meter_config
from tests.reference.checks import largest
from tests.reference.meter import OfficialMeter

HEADS = {"num_attention_heads": 4}
SIZES = {**HEADS, "vision_config": HEADS, "text_config": HEADS}
CLASSES = [name for name in models.__all__ if name.startswith("MeterFor") or name == "MeterModel"]


def official(pumer: bool, **options: int) -> OfficialMeter:
    torch.manual_seed(2)
    model = OfficialMeter(pumer, **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    return model


@pytest.fixture
def prompt() -> dict[str, Tensor]:
    return inputs(encoder("MeterForQuestionAnswering"))


@pytest.mark.parametrize("pumer", [False, True])
@torch.no_grad()
def test_official_weights_give_the_official_answer(pumer: bool, prompt: dict[str, Tensor]) -> None:
    reference = official(pumer)
    model = models.MeterForQuestionAnswering.from_official(reference.checkpoint(), **SIZES)
    assert model.config.image_sees_text == ("after" if pumer else "before")
    assert (model.config.num_labels, model.config.vision_config.image_size) == (7, 48)
    pooled = reference.pooled(prompt["input_ids"], prompt["attention_mask"], prompt["pixel_values"])
    assert largest(model.meter(**prompt).pooler_output - pooled) <= 1e-4
    assert largest(model(**prompt).logits - reference.vqa_classifier(pooled)) <= 1e-4
    base = models.MeterModel.from_official(reference.checkpoint(), **SIZES)
    assert largest(base(**prompt).pooler_output - model.meter(**prompt).pooler_output) <= 1e-6


@pytest.mark.parametrize("pumer", [False, True])
@torch.no_grad()
def test_two_images(pumer: bool) -> None:
    reference = official(pumer, images=2, labels=2)
    model = models.MeterForImagesAndTextClassification.from_official(reference.checkpoint("nlvr2_classifier"), **SIZES)
    prompt = inputs(model)
    ids, mask, pixels = (prompt[name] for name in ("input_ids", "attention_mask", "pixel_values"))
    pooled = torch.cat([reference.pooled(ids, mask, pixels[:, i], i + 1) for i in range(2)], -1)
    assert largest(model(**prompt).logits - reference.vqa_classifier(pooled)) <= 1e-4


@pytest.mark.parametrize("kind", ["lightning", "bin", "safetensors", "folder"])
def test_kinds_of_files(tmp_path: Path, kind: str) -> None:
    state = official(kind != "lightning").checkpoint("ve_classifier")
    path = tmp_path / {"lightning": "meter.ckpt", "safetensors": "model.safetensors"}.get(kind, "pytorch_model.bin")
    if kind == "safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if kind == "lightning" else state, path)
    model = models.MeterForVisualEntailment.from_official(tmp_path if kind == "folder" else path, **SIZES)
    direct = models.MeterForVisualEntailment.from_official(state, **SIZES)
    ours, theirs = model.state_dict(), direct.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="pytorch_model"):
        models.MeterModel.from_official(tmp_path)


def test_pretrained_weights_leave_a_fresh_head() -> None:
    state = official(False).checkpoint()
    state = {name: value for name, value in state.items() if not name.startswith("vqa")}
    state |= {"itm_score.fc.weight": torch.randn(2, 64), "itm_score.fc.bias": torch.randn(2)}
    state |= {"mlm_score.bias": torch.zeros(50)}
    model = models.MeterForQuestionAnswering.from_official(state, **SIZES, num_labels=11)
    assert model.classifier[3].weight.shape == (11, 64)
    pair = models.MeterForImagesAndTextClassification.from_official(state, **SIZES)
    kinds = pair.meter.token_type_embeddings.weight
    assert torch.equal(kinds[2], kinds[1])
    ranked = models.MeterForImageAndTextRetrieval.from_official(state, **SIZES)
    assert torch.equal(ranked.rank_output.weight, state["itm_score.fc.weight"][1:])


def test_unknown_and_missing_weights() -> None:
    state = official(True).checkpoint()
    with pytest.raises(KeyError, match="mystery"):
        convert_state_dict({**state, "meter.mystery.weight": torch.zeros(1)})
    del state["meter.cross_modal_text_layers.1.output.dense.bias"]
    with pytest.raises(RuntimeError, match="Missing"):
        models.MeterForQuestionAnswering.from_official(state, **SIZES)


@torch.no_grad()
def test_another_image_size() -> None:
    state = official(True).checkpoint()
    model = models.MeterForQuestionAnswering.from_official(state, image_size=64, **SIZES)
    assert model.config.vision_config.image_size == 64
    prompt = inputs(model)
    prompt["pixel_values"] = torch.randn(3, 3, 64, 64)
    assert model.meter(**prompt).image_features.shape == (3, 65, 32)
    flat = torch.cat([torch.zeros(1, 4), torch.ones(36, 4) * 3])
    assert torch.allclose(resize_positions(flat, 64)[1:], torch.full((64, 4), 3.0))
    assert resize_positions(flat, 36) is flat


# ------------------------------------------------------------------------------------------------- manners
@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_save_and_load(tmp_path: Path, name: str) -> None:
    model = encoder(name)
    model.save_pretrained(tmp_path)
    again = getattr(models, name).from_pretrained(tmp_path).eval()
    assert type(again.config) is models.MeterConfig
    assert again.config.to_dict().keys() == model.config.to_dict().keys()
    assert again.config.vision_config.patch_size == 8
    prompt = inputs(model)
    ours, theirs = model(**prompt), again(**prompt)
    assert largest(ours[0] - theirs[0]) <= 1e-6


@torch.no_grad()
def test_base_and_head_share_weights(tmp_path: Path) -> None:
    model = encoder("MeterForQuestionAnswering")
    model.save_pretrained(tmp_path / "head")
    base = models.MeterModel.from_pretrained(tmp_path / "head").eval()
    prompt = inputs(model)
    assert largest(base(**prompt).pooler_output - model.meter(**prompt).pooler_output) <= 1e-6
    base.save_pretrained(tmp_path / "base")
    again = models.MeterForQuestionAnswering.from_pretrained(tmp_path / "base").eval()
    assert largest(again.meter(**prompt).pooler_output - base(**prompt).pooler_output) <= 1e-6


@torch.no_grad()
def test_eager_is_sdpa_and_maps_are_maps() -> None:
    model = encoder("MeterModel")
    eager = models.MeterModel._from_config(model.config, attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    prompt = inputs(model)
    ours = eager(**prompt, output_attentions=True, output_hidden_states=True)
    assert largest(ours.pooler_output - model(**prompt).pooler_output) <= 1e-5
    assert len(ours.attentions) == 4
    assert [tuple(m.shape[2:]) for m in ours.attentions[0]] == [(11, 11), (11, 37), (37, 37), (37, 11)]
    padding = prompt["attention_mask"] == 0
    for own, _, _, image_to_text in ours.attentions:
        assert largest(own.sum(1).sum(1)[padding]) == 0
        assert largest(image_to_text.sum(1).sum(1)[padding]) == 0
    assert len(ours.hidden_states) == 5
    assert torch.equal(ours.hidden_states[-1][1], ours.image_features)
    assert isinstance(model(**prompt, return_dict=False), tuple)


def test_losses_and_training() -> None:
    torch.manual_seed(0)
    labels = {
        "MeterForQuestionAnswering": torch.rand(3, 7), "MeterForVisualEntailment": torch.tensor([0, 2, 1]),
        "MeterForImageAndTextRetrieval": torch.tensor([1.0, 0, 0]),
        "MeterForImagesAndTextClassification": torch.tensor([0, 1, 1]),
    }  # fmt: skip
    for name, answers in labels.items():
        model = encoder(name)
        output = model(**inputs(model), labels=answers)
        assert output.loss.dim() == 0
        output.loss.backward()
        missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing, missing
        model.zero_grad(set_to_none=True)


def test_fresh_weights_and_bad_input() -> None:
    model = models.MeterForQuestionAnswering(meter_config())
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert 0.01 < float(model.meter.cross_modal_text_transform.weight.detach().std()) < 0.03
    assert float(model.classifier[1].weight.detach().std()) == 0
    with pytest.raises(ValueError, match="image_sees_text"):
        models.MeterConfig(image_sees_text="never")
    prompt = inputs(model)
    with pytest.raises(ValueError, match="pixel_values"):
        model(prompt["input_ids"])
    pair = encoder("MeterForImagesAndTextClassification")
    with pytest.raises(ValueError, match="B, 2, 3"):
        pair(**prompt)
    config = meter_config()
    config.modality_type_vocab_size = 2
    with pytest.raises(ValueError, match="modality_type_vocab_size"):
        models.MeterForImagesAndTextClassification(config)


def test_the_default_is_the_published_size() -> None:
    config = models.MeterConfig()
    assert (config.vision_config.patch_size, config.vision_config.num_hidden_layers) == (16, 11)
    assert (config.text_config.vocab_size, config.text_config.hidden_size) == (50265, 768)
    with torch.device("meta"):
        model = models.MeterForQuestionAnswering(models.MeterConfig(num_labels=3129))
    assert 310e6 < sum(parameter.numel() for parameter in model.parameters()) < 350e6
