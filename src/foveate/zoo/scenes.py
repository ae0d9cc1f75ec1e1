"""Rendered scenes with questions: seeded, unlimited, with the patches each question is about.

A scene is 112 x 112 px: 3 to 5 coloured shapes on a textured background, handwritten digits on circles and squares.
About 15 % of the 14 x 14 patches (8 px) belong to an object, so that pruning has something to find.

Lives here: placing, painting and asking. The handwritten digits are scikit-learn's (UCI optdigits, E. Alpaydin and
C. Kaynak, CC BY 4.0), shipped as `digits.npz`; images 0-1299 are for training, 1300-1399 for validation, the rest for
the test split, so no test digit was ever trained on.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["GRID", "IMAGE_SIZE", "KINDS", "PATCH", "Question", "Sample", "Scene", "Thing", "scenes"]

IMAGE_SIZE = 112
PATCH = 8
GRID = IMAGE_SIZE // PATCH

COLORS = {
    "red": (215, 40, 40),
    "green": (40, 160, 50),
    "blue": (40, 70, 215),
    "yellow": (235, 215, 40),
    "purple": (140, 45, 175),
    "orange": (245, 135, 25),
    "teal": (20, 165, 165),
    "brown": (120, 70, 30),
}
LIGHT_COLORS = ("yellow", "orange", "teal")
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
DIGIT_SHAPES = ("circle", "square")
"""Shapes with room for a digit."""
SIDES = {"circle": (26, 32), "square": (27, 33), "triangle": (24, 31), "star": (25, 32), "diamond": (25, 32)}
QUADRANTS = ("top-left", "top-right", "bottom-left", "bottom-right")
KINDS = ("color", "shape", "exist", "where", "count", "digit", "digit2color", "digit2shape")

_KIND_WEIGHTS = dict(zip(KINDS, (1.0, 1.0, 1.0, 1.0, 1.1, 2.0, 1.2, 1.2)))
_SPLITS = {"train": (0, 1300), "validation": (1300, 1400), "test": (1400, 1797)}
_COVERED = 0.22  # a patch belongs to an object that covers more than this share of it
_NO_QUADRANT = 5  # px: an object this near to a middle line is not asked "where"


@dataclass(frozen=True)
class Thing:
    """One object: what it is, and its square box (`left`, `top`, `side`, in px)."""

    shape: str
    color: str
    digit: int | None
    left: int
    top: int
    side: int

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) in px."""
        return self.left + self.side / 2, self.top + self.side / 2

    @property
    def center_patch(self) -> tuple[int, int]:
        """(row, column) in the patch grid."""
        x, y = self.center
        return int(y) // PATCH, int(x) // PATCH

    @property
    def quadrant(self) -> str:
        """The quarter of the image that holds the centre."""
        x, y = self.center
        return QUADRANTS[2 * (y > IMAGE_SIZE / 2) + (x > IMAGE_SIZE / 2)]


@dataclass(frozen=True)
class Scene:
    """A painted scene: `pixels` uint8 (112, 112, 3); `owner` (14, 14): 1 + the index of a patch's thing, or 0."""

    pixels: np.ndarray
    things: list[Thing]
    owner: np.ndarray


@dataclass(frozen=True)
class Question:
    """A question about a scene, its one-word answer, and the indices of the things it is about."""

    kind: str
    text: str
    answer: str
    about: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """One image, question and answer.

    Attributes:
        asked: bool (G, G), the patches of the objects that the question is about (the oracle's choice); all False when
            it is about none ("how many stars", and there is none); None where this is not known.
        owner: int (G, G), 1 + the object's index per patch, 0 for background; None where this is not known.
    """

    image: Image.Image
    question: str
    answer: str
    kind: str
    image_id: int | str
    asked: np.ndarray | None = field(default=None, compare=False)
    owner: np.ndarray | None = field(default=None, compare=False)


def scenes(count: int, seed: int, questions_per_scene: int = 5, split: str = "test") -> list[Sample]:
    """`count` rendered scenes with `questions_per_scene` questions each.

    Scene i of a seed is the same whatever `count` is. Splits differ in their random streams and in the digit images
    that they draw from ("train", "validation", "test").

    Raises:
        ValueError: unknown split.
    """
    if split not in _SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(_SPLITS)}")
    samples = []
    for image_id in range(count):
        rng = np.random.default_rng([seed, list(_SPLITS).index(split), image_id])
        scene = paint(rng, place(rng), split)
        image = Image.fromarray(scene.pixels)
        for question in ask(rng, scene.things, questions_per_scene):
            asked = np.isin(scene.owner, [index + 1 for index in question.about])
            text, answer = question.text, question.answer
            samples.append(Sample(image, text, answer, question.kind, image_id, asked, scene.owner))
    return samples


# ------------------------------------------------------------------------------------------------------- placing
def place(
    rng: np.random.Generator,
    objects: tuple[int, int] = (3, 5),
    digit_share: float = 0.85,
    shapes: tuple[str, ...] = SHAPES,
    distinct: bool = True,
) -> list[Thing]:
    """Things that do not overlap.

    Args:
        objects: fewest and most things; fewer if there is no room.
        digit_share: how many of the circles and squares carry a digit.
        distinct: no two things share both shape and colour (needed for questions).
    """
    wanted = int(rng.integers(objects[0], objects[1] + 1))
    things: list[Thing] = []
    for _ in range(80):
        if len(things) == wanted:
            break
        shape, color = shapes[rng.integers(len(shapes))], list(COLORS)[rng.integers(len(COLORS))]
        if distinct and any(thing.shape == shape and thing.color == color for thing in things):
            continue
        side = int(rng.integers(*SIDES.get(shape, (24, 31))))
        left, top = (int(value) for value in rng.integers(1, IMAGE_SIZE - side, 2))
        digit = int(rng.integers(10)) if shape in DIGIT_SHAPES and rng.random() < digit_share else None
        new = Thing(shape, color, digit, left, top, side)
        if not any(_touch(new, thing) for thing in things):
            things.append(new)
    return things


def _touch(one: Thing, other: Thing) -> bool:
    gap = (one.side + other.side) / 2 + 1
    return all(abs(a - b) < gap for a, b in zip(one.center, other.center))


# ------------------------------------------------------------------------------------------------------- painting
def paint(rng: np.random.Generator, things: list[Thing], split: str) -> Scene:
    """Paint things on a fresh background; digits come from the images of `split` and are distorted in training."""
    canvas = _background(rng)
    cover = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.int64)
    for index, thing in enumerate(things):
        box = slice(thing.top, thing.top + thing.side), slice(thing.left, thing.left + thing.side)
        inside = _silhouette(rng, thing.shape, thing.side)
        fill = np.array(COLORS[thing.color]) + rng.uniform(-14, 14, 3) + rng.normal(0, 4, (thing.side, thing.side, 1))
        if thing.digit is not None:
            ink = _digit(rng, thing.digit, thing.side, split)[..., None]
            fill = fill * (1 - ink) + (10 if thing.color in LIGHT_COLORS else 250) * ink
        alpha = inside[..., None]
        canvas[box] = canvas[box] * (1 - alpha) + fill * alpha
        cover[box][inside > 0.5] = index + 1
    return Scene(canvas.clip(0, 255).astype(np.uint8), things, _owners(cover, things))


def _owners(cover: np.ndarray, things: list[Thing]) -> np.ndarray:
    patches = cover.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID, GRID, -1)
    owner = np.zeros((GRID, GRID), np.int64)
    for index in range(len(things)):
        owner[(patches == index + 1).mean(2) > _COVERED] = index + 1
    for index, thing in enumerate(things):
        owner[thing.center_patch] = index + 1
    return owner


def _background(rng: np.random.Generator) -> np.ndarray:
    coarse = rng.uniform(-30, 30, (5, 5, 3))
    coarse = 0.45 * coarse + 0.8 * coarse.mean(2, keepdims=True)  # mostly grey: colour must not give objects away
    size = (IMAGE_SIZE, IMAGE_SIZE)
    planes = [
        Image.fromarray(coarse[..., c].astype(np.float32)).resize(size, Image.Resampling.BICUBIC) for c in range(3)
    ]
    canvas = np.stack([np.asarray(plane) for plane in planes], 2) + rng.uniform(70, 200)
    canvas = canvas + rng.normal(0, rng.uniform(2, 12), (*size, 1))
    if rng.random() < 0.5:
        frequency, angle = rng.uniform(0.1, 0.6), rng.uniform(0, math.pi)
        y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
        waves = np.sin(frequency * (x * math.cos(angle) + y * math.sin(angle)))
        canvas = canvas + (waves * rng.uniform(4, 14))[..., None]
    return canvas


def _silhouette(rng: np.random.Generator, shape: str, side: int) -> np.ndarray:
    """Coverage in [0, 1], (side, side), of a slightly rotated shape, drawn at four times the size."""
    big = 4 * side
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((1, 1, big - 2, big - 2), fill=255)
    else:
        turn = rng.uniform(-0.2, 0.2)
        cos, sin, half = math.cos(turn), math.sin(turn), big / 2
        corners = [(half + half * (x * cos - y * sin), half + half * (x * sin + y * cos)) for x, y in _corners(shape)]
        draw.polygon(corners, fill=255)
    return np.asarray(mask.resize((side, side), Image.Resampling.BOX), np.float32) / 255


def _corners(shape: str) -> list[tuple[float, float]]:
    """Corners in the unit square [-1, 1]^2."""
    if shape == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if shape == "diamond":
        return [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)]
    if shape == "cross":
        arm = 0.32
        quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm), (1.0, -arm), (1.0, arm), (arm, arm)]
        return quarter + [(-x, -y) for x, y in quarter]
    points, radii = (3, (1.0,)) if shape == "triangle" else (10, (1.0, 0.42))
    turns = [2 * math.pi * k / points - math.pi / 2 for k in range(points)]
    return [(radii[k % len(radii)] * math.cos(a), radii[k % len(radii)] * math.sin(a)) for k, a in enumerate(turns)]


def _digit(rng: np.random.Generator, digit: int, side: int, split: str) -> np.ndarray:
    """A handwritten digit as ink in [0, 1], (side, side)."""
    images, labels = _digit_images()
    first, last = _SPLITS[split]
    source = images[first + rng.choice(np.flatnonzero(labels[first:last] == digit))]
    scale_x, scale_y, turn, shift_x, shift_y = 2.5, 2.5, 0.0, 0.0, 0.0  # px per source pixel: a digit is 20 px high
    if split == "train":
        scale_x, scale_y = rng.uniform(2.15, 2.75, 2)
        turn, (shift_x, shift_y) = rng.uniform(-0.22, 0.22), rng.uniform(-1.5, 1.5, 2)
    cos, sin = math.cos(turn), math.sin(turn)
    x0, y0 = side / 2 + shift_x, side / 2 + shift_y
    # PIL maps an output point to its source: undo the shift, the rotation and the scale.
    a, b, d, e = cos / scale_x, sin / scale_x, -sin / scale_y, cos / scale_y
    affine = (a, b, 4 - a * x0 - b * y0, d, e, 4 - d * x0 - e * y0)
    drawn = Image.fromarray(source).transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    return np.clip(1.2 * np.asarray(drawn), 0, 1)


@functools.cache
def _digit_images() -> tuple[np.ndarray, np.ndarray]:
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        return (stored["images"] / 16).astype(np.float32), stored["labels"].astype(np.int64)


# ------------------------------------------------------------------------------------------------------- asking
def ask(rng: np.random.Generator, things: list[Thing], count: int) -> list[Question]:
    """Up to `count` different questions, the kinds drawn by weight so that rare ones are not rare in the sample."""
    pool: dict[str, list[Question]] = {}
    for question in _askable(rng, things):
        pool.setdefault(question.kind, []).append(question)
    chosen: list[Question] = []
    while pool and len(chosen) < count:
        weights = np.array([_KIND_WEIGHTS[kind] for kind in pool])
        kind = list(pool)[rng.choice(len(pool), p=weights / weights.sum())]
        chosen.append(pool[kind].pop(rng.integers(len(pool[kind]))))
        if not pool[kind]:
            del pool[kind]
    return chosen


def _askable(rng: np.random.Generator, things: list[Thing]) -> Iterator[Question]:
    shapes = Counter(thing.shape for thing in things)
    colors = Counter(thing.color for thing in things)
    digits = Counter(thing.digit for thing in things)
    for index, thing in enumerate(things):
        name, about = f"{thing.color} {thing.shape}", (index,)
        if shapes[thing.shape] == 1:
            yield Question("color", f"what color is the {thing.shape}?", thing.color, about)
        if colors[thing.color] == 1:
            yield Question("shape", f"what shape is {thing.color}?", thing.shape, about)
        if all(abs(value - IMAGE_SIZE / 2) > _NO_QUADRANT for value in thing.center):
            yield Question("where", f"where is the {name}?", thing.quadrant, about)
        if thing.digit is not None:
            yield Question("digit", f"what digit is on the {name}?", str(thing.digit), about)
            if digits[thing.digit] == 1:
                color, shape = "what color is the shape", "what shape is the one"
                yield Question("digit2color", f"{color} with digit {thing.digit}?", thing.color, about)
                yield Question("digit2shape", f"{shape} with digit {thing.digit}?", thing.shape, about)
    yield from _existence(rng, things)
    yield Question("count", "how many objects are there?", str(len(things)), tuple(range(len(things))))
    for word in sorted({str(rng.choice(list(shapes))), str(rng.choice(SHAPES))}):
        yield _how_many(word, [index for index, thing in enumerate(things) if thing.shape == word])
    for word in sorted({str(rng.choice(list(colors))), str(rng.choice(list(COLORS)))}):
        yield _how_many(word, [index for index, thing in enumerate(things) if thing.color == word])


def _how_many(word: str, about: list[int]) -> Question:
    return Question("count", f"how many {word} shapes are there?", str(len(about)), tuple(about))


def _existence(rng: np.random.Generator, things: list[Thing]) -> Iterator[Question]:
    """Two questions with answer yes and up to two with no; a "no" combines a colour and a shape that are both there."""
    there = {(thing.color, thing.shape) for thing in things}
    for index in rng.permutation(len(things))[:2]:
        color, shape = things[index].color, things[index].shape
        yield Question("exist", f"is there a {color} {shape}?", "yes", (int(index),))
    absent = {(a.color, b.shape) for a in things for b in things} - there
    absent = absent or {(a.color, shape) for a in things for shape in SHAPES} - there
    for choice in rng.permutation(len(absent))[:2]:
        color, shape = sorted(absent)[choice]
        about = tuple(index for index, thing in enumerate(things) if thing.color == color or thing.shape == shape)
        yield Question("exist", f"is there a {color} {shape}?", "no", about)
