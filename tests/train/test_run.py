"""Whole runs of tiny models: reduced as in inference, the same after a kill, and refused where they must be."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViltForQuestionAnswering

import foveate
from foveate.evaluate.answer import ModelError
from foveate.evaluate.data import DataError
from foveate.train import Settings, TrainingError, run
from foveate.train.common import last_checkpoint
from foveate.train.data import evaluation
from tests.train import tiny

pytestmark = pytest.mark.slow  # whole trainings

PUMER = {"layers": [1, 3], "prune_r": 0.2, "merge_r": 0.3, "merge_text": 0.2}

KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
import foveate
from foveate.train import Settings, run

def kill(done, total):
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
chosen = json.loads(sys.argv[1])
chosen |= {"out": Path(chosen["out"]), **{name: tuple(chosen[name]) for name in ("data", "eval_data")}}
run(Settings(**chosen), foveate.PuMer(**chosen["options"]), kill)
"""


@pytest.fixture
def settings(student: Path, teacher: Path, questions: Path, tmp_path: Path) -> Settings:
    return Settings(
        "pumer", str(student), (str(questions),), tmp_path / "run", teacher=str(teacher), eval_data=(str(questions),),
        options=PUMER, steps=6, batch=4, lr=1e-3, head_lr=3, save_every=2, eval_every=3, log_every=2, augment=True,
    )  # fmt: skip


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(settings: Settings, tmp_path: Path):
    killed = dataclasses.replace(settings, out=tmp_path / "killed")
    chosen = {f.name: getattr(killed, f.name) for f in dataclasses.fields(killed)}
    environment = {**os.environ, "PYTHONPATH": str(Path(foveate.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, json.dumps(chosen, default=str)]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -signal.SIGKILL
    assert not (killed.out / "model.safetensors").exists()
    checkpoint = last_checkpoint(killed.out)
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-4"
    # A checkpoint that was being written when the power went: it must not be gone on from.
    (killed.out / "checkpoint-5").mkdir()
    (killed.out / "checkpoint-5" / "trainer_state.json").write_text('{"global_')

    steps = []
    resumed = run(killed, foveate.PuMer(**PUMER), lambda done, total: steps.append((done, total)))
    assert steps == [(5, 6), (6, 6)]
    whole = run(settings, foveate.PuMer(**PUMER))
    ours, theirs = _weights(killed.out), _weights(settings.out)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert resumed["accuracy"] == whole["accuracy"]
    assert resumed["before"] == whole["before"]
    start = load_file(Path(settings.model) / "model.safetensors")["embeddings.cls_token"]
    assert not torch.equal(ours["vilt.embeddings.cls_token"], start), "it has learnt something"
    assert any((settings.out / "runs").rglob("events.out.tfevents.*"))
    # Once done, it is done; other settings need another folder.
    assert run(settings, foveate.PuMer(**PUMER)) == json.loads((settings.out / "result.json").read_text())
    with pytest.raises(TrainingError, match=r"run.*other settings \(lr was 0.001, now 0.1\)"):
        run(dataclasses.replace(settings, lr=0.1), foveate.PuMer(**PUMER))


def test_it_is_reduced_in_training_and_in_evaluation_as_in_inference(settings: Settings, monkeypatch):
    seen: set[tuple[bool, tuple[int, ...]]] = set()
    reduce = foveate.PuMer.reduce

    def watched(self, crossmodal):
        seen.add((torch.is_grad_enabled(), tuple(crossmodal.image_mask.shape)))
        return reduce(self, crossmodal)

    monkeypatch.setattr(foveate.PuMer, "reduce", watched)
    result = run(dataclasses.replace(settings, steps=1, augment=False), foveate.PuMer(**PUMER))
    assert {shape[1] for _, shape in seen} == {17, 9}, "17 tokens enter layer 1: 3 are dropped, 5 merge"
    model = ViltForQuestionAnswering.from_pretrained(settings.out).eval()
    assert model.config.label2id == {"white": 0, "red": 1, "blue": 2, "green": 3}, "the labels of the teacher"
    processor = tiny.ViltImageProcessorPil.from_pretrained(settings.out)
    words = tiny.tokenizer()
    right = 0
    (held,) = evaluation(settings.eval_data, "vqa", 1000, False)
    with torch.no_grad(), foveate.apply(model, foveate.PuMer(**PUMER)):
        for row in map(held.row, range(held.size or 0)):
            inputs = processor(images=list(row.images), return_tensors="pt") | words([row.text], return_tensors="pt")
            inputs.pop("token_type_ids", None)
            right += model.config.id2label[int(model(**inputs).logits.argmax())] == row.answer
    assert result["accuracy"]["all"] == right / 40


def test_the_teacher_is_not_reduced_and_not_trained(settings: Settings):
    settings = dataclasses.replace(settings, steps=1, log_every=1)
    result = run(settings, foveate.PuMer(**PUMER))
    assert result["accuracy_teacher"].keys() == result["accuracy"].keys()
    record = result["history"][0]
    assert record["loss"] == pytest.approx(record["loss_task"] + record["loss_kd"], rel=1e-5)
    # A student that is its teacher, with nothing removed: nothing to learn from it.
    same = dataclasses.replace(settings, model=settings.teacher, out=settings.out / "none", method="none")
    record = run(same, None)["history"][0]
    assert record["loss_kd"] == pytest.approx(0, abs=1e-6)


HEADS = {"nlvr2": "ForImagesAndTextClassification", "retrieval": "ForImageAndTextRetrieval"}


@pytest.mark.parametrize("family", ["Vilt", "Meter"])
@pytest.mark.parametrize("task", ["vqa", "nlvr2", "ve", "retrieval"])
def test_every_task_of_every_model(family: str, task: str, folder: Path, tmp_path: Path):
    data = tiny.squares(folder, task)
    if family == "Vilt":
        model = tiny.vilt_folder(tmp_path / "model", "ViltModel")
    else:
        model = tiny.meter_folder(tmp_path / "model", "MeterModel")
    settings = Settings(
        "pumer", str(model), (str(data),), tmp_path / "run", task=task, eval_data=(str(data),), options=PUMER, steps=2,
        eval_samples=8, batch=3, lr=1e-3, head_lr=1, negatives=2, log_every=1,
    )  # fmt: skip
    result = run(settings, foveate.PuMer(**PUMER))
    assert 0 <= result["accuracy"]["all"] <= 1
    assert all(record["loss"] > 0 for record in result["history"] if "loss" in record)
    before, after = load_file(model / "model.safetensors"), _weights(settings.out)
    base = family.lower() + "."
    assert {name.removeprefix(base) for name in after} >= before.keys() - {"pooler"}
    if task == "nlvr2":
        kinds = [name for name in after if name.endswith(f"{base}token_type_embeddings.weight") or
                 (name.endswith("embeddings.token_type_embeddings.weight") and "text" not in name)]  # fmt: skip
        assert [len(after[name]) for name in kinds] == [3]
    changed = sum(not torch.equal(value, after[base + name]) for name, value in before.items()
                  if value.shape == after[base + name].shape)  # fmt: skip
    assert changed > 0.8 * len(before)


def test_refusals(settings: Settings, student: Path, teacher: Path, folder: Path, tmp_path: Path):
    pumer = foveate.PuMer(**PUMER)

    def refused(error: type[Exception], match: str, **changes):
        with pytest.raises(error, match=match):
            run(dataclasses.replace(settings, **changes), pumer)

    refused(ModelError, "nowhere.*no such folder", model="./nowhere")
    refused(ModelError, "ViltForQuestionAnswering; task nlvr2 trains", task="nlvr2", model=str(teacher), teacher=None,
            data=(str(tiny.squares(folder, "nlvr2")),))  # fmt: skip
    refused(ModelError, "'llava' model answers questions; task ve", model="zoo:tiny-llava", task="ve", teacher=None,
            data=(str(tiny.squares(folder, "ve")),))  # fmt: skip
    refused(ModelError, "has no trained head", teacher=str(student))
    refused(DataError, "no 'text'", task="ve")
    refused(DataError, "task nlvr2 needs a file", task="nlvr2", teacher=None, data=("scenes",))
    refused(DataError, r"scenes: 27 answers .* no label for \('0', '1'", data=("scenes",))
    refused(DataError, "no such file, and no data set of that name", data=("nothing",))
    refused(TrainingError, "has no checkpoint", resume=True)
    refused(foveate.UnsupportedError, "ViLT, METER, BridgeTower", model="zoo:tiny-llava", teacher=None,
            data=("scenes",), eval_data=("scenes",), eval_samples=1)  # fmt: skip
    with pytest.raises(foveate.UnsupportedError, match="ViltForQuestionAnswering"):
        run(settings, foveate.FastV(keep=0.5))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    refused(DataError, "empty.jsonl: no rows", data=(str(empty),))
    other = tmp_path / "other"
    tiny.vilt_folder(other)
    refused(TrainingError, "something else", out=other)
    assert not settings.out.exists() or not any(settings.out.glob("checkpoint-*"))


def test_rows_without_a_label_can_be_left_out(settings: Settings, folder: Path):
    path = folder / "more.jsonl"
    path.write_text(Path(settings.data[0]).read_text().replace('"answer": "red"', '"answer": "crimson"'))
    changes = {"data": (str(path),), "eval_data": (str(path),), "steps": 1}
    with pytest.raises(DataError, match=r"1 answers that the model has no label for \('crimson'\).*--skip-unknown"):
        run(dataclasses.replace(settings, **changes), None)
    result = run(dataclasses.replace(settings, skip_unknown=True, **changes), None)
    assert result["accuracy"]["all"] <= 0.75


def test_a_missing_dependency_is_named(settings: Settings, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name))
    with pytest.raises(TrainingError, match=r"accelerate: pip install 'foveate\[train\]'"):
        run(settings, None)


def test_processes_that_do_not_know_of_each_other_are_refused(settings: Settings, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="2 processes were started, but each trains alone: use accelerate launch"):
        run(settings, None)
