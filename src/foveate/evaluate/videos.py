"""Frames of videos, sampled evenly: from a video file, a folder of images, an array, or an animated image."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from .images import MAX_PIXELS, DataError, open_image, opened

__all__ = ["MAX_FRAMES", "StoredVideo", "Video", "evenly", "open_video"]

MAX_FRAMES = 1024
"""Most frames that are taken of a video."""
_KEPT = 4
"""Decoded videos that are kept, whatever the number of samples."""
_LOCAL = {"protocol_whitelist": "file"}
"""A playlist may name other files, but nothing on a network."""
_ANIMATED = (".gif", ".webp", ".png", ".apng")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Video:
    """Frames of a video, in the order of time.

    Attributes:
        frames: RGB, all of one size.
        indices: number of each frame in the whole video.
        total: frames of the whole video.
        fps: frames per second of the whole video, None where nothing tells.
    """

    frames: tuple[Image.Image, ...]
    indices: tuple[int, ...]
    total: int
    fps: float | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.frames[0].size

    @property
    def seconds(self) -> list[float] | None:
        """When each frame is shown."""
        return None if self.fps is None else [index / self.fps for index in self.indices]


class StoredVideo:
    """A video that stays in its file until somebody asks for its frames.

    Args:
        path: as of `open_video`.
        where: file and line that name the video, for complaints.
        count: frames to take.

    Raises:
        DataError: there is nothing at `path`.
    """

    def __init__(self, path: Path, where: str, count: int):
        self.path, self.where, self.count = path, where, count
        if not path.exists():
            raise DataError(f"data {where}: video {path}: no such file or folder")

    def open(self) -> Video:
        """The frames, see `open_video`; they may be shared. Raises `DataError`, naming the line."""
        try:
            return _recent(self.path, self.count, os.stat(self.path).st_mtime_ns)
        except (DataError, OSError) as error:
            raise DataError(f"data {self.where}: {error}") from error


@functools.lru_cache(maxsize=_KEPT)
def _recent(path: Path, count: int, written: int) -> Video:
    return open_video(path, count)


def evenly(total: int, count: int) -> list[int]:
    """`count` of `total` frames, spread evenly from the first to the last; all of them if there are no more."""
    if count >= total:
        return list(range(total))
    if count == 1:
        return [total // 2]
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def open_video(source: str | Path, count: int = 8) -> Video:
    """Frames of a video.

    Args:
        source: a folder of images, in the order of the numbers in their names; a `.npy` file of (T, H, W, 3), uint8
            or floats in [0, 1]; an animated GIF, WebP or PNG; any other file is read by PyAV (`foveate[video]`).
        count: frames to take, evenly; fewer if the video has fewer.

    Raises:
        DataError: no such file, no video, frames that are too large or of different size, or PyAV is missing; names
            the file.
    """
    if not 1 <= count <= MAX_FRAMES:
        raise DataError(f"frames={count}: from 1 to {MAX_FRAMES}")
    path = Path(source)
    try:
        if path.is_dir():
            video = _folder(path, count)
        elif not path.is_file():
            raise DataError("not a plain file" if path.exists() else "no such file or folder")
        elif path.suffix.lower() == ".npy":
            video = _array(path, count)
        elif path.suffix.lower() in _ANIMATED:
            video = _animation(path, count)
        else:
            video = _file(path, count)
        if len({frame.size for frame in video.frames}) > 1:
            raise DataError("its frames differ in size")
    except DataError as error:
        raise DataError(f"video {path}: {error}") from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"video {path}: cannot be read ({' '.join(str(error).split()) or type(error).__name__})"
        ) from error
    return video


def _folder(path: Path, count: int) -> Video:
    files = [file for file in path.iterdir() if file.suffix.lower() in _IMAGES and not file.name.startswith(".")]
    if not files:
        raise DataError(f"holds no images ({', '.join(_IMAGES)})")
    files.sort(key=lambda file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)])
    chosen = evenly(len(files), count)
    return Video(tuple(open_image(files[i]) for i in chosen), tuple(chosen), len(files))


def _array(path: Path, count: int) -> Video:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape:
        raise DataError(f"an array of shape {array.shape}; frames are (T, H, W, 3)")
    _check_size(array.shape[2], array.shape[1])
    chosen = evenly(len(array), count)
    frames = np.asarray(array[chosen])
    if np.issubdtype(frames.dtype, np.floating):
        if not (np.isfinite(frames).all() and frames.min() >= 0 and frames.max() <= 1):
            raise DataError("floats outside [0, 1]")
        frames = (frames * 255).round().astype(np.uint8)
    if frames.dtype != np.uint8:
        raise DataError(f"an array of {frames.dtype}; pixels are uint8, or floats in [0, 1]")
    return Video(tuple(map(Image.fromarray, frames)), tuple(chosen), len(array))


def _animation(path: Path, count: int) -> Video:
    with opened(path) as image:
        total = getattr(image, "n_frames", 1)
        chosen, frames, lasting = evenly(total, count), [], []
        for number, frame in enumerate(ImageSequence.Iterator(image)):
            frame.load()  # WebP tells how long a frame lasts only then
            lasting.append(frame.info.get("duration") or 0)
            if number in chosen:
                frames.append(frame.convert("RGB"))
    if len(frames) < len(chosen):
        raise DataError("it breaks off")
    fps = 1000 * total / sum(lasting) if sum(lasting) else None
    return Video(tuple(frames), tuple(chosen), total, fps)


def _file(path: Path, count: int) -> Video:
    try:
        import av
    except ImportError:
        raise DataError("needs the package av to be decoded (pip install 'foveate[video]')") from None
    try:
        with av.open(str(path), options=_LOCAL) as container:
            stream = _stream(container)
            total = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
            rate = stream.average_rate
        frames = _decoded(av, path, evenly(total, count))
        if len(frames) < min(count, total):  # its head says more than there is
            total = sum(1 for _ in _decode(av, path))
            frames = _decoded(av, path, evenly(total, count))
    except av.error.FFmpegError as error:
        raise DataError(f"not a video that can be decoded ({error.strerror or type(error).__name__})") from error
    if not frames:
        raise DataError("holds no frames")
    return Video(tuple(frames.values()), tuple(frames), total, float(rate) if rate else None)


def _stream(container: Any) -> Any:
    if not container.streams.video:
        raise DataError("holds no video")
    stream = container.streams.video[0]
    _check_size(stream.width, stream.height)
    return stream


def _decode(av: Any, path: Path) -> Iterator[Any]:
    with av.open(str(path), options=_LOCAL) as container:
        stream = _stream(container)
        stream.thread_type = "AUTO"
        number = 0
        try:
            for frame in container.decode(stream):
                yield frame
                number += 1
        except av.error.FFmpegError as error:
            if number:
                raise DataError(f"breaks off after {number} frames ({error.strerror})") from error
            raise


def _decoded(av: Any, path: Path, chosen: Sequence[int]) -> dict[int, Image.Image]:
    """Frames by their number, decoded from the beginning up to the last one that is wanted."""
    found, wanted = {}, set(chosen)
    for number, frame in enumerate(_decode(av, path)):
        if number in wanted:
            found[number] = frame.to_image()
        if len(found) == len(wanted):
            break
    return found


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(f"frames of {width} x {height}, at most {MAX_PIXELS // 10**6} megapixels")
