"""Training examples: an image, what every patch shows, and questions.

A label row has six columns per patch: shape, colour, digit, quadrant of the object's centre, is-centre, owner. 0 means
"none" (background) and `UNKNOWN_LABEL` "not known" (easy-VQA questions do not always tell).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.zoo import easyvqa, scenes
from foveate.zoo.scenes import GRID, IMAGE_SIZE, PATCH, Question, Thing

from .vocabulary import COLOR_WORDS, IMAGE_MEAN, IMAGE_STD, SHAPE_WORDS

__all__ = ["COLUMNS", "LABEL_SIZES", "PATCHES", "UNKNOWN_LABEL", "Example", "easy", "pixels", "rendered", "symbolic"]

PATCHES = GRID * GRID
COLUMNS = ("shape", "color", "digit", "quadrant", "center", "owner")
SHAPE, COLOR, DIGIT, QUADRANT, CENTER, OWNER = range(len(COLUMNS))
LABEL_SIZES = (len(SHAPE_WORDS) + 1, len(COLOR_WORDS) + 1, 11, 5, 2)
"""How many values the first five columns have."""
UNKNOWN_LABEL = -100

_DENSE_SHARE = 0.5  # of the vision stage: crowded scenes full of digits, the slowest thing to learn
_EASY_SHARE = 0.25


@dataclass(frozen=True)
class Example:
    """`pixels` uint8 (112, 112, 3) or None for a symbolic example; `labels` int64 (196, 6)."""

    pixels: np.ndarray | None
    labels: np.ndarray
    questions: list[Question]


def pixels(batch: list[Example]) -> Tensor:
    """Normalised images (B, 3, 112, 112)."""
    stacked = torch.from_numpy(np.stack([np.asarray(example.pixels) for example in batch])).float() / 255
    return ((stacked - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)).permute(0, 3, 1, 2).contiguous()


def rendered(rng: np.random.Generator, questions: int, crowded: bool = False) -> Example:
    """A painted training scene, or an easy-VQA training image.

    Args:
        questions: how many; 0 for a picture to look at only.
        crowded: allow scenes full of digits, about which no question can be asked.
    """
    chance = rng.random()
    if chance < (0.12 if crowded else _EASY_SHARE):
        return easy(rng, questions)
    if crowded and chance > 1 - _DENSE_SHARE:
        things = scenes.place(rng, (6, 9), 0.95, scenes.DIGIT_SHAPES, distinct=False)
    else:
        things = scenes.place(rng)
    scene = scenes.paint(rng, things, "train")
    asked = scenes.ask(rng, things, questions) if questions else []
    return Example(scene.pixels, labels(things, scene.owner), asked)


def symbolic(rng: np.random.Generator, questions: int, objects: tuple[int, int], easy_share: float) -> Example:
    """The labels of a scene that is never painted: objects are boxes. A hundred times cheaper than a picture."""
    if rng.random() < easy_share:
        return _easy_symbolic(rng, questions)
    things = scenes.place(rng, objects)
    return Example(None, labels(things, _boxes(things)), scenes.ask(rng, things, questions))


def labels(things: list[Thing], owner: np.ndarray) -> np.ndarray:
    """Label rows (196, 6) for the owner grid (14, 14)."""
    rows = np.zeros((GRID, GRID, len(COLUMNS)), np.int64)
    for index, thing in enumerate(things):
        rows[owner == index + 1] = (
            1 + SHAPE_WORDS.index(thing.shape),
            1 + COLOR_WORDS.index(thing.color),
            0 if thing.digit is None else 1 + thing.digit,
            1 + scenes.QUADRANTS.index(thing.quadrant),
            0,
            index + 1,
        )
        row, column = thing.center_patch
        rows[row, column, CENTER] = 1
    return rows.reshape(PATCHES, len(COLUMNS))


def _boxes(things: list[Thing]) -> np.ndarray:
    owner = np.zeros((GRID, GRID), np.int64)
    for index, thing in enumerate(things):
        top, bottom, left, right = (
            round(edge / PATCH)
            for edge in (thing.top + 2, thing.top + thing.side - 2, thing.left + 2, thing.left + thing.side - 2)
        )
        owner[top : max(bottom, top + 1), left : max(right, left + 1)] = index + 1
    for index, thing in enumerate(things):
        owner[thing.center_patch] = index + 1
    return owner


# ------------------------------------------------------------------------------------------------------- easy-VQA
def easy(rng: np.random.Generator, questions: int) -> Example:
    """An easy-VQA training image; shape and colour labels as far as its questions tell them."""
    images = _easy_images()
    image, mask, rows = images[rng.integers(len(images))]
    shape, color = _truth(rows)
    grid = np.zeros((GRID, GRID, len(COLUMNS)), np.int64)
    if mask.any():
        row, column = (round(float(places.mean())) for places in np.nonzero(mask))
        quadrant = 1 + 2 * (row >= GRID // 2) + (column >= GRID // 2)
        shape_label = 1 + SHAPE_WORDS.index(shape) if shape else UNKNOWN_LABEL
        color_label = 1 + COLOR_WORDS.index(color) if color else UNKNOWN_LABEL
        mask = mask.copy()
        mask[row, column] = True
        grid[mask] = (shape_label, color_label, 0, quadrant, 0, 1)
        grid[row, column, CENTER] = 1
    picture = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return Example(np.asarray(picture), grid.reshape(PATCHES, len(COLUMNS)), _draw(rng, rows, questions))


def _easy_symbolic(rng: np.random.Generator, questions: int) -> Example:
    images = _easy_images()
    while True:
        rows = images[rng.integers(len(images))][2]
        shape, color = _truth(rows)
        if shape and color:
            break
    side = int(rng.integers(20, 80))
    left, top = (int(value) for value in rng.integers(0, IMAGE_SIZE - side, 2))
    things = [Thing(shape, color, None, left, top, side)]
    return Example(None, labels(things, _boxes(things)), _draw(rng, rows, questions))


def _draw(rng: np.random.Generator, rows: list[tuple[str, str]], count: int) -> list[Question]:
    return [
        Question("easy", text, answer, (0,)) for text, answer in (rows[i] for i in rng.permutation(len(rows))[:count])
    ]


def _truth(rows: list[tuple[str, str]]) -> tuple[str | None, str | None]:
    answers = {answer for _, answer in rows}
    return (
        next((word for word in SHAPE_WORDS if word in answers), None),
        next((word for word in COLOR_WORDS if word in answers), None),
    )


@functools.cache
def _easy_images() -> list[tuple[Image.Image, np.ndarray, list[tuple[str, str]]]]:
    return _by_image(easyvqa.easyvqa("train"))


def _by_image(samples: list[scenes.Sample]) -> list[tuple[Image.Image, np.ndarray, list[tuple[str, str]]]]:
    """Per image: the picture, its object mask (G, G), its (question, answer) rows."""
    images: dict[int | str, tuple[Image.Image, np.ndarray, list[tuple[str, str]]]] = {}
    for sample in samples:
        mask = np.zeros((GRID, GRID), bool) if sample.asked is None else sample.asked
        _, _, rows = images.setdefault(sample.image_id, (sample.image, mask, []))
        rows.append((sample.question, sample.answer))
    return [images[image_id] for image_id in sorted(images)]
