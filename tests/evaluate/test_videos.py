"""Frames out of files, and what a model is handed of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import foveate
from foveate.evaluate import answer as answering
from foveate.evaluate.data import DataError, VideoSample, load, size_of, video_of
from foveate.evaluate.videos import Video, evenly, open_video
from foveate.zoo.moving import clips

COUNT = 6


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    """Frames that tell their number by their brightness."""
    return [np.full((32, 48, 3), 20 + 30 * time, dtype=np.uint8) for time in range(COUNT)]


def write(kind: str, frames: list[np.ndarray], folder: Path) -> Path:
    images = [Image.fromarray(frame) for frame in frames]
    if kind == "folder":
        for number, image in enumerate(images):
            image.save(folder / f"frame{number * 4}.png")  # 0, 4, ... 20: not in the order of letters
        (folder / "notes.txt").write_text("no image")
        return folder
    path = folder / f"clip.{kind}"
    if kind == "npy":
        np.save(path, np.stack(frames))
    elif kind in ("gif", "webp", "png"):
        images[0].save(path, save_all=True, append_images=images[1:], duration=500, lossless=True)
    else:
        av = pytest.importorskip("av")
        with av.open(str(path), "w") as out:
            stream = out.add_stream("mpeg4" if kind == "mp4" else "mjpeg", rate=2)
            stream.width, stream.height = images[0].size
            stream.pix_fmt, stream.bit_rate = "yuv420p" if kind == "mp4" else "yuvj420p", 2_000_000
            for image in images:
                for packet in stream.encode(av.VideoFrame.from_image(image)):
                    out.mux(packet)
            for packet in stream.encode():
                out.mux(packet)
    return path


@pytest.mark.parametrize("kind", ["folder", "npy", "gif", "webp", "png", "mp4", "avi"])
def test_every_kind(kind: str, frames: list[np.ndarray], tmp_path: Path):
    path = write(kind, frames, tmp_path)
    video = open_video(path, 3)
    assert video.indices == (0, 2, 5)
    assert (video.total, video.size) == (COUNT, (48, 32))
    for index, frame in zip(video.indices, video.frames):
        assert abs(np.asarray(frame).mean() - frames[index].mean()) < 4
    assert video.seconds == (None if kind in ("folder", "npy") else pytest.approx([0, 1, 2.5]))
    assert open_video(path, 100).indices == tuple(range(COUNT))
    assert open_video(path, 1).indices == (3,)


def test_floats_are_pixels(frames: list[np.ndarray], tmp_path: Path):
    np.save(tmp_path / "a.npy", np.stack(frames).astype(np.float32) / 255)
    video = open_video(tmp_path / "a.npy", 2)
    assert np.array_equal(np.asarray(video.frames[1]), frames[-1])


def test_evenly():
    assert evenly(9, 3) == [0, 4, 8]
    assert evenly(3, 8) == [0, 1, 2]
    for total in (5, 100, 1001):
        for count in (1, 2, 4, 5):
            chosen = evenly(total, count)
            assert len(set(chosen)) == count
            assert 0 <= min(chosen) <= max(chosen) < total


def test_bad_files_are_one_complaint(tmp_path: Path):
    def complaint(path: Path, count: int = 2) -> str:
        with pytest.raises(DataError) as error:
            open_video(path, count)
        return str(error.value)

    assert "no such file" in complaint(tmp_path / "none.mp4")
    assert "holds no images" in complaint(tmp_path)
    assert "frames=0" in complaint(tmp_path, 0)
    np.save(tmp_path / "flat.npy", np.zeros((4, 5, 6)))
    assert "(4, 5, 6)" in complaint(tmp_path / "flat.npy")
    np.save(tmp_path / "long.npy", np.zeros((4, 5, 6, 3), dtype=np.int64))
    assert "int64" in complaint(tmp_path / "long.npy")
    np.save(tmp_path / "bright.npy", np.full((4, 5, 6, 3), 7.0))
    assert "[0, 1]" in complaint(tmp_path / "bright.npy")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert "cannot be read" in complaint(tmp_path / "objects.npy")
    (tmp_path / "text.gif").write_text("GIF?")
    assert "not an image" in complaint(tmp_path / "text.gif")
    for size in ((8, 8), (9, 8)):
        (tmp_path / "mixed").mkdir(exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "mixed" / f"{size[0]}.png")
    assert "differ in size" in complaint(tmp_path / "mixed")


def test_a_broken_video_is_one_complaint(frames: list[np.ndarray], tmp_path: Path):
    pytest.importorskip("av")
    (tmp_path / "text.mp4").write_text("no video at all")
    with pytest.raises(DataError, match=r"text\.mp4: not a video that can be decoded"):
        open_video(tmp_path / "text.mp4")
    whole = write("avi", frames, tmp_path).read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DataError, match=r"cut\.avi: (breaks off after|not a video)"):
        open_video(tmp_path / "cut.avi", 100)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(DataError, match="not a video"):
        open_video(tmp_path / "list.m3u8")


def test_pyav_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"foveate\[video\]"):
        open_video(tmp_path / "a.mp4")


@pytest.fixture(scope="module")
def vlm() -> answering.VLM:
    return answering.load("zoo:tiny-llava")


def sample(count: int = 3, seed: int = 0) -> VideoSample:
    clip = clips(1, seed, frames=count)[0]
    video = Video(clip.frames, tuple(range(count)), count, 4.0)
    return VideoSample(clip.frames[0], clip.questions[0].text, "", "", seed, video=video)


@torch.inference_mode()
def test_a_model_without_videos_is_shown_frames_as_images(vlm: answering.VLM):
    """Numbered as one video: a budget in tokens is for all frames together."""
    asked = [sample(), sample(seed=1)]
    assert size_of(asked[0]) == (3, 112, 112)
    inputs = vlm.inputs(asked[:1])
    assert inputs["pixel_values"].shape[0] == 3
    with vlm.apply(foveate.EVS(keep=250), asked[:1], inputs) as session:
        vlm.model(**inputs)
    ((video,),) = session.trace.layout.images
    assert [block.kind for block in video.blocks] == ["frame"] * 3
    assert session.trace.visual_tokens[0, 0] == 250


def test_images_are_asked_about_as_ever(vlm: answering.VLM):
    image = answering.Sample(sample().image, "what?", "", "", 0)
    inputs = vlm.inputs([image])
    with vlm.apply(foveate.Random(0.5), [image], inputs) as session:
        assert session.given is None
    with pytest.raises(foveate.UnsupportedError, match="takes no videos"):
        vlm.apply(foveate.EVS(0.5), [image], inputs)


# ------------------------------------------------------------------------------------------------------ data sets
def listed(folder: Path, *rows: dict) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_with_videos(frames: list[np.ndarray], tmp_path: Path):
    write("npy", frames, tmp_path)
    Image.fromarray(frames[0]).save(tmp_path / "a.png")
    row = {"video": "clip.npy", "question": "what moves?", "answer": "nothing", "kind": "way"}
    path = listed(tmp_path, row, {**row, "image_id": 7}, {"image": "a.png", "question": "what?", "answer": "grey"})
    first, second, third = load(path, frames=3)
    assert (first.question, first.answer, first.kind, first.image_id) == ("what moves?", "nothing", "way", "clip.npy")
    assert second.image_id == "7"
    assert video_of(first).indices == (0, 2, 5)
    assert video_of(first) is video_of(second)  # decoded once
    assert first.image is video_of(first).frames[1]
    assert video_of(third) is None
    assert size_of(first) == size_of(second) != size_of(third) == (48, 32)


def test_bad_rows_with_videos(frames: list[np.ndarray], tmp_path: Path):
    row = {"video": "none.mp4", "question": "what?", "answer": "it"}
    with pytest.raises(DataError, match=r"line 1: video .*none\.mp4: no such file"):
        load(listed(tmp_path, row), frames=8)
    with pytest.raises(DataError, match="line 1: 'image' and 'video'"):
        load(listed(tmp_path, {**row, "image": "a.png"}), frames=8)
    with pytest.raises(DataError, match="line 1: 'video' must be a path"):
        load(listed(tmp_path, {**row, "video": 3}), frames=8)
    with pytest.raises(DataError, match="line 1: no 'image'"):
        load(listed(tmp_path, {"question": "what?", "answer": "it"}), frames=8)
    (tmp_path / "text.gif").write_text("GIF?")
    (broken,) = load(listed(tmp_path, {**row, "video": "text.gif"}), frames=8)
    with pytest.raises(DataError, match=r"line 1: video .*text\.gif"):
        video_of(broken)


@pytest.mark.parametrize("rows", [True, False])
def test_commands_that_ask_about_images_refuse_videos(rows: bool, tmp_path: Path):
    data = listed(tmp_path, {"video": "a.mp4", "question": "what?", "answer": "it"}) if rows else "moving-shapes"
    with pytest.raises(DataError, match="a question about a video; here only images"):
        load(data)


def test_clips_of_moving_shapes():
    first = load("moving-shapes", 7, seed=2, frames=4)
    assert [sample.image_id for sample in first] == [0, 0, 0, 1, 1, 1, 2]
    assert {size_of(sample) for sample in first} == {(4, 112, 112)}
    assert [sample.question for sample in load("moving-shapes", 4, seed=2, frames=6)] == [s.question for s in first[:4]]
