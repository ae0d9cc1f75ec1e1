"""The film strip of a video."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import foveate
from foveate.view import film_strip, save
from foveate.view.patches import Cell, paint
from foveate.view.strip import shots
from foveate.zoo.moving import clips
from tests import families, videos
from tests.reference.checks import build_once


@torch.no_grad()
def traced(name: str, method: foveate.Reducer) -> foveate.Trace:
    model, prompt = videos.build(name), videos.prompt(name)
    with foveate.apply(model, method, **videos.numbers(name, prompt["input_ids"])) as session:
        model(**prompt)
    return session.trace


@pytest.mark.parametrize(("name", "frames"), [("qwen2_vl", [0, 2, 4]), ("llava_onevision", [0, 1, 3, 4])])
def test_shots_tell_what_each_step_kept(name: str, frames: list[int]):
    """Qwen-VL looks at two frames at once; the first of them is shown."""
    trace, pictures = traced(name, foveate.VidCom2(6)), list(clips(1, 0, frames=6)[0].frames)
    found = shots(pictures, trace, row=1)
    assert [shot.frame for shot in found] == frames
    assert [shot.picture for shot in found] == [pictures[i] for i in frames]
    assert sum(shot.kept for shot in found) == 6
    assert [shot.total for shot in found] == [4] * len(frames)
    (video,) = trace.layout.images[1]
    assert [shot.kept for shot in found] == [int(trace.kept(-1)[1, b.slots].sum()) for b in video.blocks]


@pytest.mark.parametrize("name", ["qwen2_vl", "video_llama_3_compressed", "internvl"])
@pytest.mark.parametrize("method", [foveate.EVS(0.5), foveate.FastVID(0.4), foveate.FastV(0.4)])
def test_a_strip_is_drawn(name: str, method: foveate.Reducer, tmp_path):
    trace = traced(name, method)
    figure = film_strip(clips(1, 0)[0].frames, trace, seconds=[0.25 * i for i in range(8)], title="x" * 500)
    save(figure, tmp_path / "strip.png")
    said = [text.get_text() for text in figure.texts]
    assert any("visual tokens kept" in text for text in said)
    assert "0.00 s" in said
    width = figure.get_figwidth() * figure.dpi
    for text in figure.texts:
        box = text.get_window_extent(figure.canvas.get_renderer())
        assert box.x0 >= 0 and box.x1 <= width, text.get_text()  # noqa: PT018


def test_a_long_video_takes_several_lines():
    trace = traced("llava_onevision", foveate.EVS(0.5))
    short = film_strip(clips(1, 0, frames=4)[0].frames, trace)
    (video,) = trace.layout.images[0]
    video.blocks.extend(video.blocks * 24)
    long = film_strip(clips(1, 0, frames=100)[0].frames, trace)
    assert long.get_figheight() > 3 * short.get_figheight()
    assert any("48 of 100 time steps shown" in text.get_text() for text in long.texts)


@torch.no_grad()
def test_no_video_is_said():
    model = build_once("llava")
    with foveate.apply(model, foveate.Random(0.5)) as session:
        model(**families.inputs("llava", model))
    with pytest.raises(ValueError, match="which frame of the video is not known"):
        film_strip(clips(1, 0)[0].frames, session.trace)


def test_tokens_merged_over_frames_have_one_colour():
    """A patch that went into a token of another picture is tinted; one that the model left out is dark."""
    picture = np.full((20, 30, 3), 200, dtype=np.uint8)
    mine, other = [Cell(0, (0, 0, 0.5, 1)), Cell(-1, (0.5, 0, 1, 1))], [Cell(1, (0, 0, 1, 1))]
    origins = torch.tensor([1, 1])
    alone, together = paint(picture, mine, origins), paint(picture, mine, origins, other)
    assert np.ptp(alone[10, 7].astype(int)) == 0
    assert np.ptp(together[10, 7].astype(int)) > 40
    assert (together[10, 22] < 100).all()
