"""Questions about images and videos: the shipped data sets and local JSONL or Parquet files.

Nothing is downloaded. Every line of a local file is checked, and the head of each image that was drawn; an image is
decoded when it is used.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from PIL import Image

from ..zoo.moving import SECONDS, clips
from ..zoo.scenes import Sample, scenes
from .images import DataError, StoredImage, open_image
from .rows import file_rows
from .videos import StoredVideo, Video

__all__ = [
    "DATASETS",
    "DataError",
    "LabelledSample",
    "Sample",
    "choices_of",
    "load",
    "open_image",
    "references",
    "size_of",
    "video_of",
]

DATASETS = ("easy-vqa", "scenes", "moving-shapes")
"""Names `load` knows; anything else is a file."""
FRAMES = 8
"""Frames of a video that a model is shown, if nothing else is asked for."""

_COLUMNS = ("question", "answer")


@dataclass(frozen=True)
class LabelledSample(Sample):
    """A sample with more than one right answer, or with options to choose from.

    Attributes:
        answers: what several people answered; `answer` is what most of them said.
        choices: the options, in the order of their letters; `answer` is the text of the right one.
    """

    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class VideoSample(LabelledSample):
    """A question about a video. `image` is the frame in its middle, for whoever shows one picture."""

    video: Video | StoredVideo | None = None


class StoredSample(VideoSample):
    """A sample of a file. Image or video are decoded when they are used, and may be shared with other samples."""

    @property
    def image(self) -> Image.Image:
        """RGB, upright. Raises `DataError`, naming the line."""
        image = self.__dict__["_image"]
        if image is None:
            video = video_of(self)
            assert video is not None
            return video.frames[len(video.frames) // 2]
        return image.open() if isinstance(image, StoredImage) else image

    @image.setter
    def image(self, image: StoredImage | Image.Image | None) -> None:  # the frozen dataclass's __init__ comes here
        self.__dict__["_image"] = image


def video_of(sample: Sample) -> Video | None:
    """The frames that a question is about; None where it is about an image. Raises `DataError`, naming the line."""
    video = getattr(sample, "video", None)
    return video.open() if isinstance(video, StoredVideo) else video


def size_of(sample: Sample) -> tuple[Any, ...]:
    """(width, height) of a sample's image, which need not be decoded for it; of a video (frames, width, height).

    Of a video in a file its path, in place of the size: only questions about one video are known to have one shape.
    """
    video = getattr(sample, "video", None)
    if isinstance(video, StoredVideo):
        return video.count, str(video.path)
    if video is not None:
        return len(video.frames), *video.size
    image = getattr(sample, "_image", None)
    return image.size if isinstance(image, StoredImage) else sample.image.size


def references(sample: Sample) -> tuple[str, ...]:
    """All answers that count as right, at least one."""
    return getattr(sample, "answers", ()) or (sample.answer,)


def choices_of(sample: Sample) -> tuple[str, ...]:
    """The options of a multiple-choice question, () for any other."""
    return getattr(sample, "choices", ())


def load(name_or_path: str | Path, count: int | None = None, seed: int = 0, frames: int | None = None) -> list[Sample]:
    """Samples of a data set.

    Args:
        name_or_path: "easy-vqa" (test split), "scenes" (held-out split), "moving-shapes" (clips, for which no shipped
            model was trained), or a `.jsonl` or `.parquet` file whose rows have `image` (a path relative to the file;
            in Parquet also the bytes) or `video` (a path, see `videos.open_video`), `question` and `answer`. Optional:
            `kind`, `image_id`; `answers`, a list of what several people said (then `answer` may be left out);
            `choices`, a list of options of which `answer` is one (text, letter, or number from 0 on). Options that the
            question does not spell out are appended to it.
        count: how many samples, drawn at random; None for all of them (1000 scene questions, 300 about clips).
        seed: of the draw.
        frames: of each video, evenly; None: questions about videos are refused.

    Raises:
        DataError: unknown name, missing file, or a row that is not what it should be.
    """
    name = str(name_or_path)
    if count is not None and count < 1:
        raise DataError(f"samples={count}: at least 1 is needed")
    if name == "easy-vqa":
        return _easyvqa(count, seed)
    if name == "scenes":
        return _scenes(count or 1000, seed)
    if name == "moving-shapes":
        if frames is None:
            raise DataError(f"data {name}: {_NO_VIDEOS}")
        return _moving(count or 300, seed, frames)
    path = Path(name_or_path)
    rows = [(where, _checked(path, where, row)) for where, row in file_rows(path)]
    if frames is None:
        for where, row in rows:
            if row.get("video") is not None:
                raise DataError(f"data {path}, {where}: {_NO_VIDEOS}")
    if not rows:
        raise DataError(f"data {name}: no rows")
    if count is not None and count < len(rows):
        rows = [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), count))]
    return [_sample(path, *row, frames or FRAMES) for row in rows]


_NO_VIDEOS = (
    "a question about a video; here only images are asked about (`foveate sweep` and `foveate run` take videos)"
)


def _moving(count: int, seed: int, frames: int) -> list[Sample]:
    each = 3
    found: list[Sample] = []
    for number, clip in enumerate(clips(-(-count // each), seed, frames, each)):
        video = Video(clip.frames, tuple(range(frames)), frames, frames / SECONDS)
        middle = clip.frames[frames // 2]
        found += [VideoSample(middle, q.text, q.answer, q.kind, number, video=video) for q in clip.questions]
    return found[:count]


def _easyvqa(count: int | None, seed: int) -> list[Sample]:
    from ..zoo.easyvqa import easyvqa

    try:
        return easyvqa(split="test", count=count, seed=seed)
    except ImportError as error:
        raise DataError("data easy-vqa: needs the package easy-vqa (pip install 'foveate[data]')") from error


def _scenes(count: int, seed: int) -> list[Sample]:
    each, drawn = 5, 0
    found: list[Sample] = []
    while len(found) < count:  # a bare scene may not have `each` questions to ask
        drawn += -(-(count - len(found)) // each)
        found = scenes(count=drawn, seed=seed, questions_per_scene=each, split="test")
    return found[:count]


def _checked(path: Path, where: str, row: Any) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"data {path}, {where}: expected an object with image or video, {', '.join(_COLUMNS)}")
    answers, choices = (_texts(path, where, row, column) for column in ("answers", "choices"))
    if row.get("answer") is None and answers:
        row = {**row, "answer": Counter(answers).most_common(1)[0][0]}
    seen = [column for column in ("image", "video") if row.get(column) is not None]
    if len(seen) == 2:
        raise DataError(f"data {path}, {where}: 'image' and 'video', a question is about one of them")
    for column in (*(seen or ["image"]), *_COLUMNS):
        if row.get(column) is None:
            raise DataError(f"data {path}, {where}: no {column!r}")
    if not isinstance(row["question"], str) or not isinstance(row["answer"], str | int | float):
        raise DataError(f"data {path}, {where}: 'question' and 'answer' must be text")
    if not _is_text(row["question"]) or not _is_text(str(row["answer"])):
        raise DataError(f"data {path}, {where}: 'question' or 'answer' holds half a character (a lone surrogate)")
    if choices:
        right = _right_choice(row["answer"], choices)
        if right is None:
            raise DataError(f"data {path}, {where}: answer {row['answer']!r} is none of the 'choices'")
        row = {**row, "answer": choices[right]}
    return {**row, "answers": answers, "choices": choices}


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _texts(path: Path, where: str, row: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """A list of texts, () where the row has none. VQA's {"answer": ...} objects are texts, too."""
    values = row.get(column)
    if values is None:
        return ()
    if isinstance(values, list):
        values = [value.get("answer") if isinstance(value, dict) else value for value in values]
    if not isinstance(values, list) or not values or not all(isinstance(v, str | int | float) for v in values):
        raise DataError(f"data {path}, {where}: {column!r} must be a list of texts")
    return tuple(map(str, values))


def _right_choice(answer: str | int | float, choices: tuple[str, ...]) -> int | None:
    """Index of the option that an answer column names by text, letter or number."""
    if str(answer) in choices:
        return choices.index(str(answer))
    letters = ascii_uppercase[: len(choices)]
    index = letters.find(answer.strip().upper()) if isinstance(answer, str) and len(answer.strip()) == 1 else answer
    return int(index) if isinstance(index, int) and 0 <= index < len(choices) else None


def _with_choices(question: str, choices: tuple[str, ...]) -> str:
    if all(choice.lower() in question.lower() for choice in choices):
        return question
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices))
    return f"{question}\n{options}\nAnswer with the letter of the right option."


def _sample(path: Path, where: str, row: Mapping[str, Any], frames: int) -> Sample:
    if row.get("video") is not None:
        return _video_sample(path, where, row, frames)
    source = row["image"]
    if isinstance(source, dict):  # how Hugging Face stores images in Parquet
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str):
        source = path.parent / source
    if not isinstance(source, Path | bytes):
        raise DataError(f"data {path}, {where}: 'image' must be a path")
    return StoredSample(
        image=StoredImage(source, f"{path}, {where}"),  # type: ignore[arg-type]
        **_asked(where, row, row["image"]),
    )


def _video_sample(path: Path, where: str, row: Mapping[str, Any], frames: int) -> Sample:
    if not isinstance(row["video"], str):
        raise DataError(f"data {path}, {where}: 'video' must be a path")
    stored = StoredVideo(path.parent / row["video"], f"{path}, {where}", frames)
    return StoredSample(image=None, video=stored, **_asked(where, row, row["video"]))  # type: ignore[arg-type]


def _asked(where: str, row: Mapping[str, Any], named: Any) -> dict[str, Any]:
    """What a row asks, and the name of what it asks about."""
    named = row.get("image_id", named)
    return {
        "question": _with_choices(row["question"], row["choices"]),
        "answer": str(row["answer"]),
        "kind": str(row.get("kind", "")),
        "image_id": str(named) if isinstance(named, str | int) else where,
        "answers": row["answers"],
        "choices": row["choices"],
    }
