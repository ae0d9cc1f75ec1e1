"""The shipped checkpoint: loads offline, answers, and tells good choices of visual tokens from bad ones.

Floors are wide: they catch a broken checkpoint, tokenizer or processor, not a hundredth of accuracy. The measured
numbers are in the model card.
"""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from recipes.tiny_llava.evaluate import Bench

from foveate import zoo
from foveate.zoo.scenes import scenes

FOLDER = zoo.path("tiny-llava")
KEEP = 22  # of 196


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def bench():
    return Bench(FOLDER, scenes(50, seed=7))


@pytest.fixture(scope="module")
def full(bench):
    return bench.full()


def prompt(processor, question):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def answer(model, processor, image, question):
    inputs = processor(images=image, text=prompt(processor, question), return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def test_names_and_unknown_name():
    assert "tiny-llava" in zoo.names()
    with pytest.raises(ValueError, match="tiny-llava"):
        zoo.path("huge-llava")


def test_folder_is_small_and_holds_no_pickle():
    files = list(FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) < 10e6
    assert {file.suffix for file in files} <= {".json", ".jinja", ".md", ".safetensors"}


def test_loads_offline_without_warnings(monkeypatch):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, report = LlavaForConditionalGeneration.from_pretrained(FOLDER, output_loading_info=True)
        AutoProcessor.from_pretrained(FOLDER)
    assert not any(report.values()), report


def test_chat_template_and_tokenizer(processor):
    text = prompt(processor, "What color is the circle?")
    assert text == "<s> USER: <image> What color is the circle? ASSISTANT:"
    ids = processor(images=Image.new("RGB", (112, 112)), text=text, return_tensors="pt")["input_ids"][0]
    words = processor.tokenizer.convert_ids_to_tokens(ids.tolist())
    assert words[:2] == ["<s>", "USER:"]
    assert words[2:198] == ["<image>"] * 196
    assert words[198:] == ["what", "color", "is", "the", "circle", "?", "ASSISTANT:"]


def test_training_and_shipped_tokenizer_agree(processor):
    from recipes.vocabulary import encode

    for sample in scenes(20, seed=1):
        for text in (sample.question, sample.answer, sample.question.upper()):
            assert processor.tokenizer(text)["input_ids"] == encode(text)
            assert processor.tokenizer.unk_token_id not in encode(text)


def test_generation_gives_one_word_and_stops(model, processor):
    eos = processor.tokenizer.eos_token_id
    right = 0
    samples = scenes(4, seed=11)
    for sample in samples:
        new = answer(model, processor, sample.image, sample.question)
        assert len(new) == 2
        assert new[1] == eos
        right += processor.tokenizer.decode(new[:1]) == sample.answer
    assert right >= 0.7 * len(samples)


def test_answers_questions_about_a_plain_drawing(model, processor):
    from PIL import ImageDraw

    image = Image.new("RGB", (112, 112), (130, 130, 130))
    draw = ImageDraw.Draw(image)
    draw.ellipse((12, 12, 40, 40), fill=(215, 40, 40))
    draw.rectangle((70, 70, 94, 94), fill=(40, 70, 215))
    known = {
        "What color is the circle?": "red",
        "What shape is blue?": "square",
        "Is there a red circle?": "yes",
        "Is there a blue circle?": "no",
        "Where is the blue square?": "bottom-right",
    }
    given = {q: processor.tokenizer.decode(answer(model, processor, image, q)[:1]) for q in known}
    assert sum(given[q] == known[q] for q in known) >= 4, given


@pytest.mark.slow
def test_bench_is_the_model(bench, full, model, processor):
    """The measuring forward gives what the model's own forward gives."""
    for index in range(0, 60, 6):
        sample = bench.samples[index]
        new = answer(model, processor, sample.image, sample.question)[0]
        assert (processor.tokenizer.decode([new]) == sample.answer) == full[index]


def test_keeping_all_tokens_changes_nothing():
    few = Bench(FOLDER, scenes(6, seed=8))
    full = few.full()
    for layer in (0, 2):
        assert np.array_equal(few.pruned("random", 196, layer), full)


FLOORS = {"color": 0.9, "shape": 0.85, "exist": 0.85, "where": 0.85, "count": 0.8, "digit": 0.65}


@pytest.mark.slow
def test_accuracy(bench, full):
    assert full.mean() > 0.9
    for kind, floor in FLOORS.items():
        assert full[bench.kinds == kind].mean() > floor, kind


@pytest.mark.slow
def test_accuracy_on_easyvqa():
    pytest.importorskip("easy_vqa")
    from foveate.zoo.easyvqa import easyvqa

    assert Bench(FOLDER, easyvqa(count=100, seed=2)).full().mean() > 0.93


@pytest.mark.slow
def test_choices_before_the_language_model_are_told_apart(bench, full):
    cls, oracle = (bench.pruned(choice, KEEP).mean() for choice in ("CLS attention, last layer", "asked objects"))
    chance = np.mean([bench.pruned("random", KEEP, seed=seed).mean() for seed in range(3)])
    assert oracle > cls > chance + 0.1
    assert abs(oracle - full.mean()) < 0.06
    assert full.mean() > chance + 0.15


@pytest.mark.slow
def test_choices_after_the_first_layer_are_told_apart(bench):
    few = 8  # layer 0 has moved much of the answer already: only a small budget separates well
    question = bench.pruned("question tokens, max", few, layer=0).mean()
    cls = bench.pruned("CLS attention, last layer", few, layer=0).mean()
    chance = np.mean([bench.pruned("random", few, layer=0, seed=seed).mean() for seed in range(3)])
    assert question > cls + 0.02 > chance + 0.02
    assert question > chance + 0.08
