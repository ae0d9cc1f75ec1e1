"""The shipped companion: loads offline, belongs to the shipped tiny LLaVA, and finds what a question is about.

Floors are wide: they catch a broken checkpoint, tokenizer or tower. The measured numbers are in the model card.
"""

import warnings
from typing import ClassVar

import pytest
import torch
from recipes.tiny_clip.card import ranking, scores
from recipes.tiny_clip.model import tokenizer as training_tokenizer
from recipes.tiny_llava.evaluate import Bench

import foveate
from foveate import zoo
from foveate.reducers.similarity import CompanionSimilarity
from foveate.zoo.scenes import scenes

FOLDER, LLAVA = zoo.path("tiny-clip"), zoo.path("tiny-llava")
SAMPLES = scenes(12, seed=71)  # 60 questions


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def asked():
    return torch.stack([torch.from_numpy(sample.asked).flatten() for sample in SAMPLES])


@pytest.fixture(scope="module")
def bench():
    return Bench(LLAVA, SAMPLES)


@pytest.fixture(scope="module")
def llava():
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(LLAVA, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(LLAVA)


def test_is_named():
    assert "tiny-clip" in zoo.names()


def test_folder_is_small_and_holds_no_pickle():
    files = list(FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) < 3e6
    assert {file.suffix for file in files} <= {".json", ".md", ".safetensors"}


def test_loads_offline_without_warnings(monkeypatch):
    from transformers import AutoTokenizer, CLIPModel

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, report = CLIPModel.from_pretrained(FOLDER, output_loading_info=True)
        AutoTokenizer.from_pretrained(FOLDER)
    assert not any(report.values()), report


def test_tower_is_that_of_the_tiny_llava(llava):
    """Fails when the tiny LLaVA was trained again and its companion was not."""
    from transformers import CLIPModel

    tower = CLIPModel.from_pretrained(FOLDER, dtype=torch.float32).vision_model
    theirs = llava[0].model.vision_tower.state_dict()
    assert tower.config.hidden_act == llava[0].config.vision_config.hidden_act
    assert tower.state_dict().keys() == theirs.keys()
    for name, weight in tower.state_dict().items():
        assert torch.equal(weight, theirs[name]), name


def test_words_are_those_of_the_tiny_llava(llava):
    from transformers import AutoTokenizer

    words, theirs = AutoTokenizer.from_pretrained(FOLDER), llava[1].tokenizer
    for text in {sample.question for sample in SAMPLES}:
        ids = words(text)["input_ids"]
        assert ids[1:-1] == theirs(text)["input_ids"]
        assert (ids[0], ids[-1]) == (theirs.bos_token_id, words.eos_token_id)
        assert words.eos_token_id not in ids[:-1]
        assert ids == training_tokenizer()(text)["input_ids"]
    filled = words("red circle", padding="max_length")["input_ids"]
    assert len(filled) == words.model_max_length == 32


@pytest.mark.parametrize("layer", [-1, -2])
def test_asked_patches_score_higher(bench, asked, layer):
    found = ranking(scores(FOLDER, SAMPLES, layer), asked)
    cls = ranking(bench.last_cls[bench.image], asked)
    chance = ranking(torch.rand(asked.shape, generator=torch.Generator().manual_seed(0)), asked)
    assert found["n"] > 50
    assert found["auc"] > 0.9
    assert found["auc"] > cls["auc"] + 0.05
    assert found["recall"] > cls["recall"] + 0.1
    assert cls["recall"] > chance["recall"]


def test_ranking_of_known_scores():
    asked = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    perfect = ranking(torch.tensor([[4.0, 3, 2, 1], [4, 3, 2, 1], [4, 3, 2, 1]]), asked, keep=2)
    assert perfect == {"auc": 1.0, "recall": 1.0, "n": 2}
    half = ranking(torch.tensor([[4.0, 1, 3, 2], [1, 2, 3, 4], [1, 2, 3, 4]]), asked, keep=2)
    assert half == {"auc": 0.25, "recall": 0.25, "n": 2}


class Spy(CompanionSimilarity):
    """Remembers its last scores."""

    last: ClassVar = []

    def __call__(self, view):
        self.last[:] = [super().__call__(view)]
        return self.last[0]


def test_a_method_sees_the_same_scores(llava):
    """Question read from the prompt, pixels read from the call: the engine's way gives the card's scores."""
    model, processor = llava
    sample = SAMPLES[0]
    content = [{"type": "image"}, {"type": "text", "text": sample.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=sample.image, text=prompt, return_tensors="pt")
    spy = Spy(FOLDER, tokenizer=processor.tokenizer)
    with torch.no_grad(), foveate.apply(model, foveate.Recoverable(keep=22, similarity=spy)) as session:
        model(**inputs)
    assert int(session.trace.visual_tokens[0, 0]) == 22
    seen = spy.last[0][0][inputs["input_ids"][0] == model.config.image_token_id]
    assert torch.allclose(seen, scores(FOLDER, [sample])[0], atol=0.02)  # the companion is loaded in fp16 there
