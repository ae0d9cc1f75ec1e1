"""The shipped ViLT and its PuMer student: load offline, answer held-out questions, and the student with fewer tokens.

Floors are wide: they catch a broken checkpoint, processor or reduction. The measured numbers are in the model cards.
"""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from recipes.tiny_vilt import card
from recipes.tiny_vilt.model import ANSWERS, encode

import foveate
from foveate import zoo
from foveate.zoo.easyvqa import easyvqa
from foveate.zoo.scenes import Sample, scenes

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


@pytest.mark.slow
def test_teacher_answers(teacher_hits):
    assert teacher_hits[:100].mean() > 0.8
    assert teacher_hits[100:].mean() > 0.85


@pytest.mark.slow
def test_student_answers_with_fewer_tokens(loaded, samples, teacher_hits):
    teacher = teacher_hits.mean()
    with foveate.apply(loaded[STUDENT], foveate.PuMer(**PUMER)) as session:
        student = right(loaded[STUDENT], loaded["processor"], samples).mean()
        tokens = session.trace.visual_tokens
    assert student > teacher - 0.05
    expected = [image for _, image in card.entering(9, 197)[:-1]]
    assert tokens[0].tolist() == expected
    assert expected[-1] < 0.25 * 197


def test_cards_tell_what_was_measured():
    for name in (TEACHER, STUDENT):
        text = (zoo.path(name) / "README.md").read_text()
        assert "$" not in text
        assert "easy-vqa" in text.lower()


def test_flops_of_the_card_are_those_counted(loaded):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, counted = loaded[STUDENT], {}
    inputs = loaded["processor"](Image.new("RGB", (112, 112)), "what color is the circle?", return_tensors="pt")
    tokens = card.entering(inputs["input_ids"].shape[1], 197)
    for name, layers in (("full", [tokens[0]] * len(tokens)), ("reduced", tokens)):
        session = foveate.apply(model, foveate.PuMer(**PUMER)) if name == "reduced" else None
        # The counter knows the products of the plain attention, not the fused kernel of CPUs.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(**inputs)
        if session is not None:
            session.remove()
        counted[name] = counter.get_total_flops() / card.flops(layers)
    assert counted["full"] == pytest.approx(1, abs=0.03)
    assert counted["reduced"] == pytest.approx(1, abs=0.05)
