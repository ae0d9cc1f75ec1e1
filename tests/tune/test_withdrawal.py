"""VTW's search, against one full forward per layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
import transformers as hf
from torch import Tensor

import foveate
from foveate.tune import DEFAULT_ETA, ETA_PRESETS, choose_layer, next_token_divergence, withdrawal_curve
from tests import families
from tests.reference.checks import build_once, footprint

DEPTH = families.N_LAYERS


@torch.no_grad()
def slow_curve(model, batch: dict, first: int, visual: Tensor | None = None) -> Tensor:
    """One whole pass per layer, as the official search does it."""
    mask = batch.get("attention_mask")
    last = -1 if mask is None else (mask * torch.arange(mask.shape[1])).argmax(1)
    rows = torch.arange(len(next(iter(batch.values())) if mask is None else mask))
    full = model(**batch).logits[rows, last]
    columns = []
    for layer in range(first, len(model.get_decoder().layers)):
        with foveate.apply(model, foveate.VTW(layer=layer), visual=visual):
            log_p, log_q = model(**batch).logits[rows, last].log_softmax(-1), full.log_softmax(-1)
        columns.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.stack(columns, 1)


@contextlib.contextmanager
def counted(model) -> Iterator[list[int]]:
    """Tokens that the layers really compute, one entry per layer and pass."""
    tokens: list[int] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[0] * args[0].shape[1]))
        for layer in model.get_decoder().layers
    ]
    try:
        yield tokens
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", families.FAMILIES)
def test_it_equals_one_full_pass_per_layer(name: str):
    model = build_once(name)
    batch = families.inputs(name, model, batch=2)
    curve = withdrawal_curve(model, [batch], first_layer=0)
    assert curve.dtype == torch.float32
    assert curve.shape == (2, DEPTH)
    torch.testing.assert_close(curve, slow_curve(model, batch, 0), atol=1e-5, rtol=0)
    assert curve.min() > 1e-4


def test_eager_attention():
    model = build_once("gemma3_window", "eager")
    batch = families.inputs("gemma3_window", model, batch=2)
    torch.testing.assert_close(withdrawal_curve(model, [batch], 2), slow_curve(model, batch, 2), atol=1e-5, rtol=0)


def test_samples_of_all_batches_and_several_images():
    model = build_once("llava")
    batches = [
        families.inputs("llava", model, batch=2, images=[1, 3]),
        families.inputs("llava", model, batch=1, seed=9),
    ]
    curve = withdrawal_curve(model, batches, first_layer=2)
    assert curve.shape == (3, DEPTH - 2)
    torch.testing.assert_close(curve, torch.cat([slow_curve(model, batch, 2) for batch in batches]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_singles_padded_on_either_side(side: str):
    model = build_once("llava")
    batch = families.inputs("llava", model, batch=3)
    singles = []
    for row in range(3):
        start = int(batch["attention_mask"][row].argmax())
        singles.append(
            {
                "input_ids": batch["input_ids"][row : row + 1, start:].clone(),
                "attention_mask": batch["attention_mask"][row : row + 1, start:].clone(),
                "pixel_values": batch["pixel_values"][row : row + 1],
            }
        )
        if side == "right":
            for key in ("input_ids", "attention_mask"):
                batch[key][row] = batch[key][row].roll(-start)
    curve = withdrawal_curve(model, [batch], first_layer=1)
    torch.testing.assert_close(curve, withdrawal_curve(model, singles, first_layer=1), atol=1e-5, rtol=0)


def test_a_row_without_image_does_not_diverge():
    model = build_once("llava")
    curve = withdrawal_curve(model, [families.inputs("llava", model, batch=2, images=[0, 1])], first_layer=1)
    assert curve[0].abs().max() < 1e-6
    assert curve[1].min() > 1e-4


def test_a_text_decoder_with_embeddings_of_your_own():
    config = hf.LlamaConfig(**families.DECODER)
    model = families.spread_weights(hf.LlamaForCausalLM(config))
    embeds = torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(0))
    visual = torch.zeros(2, 30, dtype=torch.bool)
    visual[0, 4:20], visual[1, 2:9], visual[1, 12:25] = True, True, True
    batch = {"inputs_embeds": embeds}
    curve = withdrawal_curve(model, [batch, batch], first_layer=0, visual=visual)
    expected = slow_curve(model, batch, 0, visual)
    torch.testing.assert_close(curve, torch.cat([expected, expected]), atol=1e-5, rtol=0)
    assert torch.equal(withdrawal_curve(model, [batch, batch], 0, visual=[visual, visual]), curve)
    with pytest.raises(foveate.OptionError, match="1 masks for 2 batches"):
        withdrawal_curve(model, [batch, batch], 0, visual=[visual])


def test_decoder_layers_that_return_tuples():
    tower = {"embed_dim": 8, "num_embeddings": 32, "resolution": 32, "latent_channels": 8, "base_channels": 32}
    tower |= {"channel_multiplier": [1], "num_res_blocks": 1}
    config = hf.ChameleonConfig(**families.DECODER, vq_config=tower, vocabulary_map={"<image>": families.IMAGE_TOKEN})
    model = hf.ChameleonForConditionalGeneration(config).eval()
    ids = torch.randint(5, 90, (1, 30), generator=torch.Generator().manual_seed(0))
    ids[0, 3:20] = families.IMAGE_TOKEN
    visual, batch = families.visual_slots(ids), {"input_ids": ids}
    curve = withdrawal_curve(model, [batch], first_layer=0, visual=visual)
    torch.testing.assert_close(curve, slow_curve(model, batch, 0, visual), atol=1e-5, rtol=0)


def test_only_the_text_is_computed_again():
    model = build_once("llava")
    batch = families.inputs("llava", model, batch=1, before=5, after=9)
    length, first = batch["input_ids"].shape[1], 2
    text = length - int(families.visual_slots(batch["input_ids"]).sum())
    with counted(model) as ours:
        withdrawal_curve(model, [batch], first_layer=first)
    with counted(model) as official:
        slow_curve(model, batch, first)
    resumed = sum(DEPTH - layer for layer in range(first, DEPTH))
    assert sum(ours) == DEPTH * length + resumed * text
    assert sum(official) == DEPTH * length + sum(k * length + (DEPTH - k) * text for k in range(first, DEPTH))


def test_the_vision_tower_runs_once():
    model = build_once("llava")
    batch, calls = families.inputs("llava", model), []
    hook = model.get_encoder(modality="image").register_forward_hook(lambda *args: calls.append(1))
    withdrawal_curve(model, [batch], first_layer=0)
    hook.remove()
    assert len(calls) == 1


def test_progress_counts_passes():
    model = build_once("llava")
    batch = families.inputs("llava", model, batch=1)
    seen: list[tuple[int, int]] = []
    withdrawal_curve(model, [batch, batch], first_layer=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_labels_and_caches_in_a_batch_do_not_matter():
    model = build_once("llava")
    batch = families.inputs("llava", model)
    more = {**batch, "labels": batch["input_ids"].clone(), "use_cache": True, "return_dict": True}
    assert torch.equal(withdrawal_curve(model, [more], 3), withdrawal_curve(model, [batch], 3))


def test_the_model_comes_back_as_it_was():
    model = build_once("qwen3_vl")
    batch = families.inputs("qwen3_vl", model)
    before = footprint(model)
    with torch.no_grad():
        logits = model(**batch).logits
    model.train()
    model.get_decoder().norm.eval()
    withdrawal_curve(model, [batch], first_layer=0)
    assert model.training
    assert not model.get_decoder().norm.training
    model.eval()
    assert footprint(model) == before
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, logits)


@pytest.mark.parametrize("fatal", [1, 3])
def test_the_model_comes_back_after_an_exception(fatal: int):
    model = build_once("llava")
    batch = families.inputs("llava", model)
    before, calls = footprint(model), []

    def fail(module, args):
        calls.append(1)
        if len(calls) == fatal:
            raise KeyboardInterrupt

    hook = model.get_decoder().layers[4].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        withdrawal_curve(model, [batch], first_layer=1)
    hook.remove()
    assert footprint(model) == before


@pytest.mark.parametrize("first", [-1, DEPTH, 99, 2.0, "5", None, True])
def test_a_first_layer_that_is_none(first: object):
    model = build_once("llava")
    with pytest.raises(foveate.OptionError, match=f"first_layer=.*{DEPTH} decoder layers"):
        withdrawal_curve(model, [families.inputs("llava", model)], first_layer=first)


def test_the_default_first_layer_is_the_official_one():
    model = build_once("llava")
    assert withdrawal_curve(model, [families.inputs("llava", model)]).shape == (2, DEPTH - 5)


def test_what_cannot_be_searched():
    model = build_once("llava")
    batch, before = families.inputs("llava", model), footprint(model)
    with pytest.raises(foveate.OptionError, match="batches"):
        withdrawal_curve(model, [], first_layer=2)
    with pytest.raises(foveate.OptionError, match="list"):
        withdrawal_curve(model, batch, first_layer=2)
    words = {"input_ids": torch.randint(5, 90, (1, 8)), "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    with pytest.raises(foveate.OptionError, match="batch 1 has no visual token"):
        withdrawal_curve(model, [batch, words], first_layer=2)
    with pytest.raises(foveate.UnsupportedError, match="head"):
        withdrawal_curve(model.model, [batch], first_layer=2)
    assert footprint(model) == before


def test_the_first_layer_below_eta_is_chosen():
    mean = torch.tensor([0.2149, 0.0020, 0.2436, 0.0001])
    curve = torch.stack([mean * 0.5, mean * 1.5])
    assert choose_layer(curve, 0.003) == 6
    assert choose_layer(mean, 0.001) == 8
    assert choose_layer(curve, 0.003, first_layer=0) == 1
    assert choose_layer(curve, 1.0) == 5
    assert choose_layer(curve, 1e-9) is None
    assert choose_layer(torch.full((2, 3), float("nan"))) is None
    assert choose_layer(torch.empty(2, 0)) is None
    assert DEFAULT_ETA == ETA_PRESETS["llava-1.5-7b"] == 0.003


def test_the_divergence_has_the_official_direction():
    reduced, full = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([0.0, 1.0, 0.0])
    p, q = reduced.softmax(0), full.softmax(0)
    expected = sum(a * (a / b).log() for a, b in zip(p, q))
    assert next_token_divergence(reduced, full) == pytest.approx(expected.item(), rel=1e-6)
    assert next_token_divergence(reduced.half(), full.half()).dtype == torch.float32
    assert next_token_divergence(full, full) == 0
    closed = torch.tensor([0.0, 1.0, float("-inf")])
    assert torch.isfinite(next_token_divergence(closed, full))
