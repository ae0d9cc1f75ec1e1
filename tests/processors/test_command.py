"""`foveate run` on a folder with a model and its own processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import is_torchvision_available
from typer.testing import CliRunner

from foveate.cli import app
from tests.processors.build import VIDEO, family, tokenizer, vlm
from tests.processors.media import frames, photograph, write_mp4


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_a_processor_that_needs_torchvision_is_named(tmp_path: Path):
    from tests.families import build

    build("qwen2_5_vl").save_pretrained(tmp_path)
    tokenizer("qwen2_5_vl").save_pretrained(tmp_path)
    parts = {"image_processor_type": "Qwen2VLImageProcessor"}, {"video_processor_type": "Qwen2VLVideoProcessor"}
    kinds = {"processor_class": "Qwen2_5_VLProcessor", "image_processor": parts[0], "video_processor": parts[1]}
    (tmp_path / "processor_config.json").write_text(json.dumps(kinds))
    photograph("landscape").save(tmp_path / "photo.png")
    said = CliRunner().invoke(
        app, ["run", str(tmp_path), "--image", str(tmp_path / "photo.png"), "--prompt", "what?", "--keep", "0.5"]
    )
    assert said.exit_code == 2
    assert said.stderr.count("\n") == 1
    assert "its processor needs torchvision" in said.stderr
    assert "pip install 'foveate[vision]'" in said.stderr


@family(["gemma3", "qwen2_5_vl", "internvl", "smolvlm", "lfm2_vl"])
def test_run(name: str, tmp_path: Path):
    for part in vlm(name):
        part.save_pretrained(tmp_path / "model")
    photograph("portrait").save(tmp_path / "photo.png")
    arguments = ["run", str(tmp_path / "model"), "--image", str(tmp_path / "photo.png"), "--prompt", "what is this?"]
    arguments += ["--method", "fastv", "--keep", "0.5", "--option", "layer=1", "--max-new-tokens", "3"]
    arguments += ["--json", str(tmp_path / "out.json"), "--overlay", str(tmp_path / "kept.png")]
    said = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert said.exit_code == 0, said.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert 0 < found["visual_tokens_entering"] < found["visual_tokens"]
    assert (tmp_path / "kept.png").stat().st_size > 1000


def _run_on_a_video(name: str, tmp_path: Path) -> Any:
    pytest.importorskip("av")
    for part in vlm(name):
        part.save_pretrained(tmp_path / "model")
    write_mp4(tmp_path / "clip.mp4", frames(8))
    arguments = ["run", str(tmp_path / "model"), "--video", str(tmp_path / "clip.mp4"), "--frames", "4"]
    arguments += ["--prompt", "what moves?", "--method", "vidcom2", "--keep", "0.5", "--max-new-tokens", "3"]
    arguments += ["--json", str(tmp_path / "out.json"), "--overlay", str(tmp_path / "kept.png")]
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


UNKNOWN = dict.fromkeys(["minicpmv4_6", "lfm3_vl"], "which frame of its video") | {"gemma4": "where in a frame"}
"""Families whose frames, or the patches in them, are not told apart."""
FILM = [name for name in VIDEO if name not in {*UNKNOWN, "ernie4_5_vl_moe"}]  # ERNIE's processor lacks its font


@family(FILM)
def test_run_on_a_video(name: str, tmp_path: Path):
    """Out of a file, through the family's own video processor; a film strip of what was kept of each time step."""
    said = _run_on_a_video(name, tmp_path)
    assert said.exit_code == 0, said.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["frames"] == [0, 2, 5, 7]
    steps = found["visual_tokens_by_step"]
    assert len(steps) in (2, 4)  # two frames at once in Qwen-VL
    assert sum(step["kept"] for step in steps) == round(0.5 * sum(step["total"] for step in steps))
    assert (tmp_path / "kept.png").stat().st_size > 1000


@family([name for name in UNKNOWN if name in VIDEO])
def test_a_video_that_is_not_understood_is_one_complaint(name: str, tmp_path: Path):
    said = _run_on_a_video(name, tmp_path)
    assert said.exit_code == 2
    assert said.stderr.count("\n") == 1
    assert UNKNOWN[name] in said.stderr
