"""The shipped ViLT and its PuMer student: load offline, answer held-out questions, and the student with fewer tokens.

Floors are wide: they catch a broken checkpoint, processor or reduction. The measured numbers are in the model cards.
"""

import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import foveate
from foveate import zoo
from foveate.zoo.easyvqa import easyvqa
from foveate.zoo.scenes import Sample, scenes
from foveate.zoo.train import vilt_card, vilt_reduced, vilt_stages
from foveate.zoo.train.vilt_model import ANSWERS, LOWER, encode

TEACHER, STUDENT = "tiny-vilt", "tiny-vilt-pumer"
PUMER = {"task": "vqav2"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    pytest.importorskip("easy_vqa")
    return scenes(20, seed=83) + easyvqa("test", 60, seed=3)


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    from transformers import AutoProcessor, ViltForQuestionAnswering

    found: dict[str, Any] = {"processor": AutoProcessor.from_pretrained(zoo.path(TEACHER))}
    for name in (TEACHER, STUDENT):
        found[name] = ViltForQuestionAnswering.from_pretrained(zoo.path(name), dtype=torch.float32).eval()
    return found


@torch.inference_mode()
def right(model: Any, processor: Any, samples: list[Sample]) -> np.ndarray:
    """Whether each answer is right."""
    hits: list[bool] = []
    for first in range(0, len(samples), 32):
        rows = samples[first : first + 32]
        images, questions = [row.image for row in rows], [row.question for row in rows]
        logits = model(**processor(images, questions, padding=True, return_tensors="pt")).logits
        said = [model.config.id2label[index] for index in logits.argmax(-1).tolist()]
        hits += [answer == row.answer for answer, row in zip(said, rows)]
    return np.array(hits)


@pytest.fixture(scope="module")
def teacher_hits(loaded, samples) -> np.ndarray:
    return right(loaded[TEACHER], loaded["processor"], samples)


@pytest.mark.parametrize("name", [TEACHER, STUDENT])
def test_folder_is_small_and_holds_no_pickle(name):
    assert name in zoo.names()
    files = list(zoo.path(name).iterdir())
    assert sum(file.stat().st_size for file in files) < 10e6
    assert {file.suffix for file in files} <= {".json", ".md", ".safetensors"}


@pytest.mark.parametrize("name", [TEACHER, STUDENT])
def test_loads_offline_through_the_auto_classes_without_warnings(name, monkeypatch):
    from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, report = AutoModelForVisualQuestionAnswering.from_pretrained(zoo.path(name), output_loading_info=True)
        processor = AutoProcessor.from_pretrained(zoo.path(name))
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(processor).__name__ == "ViltProcessor"
    assert [model.config.id2label[i] for i in range(len(ANSWERS))] == list(ANSWERS)
    text = "What shape is red?"
    inputs = processor(Image.new("RGB", (64, 64)), text, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == encode(text)
    assert inputs["pixel_values"].shape == (1, 3, 112, 112)


def test_teacher_answers(teacher_hits):
    assert teacher_hits[:100].mean() > 0.8
    assert teacher_hits[100:].mean() > 0.85


def test_student_answers_with_fewer_tokens(loaded, samples, teacher_hits):
    teacher = teacher_hits.mean()
    with foveate.apply(loaded[STUDENT], foveate.PuMer(**PUMER)) as session:
        student = right(loaded[STUDENT], loaded["processor"], samples).mean()
        tokens = session.trace.visual_tokens
    assert student > teacher - 0.05
    expected = [image for _, image in vilt_card.entering(9, 197)[:-1]]
    assert tokens[0].tolist() == expected
    assert expected[-1] < 0.25 * 197


def test_cards_tell_what_was_measured():
    for name in (TEACHER, STUDENT):
        card = (zoo.path(name) / "README.md").read_text()
        assert "$" not in card
        assert "easy-vqa" in card.lower()


def test_flops_of_the_card_are_those_counted(loaded):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, counted = loaded[STUDENT], {}
    inputs = loaded["processor"](Image.new("RGB", (112, 112)), "what color is the circle?", return_tensors="pt")
    tokens = vilt_card.entering(inputs["input_ids"].shape[1], 197)
    for name, layers in (("full", [tokens[0]] * len(tokens)), ("reduced", tokens)):
        session = foveate.apply(model, foveate.PuMer(**PUMER)) if name == "reduced" else None
        # The counter knows the products of the plain attention, not the fused kernel of CPUs.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(**inputs)
        if session is not None:
            session.remove()
        counted[name] = counter.get_total_flops() / vilt_card.flops(layers)
    assert counted["full"] == pytest.approx(1, abs=0.03)
    assert counted["reduced"] == pytest.approx(1, abs=0.05)


@torch.no_grad()
def test_training_computes_what_transformers_computes(loaded):
    """The first packed question of an image is what ViLT answers to it alone, whatever else is packed with it."""
    model = loaded[TEACHER]
    drawn = [vilt_stages._scene(np.random.default_rng(seed), (3, 5), 0.0) for seed in range(2)]
    packed = vilt_stages.pack(drawn)
    images = vilt_stages.embed_image(model, vilt_stages.pixels(drawn))
    states = torch.cat([vilt_stages.embed_text(model, packed), images], 1)
    mask = vilt_stages.joint_mask(packed.segments, images.shape[1], True)
    states = vilt_stages.run(model.vilt.encoder.layer[:LOWER], states, mask)
    logits, _ = vilt_stages.answer(model, states, mask, packed)
    for row, example in enumerate(drawn):
        first = int((packed.rows == row).nonzero()[0, 0])
        image = Image.fromarray(example.pixels)
        alone = model(**loaded["processor"](image, example.questions[0].text, return_tensors="pt")).logits[0]
        torch.testing.assert_close(logits[first], alone, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_the_student_stage_reduces_as_pumer_does(loaded, samples):
    model, rows = loaded[STUDENT], samples[:100:17]
    with foveate.apply(model, foveate.PuMer(**PUMER)):
        for row in rows:
            inputs = loaded["processor"](row.image, row.question, return_tensors="pt")
            own = vilt_reduced.answer_reduced(model, inputs["input_ids"][:, None], inputs["pixel_values"])[0, 0]
            torch.testing.assert_close(model(**inputs).logits[0], own, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_questions_of_the_student_stage_do_not_see_each_other(loaded):
    """All but the first, which the image sees: whatever text stands beside a question, with the same tokens left."""
    model = loaded[STUDENT]
    (drawn,) = [vilt_stages._scene(np.random.default_rng(5), (3, 5), 0.0)]
    ids, answers, _ = vilt_reduced.grid([drawn])
    logits = vilt_reduced.answer_reduced(model, ids, vilt_stages.pixels([drawn]))[0, answers[0] >= 0]
    order = [0, *range(len(logits) - 1, 0, -1)]
    turned = vilt_reduced.answer_reduced(model, ids[:, order], vilt_stages.pixels([drawn]))[0]
    torch.testing.assert_close(turned, logits[order], atol=2e-4, rtol=1e-4)


def test_every_stage_runs(tmp_path):
    """One step of each stage from nothing, with one worker, leaves a model and a log."""
    from foveate.zoo.train.loop import Place, finished

    for name, stage in {**vilt_stages.STAGES, "reduced": vilt_reduced.reduced}.items():
        stage(Place(tmp_path), 1, batch=1)
        assert finished(tmp_path, name, 1)
        assert json.loads((tmp_path / f"{name}.jsonl").read_text().splitlines()[-1])["loss"] > 0
    assert vilt_stages.load_model(tmp_path, 0, "reduced").config.num_labels == len(ANSWERS)
