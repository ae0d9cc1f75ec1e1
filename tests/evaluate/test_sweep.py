"""A sweep in its folder: killed, gone on with, refused; and what comes of it."""

import json
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch

from foveate.evaluate.answer import load
from foveate.evaluate.grid import FULL
from foveate.evaluate.results import verdicts
from foveate.evaluate.runner import Runner
from foveate.evaluate.store import Folder, Plan, SweepError
from foveate.evaluate.sweep import fingerprint, questions, sweep
from foveate.recipe import Recipe

RECIPES = [
    Recipe("random", {}, 0.2, 0), Recipe("random", {}, 0.2, 1), Recipe("visionzip", {}, 0.2),
    Recipe("sparsevlm", {}, 0.2),
]  # fmt: skip


@pytest.fixture(scope="module")
def vlm():
    return load("zoo:tiny-llava")


@pytest.fixture(scope="module")
def asked():
    return questions(["easy-vqa", "scenes"], 10, 0, "auto")


def plan(vlm, recipes=RECIPES, **changes):
    fixed = {"model": "zoo:tiny-llava", "data": ["easy-vqa", "scenes"], "samples": 10, "seed": 0, "metric": "auto",
             "max_new_tokens": 4, "batch_size": 4, "weights": fingerprint(vlm.model)}  # fmt: skip
    return Plan(**{**fixed, **changes}, recipes=[FULL, *recipes])


def run(folder, vlm, asked, recipes=RECIPES, workers=1, timing_batches=0, **changes):
    return sweep(Folder(folder), plan(vlm, recipes, **changes), vlm, asked, workers, timing_batches, timing_repeats=1)


@pytest.fixture(scope="module")
def finished(vlm, asked, tmp_path_factory):
    """A sweep that nobody disturbed."""
    folder = tmp_path_factory.mktemp("sweep")
    run(folder, vlm, asked)
    return folder


def lines(folder):
    return [line for path in folder.glob("answers*.jsonl") for line in path.read_bytes().split(b"\n")[:-1]]


def test_what_is_in_the_folder(finished):
    names = {path.name for path in finished.iterdir()} - {".lock"}
    assert names == {"sweep.json", "samples.jsonl", "answers.jsonl", "result.json"}
    written = json.loads((finished / "sweep.json").read_text())
    assert written["version"] == 2
    assert [each["id"] for each in written["recipes"]] == [
        "full", "random@0.2#0", "random@0.2#1", "visionzip@0.2", "sparsevlm@0.2",
    ]  # fmt: skip
    answers = [json.loads(line) for line in lines(finished)]
    assert [(row["recipe"], row["sample"]) for row in answers] == [
        (each["id"], i) for each in written["recipes"] for i in range(20)
    ]
    columns = "recipe sample predicted score same kl visual_tokens entering after flops flops_total kv_bytes error"
    assert " ".join(answers[0]) == columns
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert [row["sample"] for row in samples] == list(range(20))
    assert samples[0].keys() == {"sample", "data", "image_id", "kind", "question", "answer"}


def test_rows_are_the_means_of_the_answers(finished):
    result = json.loads((finished / "result.json").read_text())
    answers = [json.loads(line) for line in lines(finished)]
    assert [row["id"] for row in result["rows"]] == ["full", "random@0.2", "visionzip@0.2", "sparsevlm@0.2"]
    for row in result["rows"]:
        mine = [each for each in answers if each["recipe"].split("#")[0] == row["id"]]
        full = [each for each in answers if each["recipe"] == "full"]
        assert len(mine) == 20 * max(1, len(row["seeds"]))
        assert row["accuracy"] == pytest.approx(np.mean([each["score"] for each in mine]))
        assert row["agreement"] == pytest.approx(np.mean([each["same"] for each in mine]))
        assert row["kl"] == pytest.approx(np.mean([each["kl"] for each in mine]))
        for ratio, column in (("flops_ratio", "flops"), ("flops_total_ratio", "flops_total"), ("kv_ratio", "kv_bytes")):
            expected = np.mean([each[column] for each in mine]) / np.mean([each[column] for each in full])
            assert row[ratio] == pytest.approx(expected)
        assert row["prefill_ms"] is None
    assert result["rows"][1]["seeds"] == [0, 1]
    for cost, column in (("tokens", "visual_tokens_entering"), ("flops", "flops_total_ratio")):
        front = [row for row in result["rows"] if row["pareto"][cost]]
        assert max(result["rows"], key=lambda row: (row["accuracy"], -row[column])) in front
        assert min(result["rows"], key=lambda row: (row[column], -row["accuracy"])) in front
        by_cost = [row["accuracy"] for row in sorted(front, key=lambda row: row[column])]
        assert by_cost == sorted(by_cost)
    assert result["rows"][2]["random_row"] == "random@0.2"
    assert result["samples"] == 20


def _killed(folder, vlm, asked, answers):
    """Run the sweep in a process that is killed as soon as the folder holds that many answers."""
    child = os.fork()
    if child == 0:
        try:
            run(folder, vlm, asked)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 60
    while len(lines(folder)) < answers and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it was done before it could be killed"


@pytest.mark.slow
def test_killed_twice_and_gone_on_with(vlm, asked, finished, tmp_path, monkeypatch):
    _killed(tmp_path, vlm, asked, 7)
    first = len(lines(tmp_path))
    with open(tmp_path / "answers.jsonl", "ab") as file:  # as if the kill had come in the middle of a line
        file.write(b'{"recipe": "random@0.2#0", "sam')
    _killed(tmp_path, vlm, asked, first + 25)
    second = len(lines(tmp_path))
    assert first < second < 100
    answered = []
    inner = Runner.ask

    def counted(self, batch, wanted):
        for records in inner(self, batch, wanted):
            answered.extend(records)
            yield records

    monkeypatch.setattr(Runner, "ask", counted)
    run(tmp_path, vlm, asked)
    assert len(answered) == 100 - second  # nothing finished was asked again: kills came between batches
    keys = [(row["recipe"], row["sample"]) for row in map(json.loads, lines(tmp_path))]
    assert len(keys) == len(set(keys)) == 100
    for name in ("result.json", "answers.jsonl", "samples.jsonl"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.slow
def test_a_batch_that_was_written_in_part_is_completed(vlm, asked, finished, tmp_path):
    kept = lines(finished)[:37]
    (tmp_path / "answers.jsonl").write_bytes(b"\n".join(kept) + b"\n" + kept[0][:50])
    for name in ("sweep.json", "samples.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    run(tmp_path, vlm, asked)
    assert (tmp_path / "answers.jsonl").read_bytes() == (finished / "answers.jsonl").read_bytes()
    assert (tmp_path / "result.json").read_bytes() == (finished / "result.json").read_bytes()


@pytest.mark.slow
def test_two_processes_give_the_same_result(vlm, asked, finished, tmp_path):
    seen = []
    sweep(
        Folder(tmp_path), plan(vlm), vlm, asked, workers=2, timing_batches=0, progress=lambda *at: seen.append(at)
    )  # fmt: skip
    assert (tmp_path / "result.json").read_bytes() == (finished / "result.json").read_bytes()
    assert [path.name for path in tmp_path.glob("answers*")] == ["answers.jsonl"]
    assert seen[-1][0] > seen[0][0]


def test_a_process_that_fails_is_reported(vlm, asked, tmp_path, monkeypatch):
    (tmp_path / "python").write_text("#!/bin/sh\necho 'line 1\nzoo:gone is not there' >&2\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(SweepError, match="a worker failed: zoo:gone is not there"):
        run(tmp_path / "out", vlm, asked, workers=2)


@pytest.mark.slow
def test_a_finished_sweep_can_be_given_more_recipes(vlm, asked, finished, tmp_path):
    run(tmp_path, vlm, asked, RECIPES[1:2])
    result = run(tmp_path, vlm, asked)
    assert json.loads(json.dumps(result)) == json.loads((finished / "result.json").read_text())


def test_a_folder_of_an_older_version_is_gone_on_with(vlm, asked, finished, tmp_path, monkeypatch):
    """Version 1 wrote "contestants" in the plan and "contestant" in each answer."""
    plan = json.loads((finished / "sweep.json").read_text())
    plan |= {"version": 1, "contestants": plan.pop("recipes")}
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    rows = [json.loads(line) for line in lines(finished)]
    older = [{"contestant": row.pop("recipe"), **row} for row in rows]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in older))
    (tmp_path / "samples.jsonl").write_bytes((finished / "samples.jsonl").read_bytes())
    monkeypatch.setattr(Runner, "ask", None)  # nothing is asked again
    run(tmp_path, vlm, asked)
    for name in ("result.json", "answers.jsonl", "sweep.json"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 8}, "batch_size was 4, now it is 8"),
        ({"seed": 1}, "seed was 0, now it is 1"),
        ({"data": ["scenes"]}, "data was easy-vqa,scenes, now it is scenes"),
        ({"weights": "0"}, "weights was"),
        ({"recipes": RECIPES[:2]}, "sparsevlm@0.2, visionzip@0.2 took part"),
    ],
)
def test_another_plan_is_refused(vlm, asked, finished, changes, said):
    before = (finished / "sweep.json").read_bytes()
    with pytest.raises(SweepError, match=said) as raised:
        run(finished, vlm, asked, **changes)
    assert "\n" not in str(raised.value)
    assert str(finished) in str(raised.value)
    assert (finished / "sweep.json").read_bytes() == before


def test_other_questions_under_the_same_name_are_refused(vlm, asked, finished):
    others = questions(["easy-vqa", "scenes"], 10, 5, "auto")
    with pytest.raises(SweepError, match="questions of easy-vqa, scenes are others"):
        run(finished, vlm, others)


def test_folders_that_cannot_be_used(vlm, asked, finished, tmp_path):
    with Folder(finished).locked(), pytest.raises(SweepError, match="another sweep is at work"):
        run(finished, vlm, asked)
    (tmp_path / "file").write_text("")
    with pytest.raises(SweepError, match="cannot be written"):
        run(tmp_path / "file" / "x", vlm, asked)
    (tmp_path / "answers.jsonl").write_text("")
    with pytest.raises(SweepError, match=r"no sweep\.json"):
        run(tmp_path, vlm, asked)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(SweepError, match=r"sweep\.json: cannot be read"):
        run(tmp_path, vlm, asked)


def test_a_broken_line_in_the_middle_is_named(vlm, asked, finished, tmp_path):
    for name in ("sweep.json", "samples.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    (tmp_path / "answers.jsonl").write_bytes(lines(finished)[0] + b"\nnonsense\n" + lines(finished)[1] + b"\n")
    with pytest.raises(SweepError, match=r"answers\.jsonl, line 2"):
        run(tmp_path, vlm, asked)


def test_times_are_taken_once_for_the_first_seed(vlm, asked, finished, tmp_path):
    for path in finished.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    result = run(tmp_path, vlm, asked, timing_batches=1)
    times = json.loads((tmp_path / "times.json").read_text())
    assert times.keys() == {"full", "random@0.2#0", "visionzip@0.2", "sparsevlm@0.2"}
    assert times["full"]["q1"] <= times["full"]["prefill_ms"] <= times["full"]["q3"]
    assert [row["prefill_ms"] for row in result["rows"]] == [each["prefill_ms"] for each in times.values()]
    assert any(row["pareto"]["ms"] for row in result["rows"])
    assert run(tmp_path, vlm, asked, timing_batches=1) == result


def test_weights_tell_models_apart(vlm):
    before = fingerprint(vlm.model)
    with torch.no_grad():
        vlm.model.lm_head.weight[0, 0] += 1
        assert fingerprint(vlm.model) != before
        vlm.model.lm_head.weight[0, 0] -= 1


def test_verdict_at_equal_compute():
    """Rows with their difference and p: two that would pass alone fail among four (Holm)."""
    versus = {"better": (0.1, 0.001), "worse": (-0.1, 0.001), "luck": (0.02, 0.03), "more luck": (0.02, 0.04)}
    rows = [{"id": "random@0.1", "method": "random", "versus": {}}]
    for name, (difference, p) in versus.items():
        rows.append({"id": name, "method": name, "versus": {"random": {"difference": difference, "p": p}}})
    rows.append({"id": "cheap", "method": "cheap", "versus": {"random": None}})
    assert verdicts(rows) == {
        "random": {"better": ["better"], "worse": ["worse"], "open": ["luck", "more luck"], "uncompared": ["cheap"]}
    }
