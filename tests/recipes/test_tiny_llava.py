"""The training code: packing changes nothing, a restart changes nothing, labels say what is there."""

import functools

import numpy as np
import pytest
import torch
from recipes.examples import CENTER, COLOR, OWNER, PATCHES, SHAPE
from recipes.loop import Place, Stage
from recipes.tiny_llava.answering import answer_loss, pack
from recipes.tiny_llava.evaluate import margin
from recipes.tiny_llava.model import PatchHeads, Symbols, build, look
from recipes.tiny_llava.stages import _symbol_tokens
from recipes.vocabulary import COLOR_WORDS, SHAPE_WORDS, UNKNOWN, VOCABULARY, encode

from foveate.zoo import scenes
from foveate.zoo.easyvqa import easyvqa
from recipes import examples, loop


@pytest.fixture(scope="module")
def model():
    return build(0).eval()


def drawn(count=3, questions=5):
    rng = np.random.default_rng(0)
    return [examples.symbolic(rng, questions, (3, 5), 0.0) for _ in range(count)]


@torch.no_grad()
def test_packed_questions_are_answered_as_if_alone(model):
    (example,) = drawn(1)
    visual = torch.randn(1, PATCHES, 192, generator=torch.Generator().manual_seed(0))
    places = torch.arange(PATCHES)[None]
    together, _ = answer_loss(model, visual, places, pack([example.questions]))
    alone = [answer_loss(model, visual, places, pack([[question]]))[0] for question in example.questions]
    assert together.item() == pytest.approx(torch.stack(alone).mean().item(), abs=1e-4)


@torch.no_grad()
def test_packed_loss_is_the_loss_of_the_model_itself(model):
    """The training forward and transformers' own forward agree on the answer's probability."""
    (example,) = drawn(1, 1)
    question = example.questions[0]
    pixels = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    tokens = model.model.multi_modal_projector(look(model, pixels)[0])
    loss, _ = answer_loss(model, tokens, torch.arange(PATCHES)[None], pack([[question]]))
    words = encode(question.text)
    ids = torch.tensor([[1, 5, *[4] * PATCHES, *words, 6, *encode(question.answer)]])
    logits = model(input_ids=ids, pixel_values=pixels).logits[0].log_softmax(-1)
    answer, end = -logits[-2, ids[0, -1]], -logits[-1, 2]
    assert loss.item() == pytest.approx(((answer + 0.1 * end) / 1.1).item(), abs=1e-4)


def test_labels_describe_the_objects():
    rng = np.random.default_rng(5)
    things = scenes.place(rng)
    scene = scenes.paint(rng, things, "train")
    labels = examples.labels(things, scene.owner)
    assert labels[:, CENTER].sum() == len(things)
    for row in labels[labels[:, OWNER] > 0]:
        thing = things[row[OWNER] - 1]
        assert SHAPE_WORDS[row[SHAPE] - 1] == thing.shape
        assert COLOR_WORDS[row[COLOR] - 1] == thing.color
    assert not labels[labels[:, OWNER] == 0].any()


@pytest.mark.parametrize("count", [8, 48, PATCHES])
def test_symbol_tokens_hold_every_centre(count):
    batch = drawn(6)
    _, places = _symbol_tokens(np.random.default_rng(0), batch, count)
    assert places.shape == (6, count)
    assert (places.diff(dim=1) > 0).all()
    for row, example in zip(places.tolist(), batch):
        assert set(np.flatnonzero(example.labels[:, CENTER])) <= set(row)


def test_every_word_of_the_data_is_known():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        for question in scenes.ask(rng, scenes.place(rng), 30):
            assert UNKNOWN not in encode(question.text) + encode(question.answer)
            assert len(encode(question.answer)) == 1
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def test_heads_and_symbols_take_easyvqa_images(model, monkeypatch):
    pytest.importorskip("easy_vqa")
    monkeypatch.setattr(examples, "_easy_images", functools.cache(lambda: examples._by_image(easyvqa(count=100))))
    rng = np.random.default_rng(0)
    batch = [examples.easy(rng, 3) for _ in range(4)]
    labels = torch.from_numpy(np.stack([example.labels for example in batch]))
    loss, _ = PatchHeads()(torch.randn(4, PATCHES, 128), torch.randn(4, 128), torch.randn(4, 128), labels)
    assert loss.isfinite()
    tokens = Symbols(model.get_input_embeddings().weight)(labels.clamp(min=0), torch.arange(PATCHES))
    assert tokens.shape == (4, PATCHES, 192)


class Interrupted(Exception):
    pass


def train(folder, stop_at=None):
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)

    def loss(rng, step):
        if step == stop_at:
            raise Interrupted
        value = module(torch.from_numpy(rng.standard_normal((4, 3), dtype=np.float32))).pow(2).mean()
        return value, {"half": (1, 2)}

    Stage("toy", 10, {"module": module}, {"module": 1e-2}, loss).run(Place(folder))
    return module.weight.detach()


def test_a_restarted_stage_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY", 3)
    monkeypatch.setattr(loop, "REPORT_EVERY", 2)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", stop_at=7)
    assert not loop.finished(tmp_path / "parts", "toy", 10)
    assert torch.equal(train(tmp_path / "parts"), whole)
    assert loop.finished(tmp_path / "parts", "toy", 10)
    assert loop.progress(tmp_path / "parts", "toy")["half"] == 0.5


def test_margin_is_paired_and_clustered():
    better, worse = np.array([1, 1, 1, 0]), np.array([1, 0, 0, 0])
    mean, error = margin(better, worse, np.array([0, 1, 1, 2]))
    assert mean == 0.5
    # Deviations -.5 | .5 + .5 | -.5, summed by image: sqrt(.25 + 1 + .25) / 4.
    assert error == pytest.approx(np.sqrt(1.5) / 4)
