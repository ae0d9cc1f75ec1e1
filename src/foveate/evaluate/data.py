"""Questions about images: the shipped data sets and local JSONL or Parquet files.

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

from ..zoo.scenes import Sample, scenes
from .images import DataError, StoredImage, open_image
from .rows import file_rows
from .videos import Video

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

DATASETS = ("easy-vqa", "scenes")
"""Names `load` knows; anything else is a file."""

_COLUMNS = ("image", "question", "answer")


@dataclass(frozen=True)
class LabelledSample(Sample):
    """A sample with more than one right answer, or with options to choose from.

    Attributes:
        answers: what several people answered; `answer` is what most of them said.
        choices: the options, in the order of their letters; `answer` is the text of the right one.
    """

    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


class StoredSample(LabelledSample):
    """A sample of a file. Its image is decoded when it is used, and may be shared with other samples."""

    @property
    def image(self) -> Image.Image:
        """RGB, upright. Raises `DataError`, naming the line."""
        image = self.__dict__["_image"]
        return image.open() if isinstance(image, StoredImage) else image

    @image.setter
    def image(self, image: StoredImage | Image.Image) -> None:  # the frozen dataclass's own __init__ comes here
        self.__dict__["_image"] = image


@dataclass(frozen=True)
class VideoSample(LabelledSample):
    """A question about a video. `image` is the frame in its middle, for whoever shows one picture."""

    video: Video | None = None


def video_of(sample: Sample) -> Video | None:
    """The frames that a question is about; None where it is about an image."""
    return getattr(sample, "video", None)


def size_of(sample: Sample) -> tuple[int, ...]:
    """(width, height) of a sample's image, which need not be decoded for it; of a video (frames, width, height)."""
    video = video_of(sample)
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


def load(name_or_path: str | Path, count: int | None = None, seed: int = 0) -> list[Sample]:
    """Samples of a data set.

    Args:
        name_or_path: "easy-vqa" (test split), "scenes" (held-out split), or a `.jsonl` or `.parquet` file whose rows
            have `image` (a path relative to the file; in Parquet also the bytes), `question` and `answer`. Optional:
            `kind`, `image_id`; `answers`, a list of what several people said (then `answer` may be left out);
            `choices`, a list of options of which `answer` is one (text, letter, or number from 0 on). Options that the
            question does not spell out are appended to it.
        count: how many samples, drawn at random; None for all of them (1000 scene questions).
        seed: of the draw.

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
    path = Path(name_or_path)
    rows = [(where, _checked(path, where, row)) for where, row in file_rows(path)]
    if not rows:
        raise DataError(f"data {name}: no rows")
    if count is not None and count < len(rows):
        rows = [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), count))]
    return [_sample(path, *row) for row in rows]


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
        raise DataError(f"data {path}, {where}: expected an object with {', '.join(_COLUMNS)}")
    answers, choices = (_texts(path, where, row, column) for column in ("answers", "choices"))
    if row.get("answer") is None and answers:
        row = {**row, "answer": Counter(answers).most_common(1)[0][0]}
    for column in _COLUMNS:
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


def _sample(path: Path, where: str, row: Mapping[str, Any]) -> Sample:
    source = row["image"]
    if isinstance(source, dict):  # how Hugging Face stores images in Parquet
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str):
        source = path.parent / source
    if not isinstance(source, Path | bytes):
        raise DataError(f"data {path}, {where}: 'image' must be a path")
    named = row.get("image_id", row["image"])
    return StoredSample(
        image=StoredImage(source, f"{path}, {where}"),  # type: ignore[arg-type]
        question=_with_choices(row["question"], row["choices"]),
        answer=str(row["answer"]),
        kind=str(row.get("kind", "")),
        image_id=str(named) if isinstance(named, str | int) else where,
        answers=row["answers"],
        choices=row["choices"],
    )
