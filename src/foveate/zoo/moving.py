"""Rendered clips of moving shapes with questions: seeded, unlimited.

A clip is a scene (`zoo.scenes`) over time: 2 or 3 coloured shapes before a background that stays, of which some move in
a straight line and never meet another. No shipped model was trained on them: they measure what a method keeps of a
video and how fast it is, not how well it answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from .scenes import IMAGE_SIZE, Question, Thing, paint, place

__all__ = ["DIRECTIONS", "SECONDS", "Clip", "clips"]

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SECONDS = 2.0
"""How long a clip is, whatever the number of its frames."""
_TRAVEL = (24, 48)  # px from the first frame to the last
_SHARE = 0.6  # of the shapes that are set in motion, if there is room


@dataclass(frozen=True)
class Clip:
    """A rendered clip.

    Attributes:
        frames: RGB, 112 x 112.
        things: the shapes as they are in the first frame.
        ways: for each its direction, "" if it stands still.
        questions: with one-word answers.
    """

    frames: tuple[Image.Image, ...]
    things: tuple[Thing, ...]
    ways: tuple[str, ...]
    questions: tuple[Question, ...]


def clips(count: int, seed: int, frames: int = 8, questions_per_clip: int = 3) -> list[Clip]:
    """`count` clips of `frames` frames; clip i of a seed moves the same way whatever `count` and `frames` are."""
    return [_clip(np.random.default_rng([seed, number]), frames, questions_per_clip) for number in range(count)]


def _clip(rng: np.random.Generator, frames: int, questions: int) -> Clip:
    things = place(rng, objects=(2, 3), digit_share=0.0)
    ways, ends = [""] * len(things), list(things)
    for index, thing in enumerate(things):
        if index and rng.random() > _SHARE:  # the first always moves, if it can
            continue
        travel = int(rng.integers(*_TRAVEL))
        for way in rng.permutation(list(DIRECTIONS)):
            x, y = DIRECTIONS[str(way)]
            end = replace(thing, left=thing.left + travel * x, top=thing.top + travel * y)
            if _inside(end) and not any(_meet(thing, end, *other) for other in _others(index, things, ends)):
                ways[index], ends[index] = str(way), end
                break
    painted, look = [], int(rng.integers(1 << 31))
    for time in range(frames):
        share = time / max(1, frames - 1)
        now = [_between(start, end, share) for start, end in zip(things, ends)]
        # The same random numbers for each frame: background and shapes look alike in all of them.
        painted.append(Image.fromarray(paint(np.random.default_rng(look), now, "test").pixels))
    askable = list(_askable(things, ways, ends))
    chosen = sorted(rng.permutation(len(askable))[:questions].tolist())
    return Clip(tuple(painted), tuple(things), tuple(ways), tuple(askable[i] for i in chosen))


def _between(start: Thing, end: Thing, share: float) -> Thing:
    left, top = (round(a + share * (b - a)) for a, b in ((start.left, end.left), (start.top, end.top)))
    return replace(start, left=left, top=top)


def _inside(thing: Thing) -> bool:
    return min(thing.left, thing.top) >= 0 and max(thing.left, thing.top) + thing.side <= IMAGE_SIZE


def _others(index: int, things: list[Thing], ends: list[Thing]) -> list[tuple[Thing, Thing]]:
    return [pair for i, pair in enumerate(zip(things, ends)) if i != index]


def _meet(start: Thing, end: Thing, other: Thing, its_end: Thing) -> bool:
    """Whether two shapes touch at any time; in steps of less than two pixels."""
    pairs = ((_between(start, end, i / 32), _between(other, its_end, i / 32)) for i in range(33))
    return any(
        all(abs(p - q) < (one.side + two.side) / 2 + 2 for p, q in zip(one.center, two.center)) for one, two in pairs
    )


def _askable(things: list[Thing], ways: list[str], ends: list[Thing]) -> Iterator[Question]:
    moved = [index for index, way in enumerate(ways) if way]
    shapes, colors = (Counter(getattr(thing, name) for thing in things) for name in ("shape", "color"))
    for index, (thing, way, end) in enumerate(zip(things, ways, ends)):
        name, about = f"{thing.color} {thing.shape}", (index,)
        yield Question("moves", f"did the {name} move?", "yes" if way else "no", about)
        if way:
            yield Question("way", f"which way did the {name} move?", way, about)
            yield Question("end", f"where is the {name} at the end?", end.quadrant, about)
    yield Question("number", "how many shapes moved?", str(len(moved)), tuple(moved))
    if len(moved) == 1:
        (index,) = moved
        yield Question("color", "what color is the shape that moved?", things[index].color, (index,))
        yield Question("shape", "what shape moved?", things[index].shape, (index,))
    for way in DIRECTIONS:
        those = [index for index in moved if ways[index] == way]
        if len(those) == 1 and colors[things[those[0]].color] == shapes[things[those[0]].shape] == 1:
            yield Question("which", f"what color is the shape that moved {way}?", things[those[0]].color, tuple(those))
