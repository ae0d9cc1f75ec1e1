"""`foveate train`: one command, one line for each complaint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foveate.cli import main


def call(capsys, monkeypatch, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["foveate", "train", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def test_training_from_the_command_line(capsys, monkeypatch, student: Path, questions: Path, tmp_path: Path):
    out, result = tmp_path / "run", tmp_path / "result.json"
    arguments = (
        "pumer", "--model", student, "--data", questions, "--eval-data", questions, "--steps", 2, "--batch", 4,
        "--option", "merge_r=0.4", "--log-every", 1, "--out", out, "--json", result,
    )  # fmt: skip
    code, said, err = call(capsys, monkeypatch, *arguments)
    assert code == 0
    assert all(line.startswith("training: ") for line in err.splitlines())
    assert "step 1: loss" in said
    assert "before training" in said
    written = json.loads(result.read_text())
    assert written["options"] == {"task": "vqav2", "merge_r": 0.4}
    assert written["lr"] == 1e-4
    assert written["accuracy"].keys() == written["before"].keys() == {str(questions), "all"}
    assert written == json.loads((out / "result.json").read_text())


BAD = [
    (["pumer", "--task", "sleep"], "task 'sleep'"),
    (["nonsense"], "unknown method 'nonsense'"),
    (["none", "--keep", "3"], "method none reduces nothing"),
    (["pumer", "--option", "prune_r=2"], "prune_r=2"),
    (["pumer", "--steps", "0"], "steps=0"),
    (["pumer", "--steps", "3", "--epochs", "2"], "steps or epochs"),
    (["pumer", "--lr", "-1"], "lr=-1"),
    (["pumer", "--model", "./gone"], "./gone"),
    (["pumer", "--data", "gone.jsonl"], "gone.jsonl"),
    (["pumer", "--resume"], "no checkpoint"),
]


@pytest.mark.parametrize(("arguments", "culprit"), BAD, ids=[culprit for _, culprit in BAD])
def test_one_line_names_the_culprit(
    capsys, monkeypatch, student: Path, questions: Path, tmp_path: Path, arguments: list[str], culprit: str
):
    method, *options = arguments
    usual = {"--model": student, "--data": questions, "--out": tmp_path / "run"}
    given = [part for name, value in usual.items() if name not in options for part in (name, value)]
    code, said, err = call(capsys, monkeypatch, method, *options, *given)
    assert (code, said) == (2, "")
    assert culprit in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run" / "run.json").exists()
