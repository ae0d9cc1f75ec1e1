"""Answers, batches, scores and the comparison, on the shipped model."""

import pytest
import torch
import transformers as hf

import foveate
from foveate.evaluate.answer import ModelError, answer, batches, load
from foveate.evaluate.compare import compare, costs
from foveate.evaluate.costs import sample_costs
from foveate.evaluate.data import load as data
from foveate.evaluate.score import accuracy, agreement, matches, normalise
from foveate.measure import prefill_flops
from foveate.recipe import Recipe


@pytest.fixture(scope="module")
def vlm():
    return load("zoo:tiny-llava")


@pytest.mark.parametrize(
    ("said", "normal"),
    [("The top-left.", "top left"), ("Two", "2"), (" a  RED  star! ", "red star"), ("3.5", "3.5"), ("it_is", "it is")],
)
def test_normalise(said, normal):
    assert normalise(said) == normal


def test_scores():
    assert matches("Three", "3")
    assert not matches("", "no")
    assert accuracy(["a star", "no"], ["star", "yes"]) == 0.5
    assert agreement(["x y"], ["X, y."]) == 1
    with pytest.raises(ValueError, match="nothing to score"):
        accuracy([], [])
    with pytest.raises(ValueError, match="2 answers against 1"):
        accuracy(["a", "b"], ["a"])


def test_batches_hold_every_sample_once_without_padding(vlm):
    samples = data("scenes", 23)
    found = list(batches(vlm, samples, size=4))
    assert sorted(i for batch in found for i in batch.indices) == list(range(23))
    for batch in found:
        assert len(batch.indices) <= 4
        assert batch.inputs["attention_mask"].all()
        assert [samples[i] for i in batch.indices] == batch.samples


def test_a_padded_batch_answers_as_one_by_one(vlm):
    samples = data("scenes", 6)
    together = answer(vlm, vlm.inputs(samples))
    alone = [answer(vlm, vlm.inputs([sample])) for sample in samples]
    assert together.texts == [one.texts[0] for one in alone]
    torch.testing.assert_close(together.log_probs, torch.cat([one.log_probs for one in alone]), atol=1e-3, rtol=1e-3)


def test_prompt_without_chat_template(vlm, monkeypatch):
    with_template = vlm.prompt("what shape is red?")
    monkeypatch.setattr(vlm.processor, "chat_template", None)
    assert vlm.prompt("what shape is red?") == "<s>USER: <image>\nwhat shape is red? ASSISTANT:"
    assert with_template.count("<image>") == 1
    assert with_template.count("<s>") == 1


@pytest.mark.slow
def test_comparison(vlm):
    sets = {"easy-vqa": data("easy-vqa", 12), "scenes": data("scenes", 12)}
    recipes = [Recipe("fastv", {}, 1.0), Recipe("random", {}, 4, 0)]
    seen = []
    rows = compare(vlm, sets, recipes, batch_size=4, timing_repeats=1, progress=lambda *at: seen.append(at))
    full, nothing, few = rows
    assert (72, 72) in seen  # answers
    assert seen[-1][0] == seen[-1][1] < 72  # times
    assert [row["id"] for row in rows] == ["full", "fastv@1", "random@4"]
    assert full["accuracy"] > 0.7
    assert full["accuracy"] == pytest.approx(sum(full["accuracy_by_data"].values()) / 2)
    assert [full[name] for name in ("agreement", "flops_ratio", "flops_total_ratio", "kv_ratio", "relative")] == [1] * 5
    assert [nothing[name] for name in ("accuracy", "agreement", "flops_ratio")] == [full["accuracy"], 1, 1]
    assert nothing["kl"] == pytest.approx(0, abs=1e-6)
    assert nothing["p_full"] == 1
    assert (few["visual_tokens_entering"], few["visual_tokens_after"]) == (4, 4)
    assert few["kl"] > 0.01
    assert few["flops_ratio"] < 0.2
    assert few["flops_ratio"] < few["flops_total_ratio"] < 1
    assert few["kv_ratio"] < 0.2
    assert few["prefill_ms"] > 0
    assert few["prefill_ms_full"] == full["prefill_ms"]
    assert few["accuracy_ci"][0] <= few["accuracy"] <= few["accuracy_ci"][1]
    contract = {"method", "options", "keep", "accuracy", "accuracy_full", "relative", "agreement", "kl", "flops_ratio",
            "visual_tokens_entering", "visual_tokens_after", "kv_ratio", "prefill_ms", "prefill_ms_full"}  # fmt: skip
    assert contract <= set(few)


def test_costs_of_samples_do_not_depend_on_their_company(vlm):
    samples = data("scenes", 6)
    with foveate.apply(vlm.model, foveate.Random(keep=7)) as session:
        answer(vlm, vlm.inputs(samples))
    together = sample_costs(vlm, session.trace, vlm.inputs(samples))
    for sample, bill in zip(samples, together, strict=True):
        with foveate.apply(vlm.model, foveate.Random(keep=7)) as session:
            answer(vlm, vlm.inputs([sample]))
        assert sample_costs(vlm, session.trace, vlm.inputs([sample])) == [bill]
    total = costs(vlm, session.trace)
    assert total.flops < prefill_flops(vlm.model, session.trace, vlm.inputs([sample])).total == together[-1].flops_total


def test_costs_follow_the_trace(vlm):
    sample = data("scenes", 1)
    with foveate.apply(vlm.model, foveate.VTW(layer=3)) as session:
        answer(vlm, vlm.inputs(sample))
    ours, full = costs(vlm, session.trace), costs(vlm, session.trace, full=True)
    text = vlm.inputs(sample)["input_ids"].shape[1] - 196
    per_token = 2 * 4 * 48 * 4
    assert full.kv_bytes == per_token * 6 * (196 + text)
    assert ours.kv_bytes == per_token * (3 * 196 + 6 * text)
    assert (ours.entering, ours.after) == (98, pytest.approx(196 * 2 / 6))


@pytest.mark.parametrize(
    ("config", "why"), [(hf.BertConfig(), "takes no images"), (hf.ViltConfig(), "sees images but generates no text"),
                        (hf.CLIPConfig(), "sees images but generates no text")]
)  # fmt: skip
def test_models_that_cannot_be_asked(config, why, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"a '{config.model_type}' model {why}"):
        load(str(tmp_path))


def test_models_that_are_not_there(tmp_path):
    for name, said in (
        (str(tmp_path / "x"), "no such folder"),
        ("zoo:x", "tiny-llava"),
        (str(tmp_path), "config.json"),
    ):
        with pytest.raises(ModelError, match=said):
            load(name)
    (tmp_path / "weights.gguf").write_text("")
    with pytest.raises(ModelError, match="a file"):
        load(str(tmp_path / "weights.gguf"))
    with pytest.raises(ModelError, match="float16"):
        load("zoo:tiny-llava", dtype="float16")
