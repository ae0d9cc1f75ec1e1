"""Photographs and a video: scikit-learn's two pictures, cut to many shapes, and conversations about them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from transformers.video_utils import VideoMetadata

__all__ = ["FPS", "PHOTOGRAPHS", "RGB", "asked", "encoded", "frames", "photograph", "write_mp4"]

FPS = 2.0
Message = dict[str, Any]


@functools.cache
def _pictures() -> tuple[Image.Image, Image.Image]:
    china, flower = (Image.fromarray(pixels) for pixels in load_sample_images().images)
    return china, flower


def photograph(name: str) -> Image.Image:
    """One of `PHOTOGRAPHS`."""
    china, flower = _pictures()
    return {
        "landscape": lambda: china,
        "portrait": lambda: flower.crop((180, 0, 400, 427)),
        "square": lambda: flower.resize((300, 300)),
        "large": lambda: china.resize((1600, 1067)),
        "small": lambda: flower.resize((48, 40)),
        "panorama": lambda: china.crop((0, 150, 640, 330)),
        "grey": lambda: china.convert("L"),
        "see-through": lambda: _fading(flower),
    }[name]()


RGB = ["landscape", "portrait", "square", "large", "small", "panorama"]
PHOTOGRAPHS = [*RGB, "grey", "see-through"]


def _fading(picture: Image.Image) -> Image.Image:
    """RGBA, from transparent on the left to opaque on the right."""
    alpha = np.linspace(0, 255, picture.width).astype(np.uint8)
    picture = picture.convert("RGBA")
    picture.putalpha(Image.fromarray(np.tile(alpha, (picture.height, 1))))
    return picture


def frames(count: int = 8, seed: int = 0) -> np.ndarray:
    """(count, 96, 128, 3) uint8: a window that moves over a photograph, twice as far in each later half."""
    china = np.asarray(_pictures()[seed % 2].resize((320, 214)))
    return np.stack([china[8 * i : 8 * i + 96, 20 * i : 20 * i + 128] for i in range(count)])


def write_mp4(path: Path, pictures: np.ndarray) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=int(FPS))
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def asked(question: str, *photographs: str, video: Any = None) -> list[Message]:
    """A conversation of one turn: photographs by name, a video, a question."""
    seen: list[Message] = [{"type": "image", "image": photograph(name)} for name in photographs]
    if video is not None:
        seen.append({"type": "video", "video": video})
    return [{"role": "user", "content": [*seen, {"type": "text", "text": question}]}]


def encoded(processor: Any, conversations: Sequence[list[Message]]) -> dict[str, Tensor]:
    """What the processor makes of a batch of conversations, pixels in float32; of videos, every frame."""
    options: dict[str, Any] = {"padding": True}
    parts = [[part for message in messages for part in message["content"]] for messages in conversations]
    shown = [[part["video"] for part in row if part["type"] == "video"] for row in parts]
    if any(shown):
        options["video_metadata"] = [[_metadata(len(video)) for video in row] for row in shown if row]
        options["do_sample_frames"] = False
    found = processor.apply_chat_template(
        list(conversations), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
        processor_kwargs=options,
    )  # fmt: skip
    found.pop("labels", None)  # PaliGemma's, for training
    return dict(found.to(torch.float32))


def _metadata(count: int) -> VideoMetadata:
    return VideoMetadata(total_num_frames=count, fps=FPS, duration=count / FPS, frames_indices=list(range(count)))
