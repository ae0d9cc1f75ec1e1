"""Videos through each family's own video processor: frames as an array, an .mp4 file, videos beside photographs."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.video_utils import load_video

import foveate
from tests.processors.build import VIDEO, about, family, vlm
from tests.processors.exact import judged
from tests.processors.media import asked, frames, write_mp4

TRACED = [name for name in VIDEO if not about(name, "no_tower") and name != "ernie4_5_vl_moe"]
"""Ernie merges two frames in its connector; what its tower saw of a video is refused."""


@family(VIDEO)
def test_frames(name: str):
    conversation = asked("What moves?", video=frames())
    judged(vlm(name), [conversation], "random", keep=0.5)
    judged(vlm(name), [conversation], "fastv", keep=0.5, layer=1)
    judged(vlm(name), [conversation], "sparsevlm", keep=0.5)


@family(TRACED)
def test_methods_that_read_the_tower(name: str):
    judged(vlm(name), [asked("What moves?", video=frames())], "visionzip", keep=0.5)


@family(["ernie4_5_vl_moe"])
def test_frames_merged_in_the_connector_are_refused(name: str):
    with pytest.raises(foveate.UnsupportedError, match="384 visual features were read, but the prompt has 192"):
        judged(vlm(name), [asked("What moves?", video=frames())], "visionzip", keep=0.5)


@family(VIDEO)
def test_a_batch_with_videos_and_photographs(name: str):
    rows = [
        asked("What moves in both?", "portrait", video=frames()),
        asked("Nothing to see."),
        asked("What moves?", video=frames(seed=1)),
        asked("What is this?", "landscape"),
    ]
    if about(name, "videos_apart"):
        rows = [asked("What moves?", video=frames()), *rows[1:3]]
    trace = judged(vlm(name), rows, "fastv", keep=0.5, layer=1)
    assert trace.visual.any(1).tolist() == [True, False, True, True][: len(rows)]


@family(VIDEO)
def test_an_mp4_file(name: str, tmp_path: Path):
    pytest.importorskip("av", reason="needs av: run `make processors`")
    write_mp4(tmp_path / "clip.mp4", frames())
    pictures, _ = load_video(str(tmp_path / "clip.mp4"), backend="pyav")
    assert len(pictures) == 8
    judged(vlm(name), [asked("What moves?", video=pictures)], "random", keep=0.5)
