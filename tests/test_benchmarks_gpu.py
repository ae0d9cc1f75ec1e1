"""benchmarks/gpu.py on a CPU: all of its code but what only CUDA has, with tiny models."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SHORT = ["--small", "--sizes", "576", "--models", "qwen3-vl-8b", "--methods", "random", "fastv", "tome"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return importlib.import_module("gpu")


def outcomes(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["method"]: row["outcome"] for row in rows}


@pytest.mark.slow
def test_the_script_from_its_command_line(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--small", "--methods", "sparsevlm", "vispruner", "tome"]
    done = subprocess.run([*command, "--json", str(path)], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(path.read_text())
    assert all(row["outcome"] in ("exact", "does not fit") for row in result["exactness"])
    assert len(result["cases"]) == 3
    assert path.with_suffix(".md").read_text() in done.stdout


def test_everything_is_in_the_results(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Tables on stdout and in a file, numbers in the JSON, versions and command beside them."""
    path = tmp_path / "gpu.json"
    arguments = [
        "--small",
        "--sizes",
        "576",
        "2880",
        "--models",
        "llava-1.5-7b",
        "--methods",
        "fastv",
        "visionzip",
        "--json",
        str(path),
    ]
    assert gpu.main(arguments) == 0
    said = capsys.readouterr().out
    result = json.loads(path.read_text())
    versions = {"device", "driver", "cuda", "torch", "transformers", "foveate", "flash_attn", "dtype"}
    assert versions <= set(result["about"])
    assert "--methods fastv visionzip" in result["runs"][0]["command"]
    assert result["runs"][0]["date"].startswith("20")
    assert outcomes(result["exactness"]) == {"fastv": "exact", "visionzip": "exact"}
    assert all(row["difference"] < 2e-4 and row["removed"] > 0 for row in result["exactness"])
    assert [case["visual_tokens"] for case in result["cases"]] == [576, 2880]
    for case in result["cases"]:
        assert case["complete"]
        assert set(case["rows"]) == {"unreduced", "fastv", "visionzip"}
        for row in [*case["rows"].values(), *case["ceilings"].values()]:
            assert row["outcome"] == "measured"
            assert all(run["ttft"] > run["prefill"] > 0 < run["decode"] for run in row["runs"].values())
            assert row["runs"]
        assert all(row["peak_bytes"] > 0 <= row["added_bytes"] for row in case["rows"].values())
    wide = result["cases"][1]["rows"]
    assert wide["visionzip"]["visual_tokens_entering"] == 40  # 2/9 of 180 in every layer
    assert wide["visionzip"]["ceiling"] == "40 visual tokens"
    assert wide["fastv"]["visual_tokens_entering"] > 40
    assert wide["fastv"]["ceiling"] == "layers cut as by fastv"
    for row in result["launches"]:
        assert row["prefill"]["kernels"] > row["token"]["kernels"] > 0
        assert row["prefill"]["profiler_kernels"] is None
    text = (tmp_path / "gpu.md").read_text()
    assert text in said
    assert "no result" in text
    assert "FlashAttention: needs CUDA: left out" in text
    assert text.count("| visionzip |") == 3


def test_what_found_no_time_is_said_and_gone_on_with(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "gpu.json"
    assert gpu.main([*SHORT, "--json", str(path), "--minutes", "0.0001"]) == 0
    assert set(outcomes(json.loads(path.read_text())["exactness"]).values()) == {"left out"}
    said = capsys.readouterr().out
    assert "qwen3-vl-8b, sdpa, exactness: fastv, random, tome: left out - no time" in said
    assert "qwen3-vl-8b: all of it: left out - no time" in said
    assert gpu.main([*SHORT, "--json", str(path), "--resume"]) == 0
    result = json.loads(path.read_text())
    assert outcomes(result["exactness"]) == {"fastv": "exact", "random": "exact", "tome": "does not fit"}
    assert outcomes(result["launches"])["random"] == "measured"
    assert len(result["runs"]) == 2
    (case,) = result["cases"]
    assert case["complete"]
    assert "left out" not in path.with_suffix(".md").read_text().split("## Not in the tables")[1]
    before = json.dumps([result["cases"], result["exactness"], result["launches"]])
    assert gpu.main([*SHORT, "--json", str(path), "--resume"]) == 0  # nothing is left to do
    again = json.loads(path.read_text())
    assert json.dumps([again["cases"], again["exactness"], again["launches"]]) == before
    assert gpu.main([*SHORT, "--json", str(path), "--resume", "--steps", "5"]) == 2
    assert "another steps: 2, now 5" in capsys.readouterr().err


def test_a_case_that_is_gone_on_with_keeps_its_rounds(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "gpu.json"
    arguments = [*SHORT, "--json", str(path), "--resume"]
    assert gpu.main(arguments) == 0
    result = json.loads(path.read_text())
    (case,) = result["cases"]
    old = case["rows"]["random"]["runs"]
    case["rows"]["fastv"] |= {"outcome": "left out", "why": "no time", "runs": {}}
    case["complete"] = False
    path.write_text(json.dumps(result))
    assert gpu.main(arguments) == 0
    rows = json.loads(path.read_text())["cases"][0]["rows"]
    assert rows["random"]["runs"] == old
    assert list(rows["fastv"]["runs"]) == ["1"]
    assert list(rows["unreduced"]["runs"]) == ["0", "1"]  # a ratio needs both in one round


def test_a_broken_reduction_is_reported(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    exact, apply = sys.modules["gpu_exact"], sys.modules["gpu_exact"].apply

    def broken(model: Any, reducer: Any) -> Any:
        session = apply(model, reducer)
        layer = model.model.language_model.layers[2]
        session._undo.then(layer.register_forward_hook(lambda module, args, output: output * 1.01).remove)
        return session

    monkeypatch.setattr(exact, "apply", broken)
    path = tmp_path / "gpu.json"
    assert gpu.main([*SHORT, "--json", str(path)]) == 1
    assert outcomes(json.loads(path.read_text())["exactness"])["random"] == "NOT EXACT"
    assert "| qwen3-vl-8b | sdpa | 0 | fastv, random |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "outcome", "code"),
    [(torch.cuda.OutOfMemoryError("CUDA out of memory"), "out of memory", 0), (TypeError("broken"), "failed", 1)],
)
def test_one_that_raises_ends_nothing_but_itself(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, outcome: str, code: int
) -> None:
    answer = gpu.answer

    def raising(model: Any, prompt: Any, steps: int, reducer: Any = None) -> Any:
        if "FastV" in type(reducer).__name__:
            raise error
        return answer(model, prompt, steps, reducer)

    monkeypatch.setattr(gpu, "answer", raising)
    path = tmp_path / "gpu.json"
    assert gpu.main([*SHORT, "--json", str(path)]) == code
    rows = json.loads(path.read_text())["cases"][0]["rows"]
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "unreduced": "measured", "fastv": outcome, "random": "measured", "tome": "does not fit",
    }  # fmt: skip
    assert rows["random"]["runs"]


def test_without_a_device_it_says_so(gpu: Any, capsys: pytest.CaptureFixture) -> None:
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "gpu.py: no CUDA device is found here; --small tries the script on a CPU\n"
