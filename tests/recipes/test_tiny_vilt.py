"""The training of the tiny ViLT and its student: packing and reducing there are what ViLT and PuMer do."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from recipes.loop import Place, finished
from recipes.tiny_vilt import reduced, stages
from recipes.tiny_vilt.model import ANSWERS, LOWER

import foveate
from foveate import zoo
from foveate.zoo.scenes import scenes


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    from transformers import AutoProcessor, ViltForQuestionAnswering

    found: dict[str, Any] = {"processor": AutoProcessor.from_pretrained(zoo.path("tiny-vilt"))}
    for name in ("tiny-vilt", "tiny-vilt-pumer"):
        found[name] = ViltForQuestionAnswering.from_pretrained(zoo.path(name), dtype=torch.float32).eval()
    return found


@torch.no_grad()
def test_training_computes_what_transformers_computes(loaded):
    """The first packed question of an image is what ViLT answers to it alone, whatever else is packed with it."""
    model = loaded["tiny-vilt"]
    drawn = [stages._scene(np.random.default_rng(seed), (3, 5), 0.0) for seed in range(2)]
    packed = stages.pack(drawn)
    images = stages.embed_image(model, stages.pixels(drawn))
    states = torch.cat([stages.embed_text(model, packed), images], 1)
    mask = stages.joint_mask(packed.segments, images.shape[1], True)
    states = stages.run(model.vilt.encoder.layer[:LOWER], states, mask)
    logits, _ = stages.answer(model, states, mask, packed)
    for row, example in enumerate(drawn):
        first = int((packed.rows == row).nonzero()[0, 0])
        image = Image.fromarray(example.pixels)
        alone = model(**loaded["processor"](image, example.questions[0].text, return_tensors="pt")).logits[0]
        torch.testing.assert_close(logits[first], alone, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_the_student_stage_reduces_as_pumer_does(loaded):
    model, rows = loaded["tiny-vilt-pumer"], scenes(20, seed=83)[:100:17]
    with foveate.apply(model, foveate.PuMer(task="vqav2")):
        for row in rows:
            inputs = loaded["processor"](row.image, row.question, return_tensors="pt")
            own = reduced.answer_reduced(model, inputs["input_ids"][:, None], inputs["pixel_values"])[0, 0]
            torch.testing.assert_close(model(**inputs).logits[0], own, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_questions_of_the_student_stage_do_not_see_each_other(loaded):
    """All but the first, which the image sees: whatever text stands beside a question, with the same tokens left."""
    model = loaded["tiny-vilt-pumer"]
    (drawn,) = [stages._scene(np.random.default_rng(5), (3, 5), 0.0)]
    ids, answers, _ = reduced.grid([drawn])
    logits = reduced.answer_reduced(model, ids, stages.pixels([drawn]))[0, answers[0] >= 0]
    order = [0, *range(len(logits) - 1, 0, -1)]
    turned = reduced.answer_reduced(model, ids[:, order], stages.pixels([drawn]))[0]
    torch.testing.assert_close(turned, logits[order], atol=2e-4, rtol=1e-4)


@pytest.mark.slow
def test_every_stage_runs(tmp_path):
    """One step of each stage from nothing, with one worker, leaves a model and a log."""

    for name, stage in {**stages.STAGES, "reduced": reduced.reduced}.items():
        stage(Place(tmp_path), 1, batch=1)
        assert finished(tmp_path, name, 1)
        assert json.loads((tmp_path / f"{name}.jsonl").read_text().splitlines()[-1])["loss"] > 0
    assert stages.load_model(tmp_path, 0, "reduced").config.num_labels == len(ANSWERS)
