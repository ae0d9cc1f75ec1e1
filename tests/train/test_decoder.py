"""Decoder VLMs: labels on answers alone, LoRA under reduction, adapters that peft loads, exact resumption."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import foveate
from foveate.evaluate.answer import ModelError, load
from foveate.train import Settings, run
from foveate.train.data import Endless
from foveate.train.decoder import IGNORED, AnswerCollator, adapt
from foveate.zoo import path

pytestmark = pytest.mark.slow  # whole trainings


@pytest.fixture(scope="module")
def vlm():
    return load("zoo:tiny-llava")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        "fastv", "zoo:tiny-llava", ("scenes",), tmp_path / "run", options={"keep": 0.25}, steps=3, batch=2, lr=1e-3,
        lora_rank=2, save_every=1, eval_every=100, eval_samples=2, log_every=1, keep_checkpoints=1,
    )  # fmt: skip


def test_labels_are_the_answer_and_the_end(vlm):
    rows = [Endless("scenes", 1).row(index) for index in range(6)]
    batch = AnswerCollator(vlm)(list(enumerate(rows)))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
    for row, ids, mask, labels in zip(rows, batch["input_ids"], batch["attention_mask"], batch["labels"]):
        learnt = labels != IGNORED
        assert torch.equal(labels[learnt], ids[learnt])
        assert mask[learnt].all()
        assert not (learnt & (ids == vlm.model.config.image_token_index)).any()
        assert labels[learnt][-1] == vlm.tokenizer.eos_token_id
        assert vlm.tokenizer.decode(labels[learnt][:-1]).strip() == row.answer
        prompt = vlm.tokenizer(vlm.prompt(row.text)).input_ids
        assert [int(i) for i in ids[mask.bool() & ~learnt] if i != vlm.model.config.image_token_index] == [
            i for i in prompt if i != vlm.model.config.image_token_index
        ]
    with torch.no_grad():
        loss = vlm.model(**batch).loss
        alone = [vlm.model(**AnswerCollator(vlm)([(0, row)])).loss for row in rows]
    assert loss.item() == pytest.approx(sum(map(float, alone)) / 6, rel=1e-3), "padding changes nothing"


def test_where_adapters_go(settings: Settings):
    model = adapt(load("zoo:tiny-llava").model, settings)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("language_model" in name and "lora_" in name for name in names)
    assert len(names) == 2 * 6 * 7  # A and B, layers, linear layers in each
    chosen = dataclasses.replace(settings, lora_targets=("k_proj",))
    names = {n for n, p in adapt(load("zoo:tiny-llava").model, chosen).named_parameters() if p.requires_grad}
    assert len(names) == 2 * (6 + 6)  # the vision tower has six, too
    with pytest.raises(ModelError, match="lora_targets nothing"):
        adapt(load("zoo:tiny-llava").model, dataclasses.replace(settings, lora_targets=("nothing",)))


class Stop(Exception):
    """Ends a run from outside."""


def test_lora_under_reduction_resumes_exactly_and_loads(settings: Settings, tmp_path: Path, vlm):
    from peft import PeftModel

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise Stop

    cut = dataclasses.replace(settings, out=tmp_path / "cut")
    with pytest.raises(Stop):
        run(cut, foveate.FastV(keep=0.25), stop)
    run(cut, foveate.FastV(keep=0.25))
    run(settings, foveate.FastV(keep=0.25))
    ours, theirs = (load_file(out / "adapter_model.safetensors") for out in (cut.out, settings.out))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(value.abs().sum() > 0 for name, value in ours.items() if "lora_B" in name), "every adapter has moved"

    row = AnswerCollator(vlm)([(0, Endless("scenes", 9).row(0))])
    with torch.no_grad():
        plain = vlm.model(**row).logits
        model = PeftModel.from_pretrained(load("zoo:tiny-llava").model, settings.out)
        adapted = model(**row).logits
    assert not torch.equal(plain, adapted)
    assert (settings.out / "tokenizer.json").exists()
    assert path("tiny-llava").exists()


def test_all_weights_with_a_teacher(settings: Settings):
    chosen = dataclasses.replace(settings, lora_rank=0, steps=1, lr=None, teacher="zoo:tiny-llava")
    record = run(chosen, foveate.FastV(keep=0.25))["history"][0]
    assert record["loss_kd"] > 0
    assert record["loss"] == pytest.approx(record["loss_task"] + record["loss_kd"], rel=1e-5)
    assert record["learning_rate"] <= 2e-5
    assert (chosen.out / "model.safetensors").exists()
