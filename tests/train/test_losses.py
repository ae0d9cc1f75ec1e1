"""Losses against their formulas, labels, and which parameter learns how fast."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from foveate.evaluate.data import DataError
from foveate.train.losses import distillation, matching_loss, rank_scores, row_scores, task_loss
from foveate.train.settings import Settings, preset, same_run
from foveate.train.trainer import groups
from foveate.train.vocabulary import Vocabulary, is_generic

torch.manual_seed(0)
LOGITS, TEACHER = torch.randn(5, 4), torch.randn(5, 4)


def test_distillation_is_kl_from_the_teacher_mean_over_rows():
    total = 0.0
    for row, wanted in zip(LOGITS.tolist(), TEACHER.tolist()):
        p, q = ([math.exp(x) / sum(map(math.exp, r)) for x in r] for r in (wanted, row))
        total += sum(a * math.log(a / b) for a, b in zip(p, q))
    assert distillation(LOGITS, TEACHER).item() == pytest.approx(total / 5, rel=1e-5)
    assert distillation(LOGITS, LOGITS).item() == pytest.approx(0, abs=1e-6)


def test_task_losses():
    soft = torch.tensor([[1.0, 0.3, 0, 0]] * 5)
    p = LOGITS.sigmoid()
    by_hand = -(soft * p.log() + (1 - soft) * (1 - p).log()).mean()
    assert task_loss("vqa", LOGITS, soft).item() == pytest.approx(by_hand.item(), rel=1e-5)
    labels = torch.tensor([0, 1, 2, 3, 0])
    by_hand = -LOGITS.log_softmax(1)[torch.arange(5), labels].mean()
    for task in ("nlvr2", "ve", "retrieval"):
        assert task_loss(task, LOGITS, labels).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_ranking_and_matching():
    one, two = torch.randn(6, 1), torch.randn(6, 2)
    assert torch.equal(rank_scores(one, 3), one.view(2, 3))
    assert torch.equal(rank_scores(two, 3), two[:, 1].view(2, 3))
    assert matching_loss(one, 3) is None
    matching = matching_loss(two, 3)
    right = torch.tensor([1, 0, 0, 1, 0, 0])
    assert matching is not None
    assert matching.item() == pytest.approx(-two.log_softmax(1)[torch.arange(6), right].mean().item(), rel=1e-5)


def test_scores_of_rows():
    logits = torch.tensor([[0.0, 2, 1], [3, 0, 0]])
    assert row_scores("ve", logits, torch.tensor([1, 2])).tolist() == [1, 0]
    assert row_scores("vqa", logits, torch.tensor([[0, 0.3, 1], [1.0, 0, 0]])).tolist() == pytest.approx([0.3, 1])


def test_labels():
    words = Vocabulary({"two": 0, "red": 1, "top-left": 2})
    assert [words.find(answer) for answer in ("two", "2", "Red.", "top left", "blue")] == [0, 0, 1, 2, None]
    assert words.target("red").tolist() == [0, 1, 0]
    assert words.target(("2", "two", "red", "blue")).tolist() == pytest.approx([0.6, 0.3, 0])
    assert words.target(("red",) * 7).tolist() == [0, 1, 0]
    assert words.target("blue").tolist() == [0, 0, 0]
    assert words.label(("red", "two", "2")) == 0
    assert words.label("blue") == -1
    with pytest.raises(DataError, match=r"some.jsonl: 1 answers .*'blue'"):
        words.must_know(["red", "blue"], "some.jsonl")
    assert Vocabulary.of(["b", "a", "b"]).label2id == {"a": 0, "b": 1}
    assert is_generic({"LABEL_0": 0, "LABEL_1": 1})
    assert not is_generic({"yes": 0, "no": 1})


def test_the_papers_rates():
    assert preset("vilt", "vqa") == preset("vilt", "ve")
    assert (preset("vilt", "vqa").lr, preset("vilt", "vqa").head_lr, preset("vilt", "vqa").batch) == (1e-4, 10, 64)
    assert preset("vilt", "nlvr2").batch == 32
    meter = preset("meter", "vqa")
    assert (meter.lr, meter.head_lr, meter.cross_lr, meter.batch) == (5e-6, 50, 5, 32)
    entailment = preset("meter", "ve")
    assert (entailment.lr, entailment.head_lr, entailment.cross_lr, entailment.batch) == (2e-6, 10, 5, 24)
    chosen = Settings("pumer", "m", ("d",), None, teacher="t").filled("vilt", 6400, 2)  # type: ignore[arg-type]
    assert chosen.steps == 20 * 6400 / (64 * 2)
    assert Settings("pumer", "m", ("d",), None).filled("vilt", 640, 1).steps == 100  # type: ignore[arg-type]
    assert (chosen.weight_decay, chosen.warmup, chosen.seed, chosen.clip) == (0.01, 0.1, 2021, 0)


def test_heads_and_cross_modal_layers_learn_faster_and_norms_do_not_decay():
    model = nn.ModuleDict({
        "text": nn.Linear(2, 2), "LayerNorm": nn.LayerNorm(2), "cross_modal_text_layers": nn.Linear(2, 2),
        "classifier": nn.Sequential(nn.Linear(2, 2)), "frozen": nn.Linear(2, 2).requires_grad_(False),
    })  # fmt: skip
    settings = Settings("pumer", "m", ("d",), None, lr=1e-3, head_lr=50, cross_lr=5)  # type: ignore[arg-type]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in groups(model.named_parameters(), settings)
        for parameter in group["params"]
    }
    assert found == {
        "text.weight": (1e-3, 0.01), "text.bias": (1e-3, 0.0), "LayerNorm.weight": (1e-3, 0.0),
        "LayerNorm.bias": (1e-3, 0.0), "cross_modal_text_layers.weight": (5e-3, 0.01),
        "cross_modal_text_layers.bias": (5e-3, 0.0), "classifier.0.weight": (0.05, 0.01),
        "classifier.0.bias": (0.05, 0.0),
    }  # fmt: skip


def test_what_makes_two_runs_the_same():
    def identity(**options):
        return Settings("pumer", "m", ("d",), None, **options).identity(1)  # type: ignore[arg-type]

    assert same_run(identity(save_every=5, workers=2), identity(save_every=7)) is None
    assert same_run(identity(options={"merge_r": 0.3}), identity()) == "options was {'merge_r': 0.3}, now {}"
    assert same_run(identity(seed=1), identity(seed=2)) == "seed was 1, now 2"
