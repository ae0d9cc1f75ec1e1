"""What is learnt from: data sets as rows, and mixtures in which everything is a function of the seed and the position.

A run sees positions 0, 1, 2, ... Which row stands at a position, how it is augmented, which wrong texts go with it: all
of that is computed from the seed and the position, never carried over. So a run that was killed goes on as if nothing
had happened, and every process of a distributed run can work out its own share.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..evaluate.data import DataError
from ..evaluate.data import load as load_questions
from ..zoo import scenes
from .rows import Row, StoredRow, read_rows

__all__ = ["Endless", "Finite", "Mixture", "Row", "Source", "draw_texts", "evaluation", "open_source", "parts"]

QUESTIONS = 5
"""Questions per rendered scene; they follow each other, so that a scene is painted once."""
_STRIDE = 60
"""Positions after which the order of the data sets of a mixture repeats."""
HELD_OUT = 20
"""Of a local file that comes without `--eval-data`, the rows of every 20th image are kept for evaluation."""


class Source:
    """A data set: rows by number. `size` is None for a generator, whose rows never end."""

    name: str
    size: int | None

    def row(self, index: int) -> Row:
        """The row, its images opened."""
        raise NotImplementedError

    def text(self, index: int) -> tuple[str, int | str]:
        """Text and image id of a row, without opening an image."""
        row = self.row(index)
        return row.text, row.image_id

    def answers(self) -> set[str]:
        """Every answer there may be."""
        raise NotImplementedError


class Finite(Source):
    """Rows of a file or of easy-VQA."""

    def __init__(self, name: str, rows: Sequence[Any]) -> None:
        self.name, self.rows, self.size = name, rows, len(rows)

    def row(self, index: int) -> Row:
        found = self.rows[index]
        return found if isinstance(found, Row) else found.open()

    def text(self, index: int) -> tuple[str, int | str]:
        return self.rows[index].text, self.rows[index].image_id

    def answers(self) -> set[str]:
        return {
            answer
            for row in self.rows
            if row.answer is not None
            for answer in ((row.answer,) if isinstance(row.answer, str) else row.answer)
        }


class Endless(Source):
    """Rendered scenes of the training split: row `i` is question `i % QUESTIONS` about scene `i // QUESTIONS`."""

    size = None

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed = name, seed
        self._scene = functools.lru_cache(maxsize=256)(self._paint)

    def _paint(self, image_id: int) -> tuple[Image.Image, list[scenes.Question]]:
        # The stream of `scenes.scenes(split="train")`.
        rng = np.random.default_rng([self.seed, 0, image_id])
        scene = scenes.paint(rng, scenes.place(rng), "train")
        return Image.fromarray(scene.pixels), scenes.ask(rng, scene.things, QUESTIONS)

    def row(self, index: int) -> Row:
        image, questions = self._scene(index // QUESTIONS)
        question = questions[index % QUESTIONS % len(questions)]
        return Row((image,), question.text, question.answer, index // QUESTIONS)

    def answers(self) -> set[str]:
        digits = map(str, range(10))  # counts are among them
        return {*scenes.COLORS, *scenes.SHAPES, *scenes.QUADRANTS, *digits, "yes", "no"}


def parse_name(text: str) -> tuple[str, float]:
    """ "scenes=3" -> ("scenes", 3.0); the weight of a data set in a mixture is 1 unless it is given.

    Raises:
        DataError: a weight that is not above 0.
    """
    name, equals, weight = text.rpartition("=")
    try:
        number = float(weight)
    except ValueError:
        return text, 1.0
    if not equals:
        return text, 1.0
    if not number > 0:
        raise DataError(f"data {text}: a weight must be above 0")
    return name, number


def open_source(name: str, task: str, seed: int, held_out: bool) -> Source:
    """A training data set.

    Args:
        name: "easy-vqa" (its training split), "scenes", or a `.jsonl` or `.parquet` file.
        held_out: leave out of a local file the rows that `evaluation` takes.

    Raises:
        DataError: unknown, unreadable, empty, or of another task.
    """
    if name in ("easy-vqa", "scenes"):
        if task != "vqa":
            raise DataError(f"data {name}: questions and answers; task {task} needs a file of its own")
        if name == "scenes":
            return Endless(name, seed)
        return Finite(name, _easyvqa("train", None))
    rows = read_rows(Path(name), task)
    return Finite(name, _split(rows)[0] if held_out else rows)


def evaluation(names: Sequence[str], task: str, count: int, from_training: bool) -> list[Finite]:
    """Held-out rows, at most `count` of each data set, the same in every run.

    Args:
        names: test splits of easy-VQA and scenes, or files.
        from_training: files hold the training data too: take every 20th image; none of a file of fewer than 20.
    """
    found = []
    for name in names:
        if name in ("easy-vqa", "scenes"):
            rows: Sequence[Any] = [
                Row((sample.image,), sample.question, sample.answer, sample.image_id)
                for sample in load_questions(name, count, seed=0)
            ]
        else:
            rows = read_rows(Path(name), task)
            if from_training:
                rows = _split(rows)[1]
            if len(rows) > count:
                rows = [rows[i] for i in sorted(np.random.default_rng(0).choice(len(rows), count, replace=False))]
        lonely = task == "retrieval" and len({row.image_id for row in rows}) < 2  # nothing to tell it from
        if rows and not lonely:
            found.append(Finite(name, rows))
    return found


def _split(rows: Sequence[StoredRow]) -> tuple[list[StoredRow], list[StoredRow]]:
    """Rows to learn from, and held-out rows, about other images."""
    images = {image: number for number, image in enumerate(dict.fromkeys(row.image_id for row in rows))}
    parted: tuple[list[StoredRow], list[StoredRow]] = ([], [])
    for row in rows:
        parted[images[row.image_id] % HELD_OUT == HELD_OUT - 1].append(row)
    return parted


def _easyvqa(split: str, count: int | None) -> list[Row]:
    from ..zoo.easyvqa import easyvqa

    try:
        samples = easyvqa(split, count)
    except ImportError as error:
        raise DataError("data easy-vqa: needs the package easy-vqa (pip install 'foveate[train]')") from error
    return [Row((sample.image,), sample.question, sample.answer, sample.image_id) for sample in samples]


class Mixture:
    """Data sets side by side, each in an order of its own that is drawn anew for every pass.

    A map-style dataset for the Trainer: `len` positions, each with its row.

    Args:
        sources: what is mixed.
        weights: how often each is seen, relative to the others.
        seed: of the orders.
        length: how many positions the run has.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], seed: int, length: int = 0) -> None:
        self.sources, self.seed, self.length = list(sources), seed, length
        self._turns = _turns(weights)
        self._shares = [self._turns.count(i) for i in range(len(sources))]
        # How often the same source came before, within a stride.
        self._ranks = [self._turns[:i].count(turn) for i, turn in enumerate(self._turns)]
        self._order = functools.lru_cache(maxsize=2 * len(sources))(self._permutation)

    def _permutation(self, number: int, epoch: int) -> np.ndarray:
        size = self.sources[number].size
        assert size is not None
        return np.random.default_rng([self.seed, 11, number, epoch]).permutation(size)

    @property
    def examples(self) -> int:
        """Positions of one pass over the data: each finite data set once on average; 40,000 for generators alone."""
        finite = [(source.size, share) for source, share in zip(self.sources, self._shares) if source.size is not None]
        if not finite:
            return 40_000
        return round(sum(size for size, _ in finite) * len(self._turns) / sum(share for _, share in finite))

    def place(self, position: int) -> tuple[int, int]:
        """(number of the source, number of the row) at a position."""
        turn, within = divmod(position, len(self._turns))
        number = self._turns[within]
        seen = turn * self._shares[number] + self._ranks[within]
        size = self.sources[number].size
        if size is None:
            return number, seen
        epoch, index = divmod(seen, size)
        return number, int(self._order(number, epoch)[index])

    def rng(self, position: int, purpose: int) -> np.random.Generator:
        """Random numbers for one use at one position."""
        return np.random.default_rng([self.seed, 12, purpose, position])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> tuple[int, Row]:
        number, index = self.place(position)
        return position, self.sources[number].row(index)

    def wrong_texts(self, position: int, image_id: int | str, count: int) -> list[str]:
        """Texts of other images of the data set at a position.

        Raises:
            DataError: there are none.
        """
        source = self.sources[self.place(position)[0]]
        return draw_texts(source, self.rng(position, 0), image_id, count)


def draw_texts(source: Source, rng: np.random.Generator, image_id: int | str, count: int) -> list[str]:
    """`count` texts of `source` that belong to other images. Raises `DataError` if there are none."""
    size = source.size or 40_000
    texts: list[str] = []
    for _ in range(50 * count):
        text, other = source.text(int(rng.integers(size)))
        if other != image_id:
            texts.append(text)
        if len(texts) == count:
            return texts
    raise DataError(f"data {source.name}: retrieval needs texts of other images, there is only one image")


def _turns(weights: Sequence[float]) -> list[int]:
    """Which source is at each place of a stride; every source at least once, spread evenly."""
    if len(weights) == 1:
        return [0]
    total, turns = sum(weights), list[int]()
    owed = [0.0] * len(weights)
    for _ in range(max(_STRIDE, len(weights))):
        owed = [debt + weight / total for debt, weight in zip(owed, weights)]
        turn = max(range(len(owed)), key=owed.__getitem__)
        owed[turn] -= 1
        turns.append(turn)
    if len(set(turns)) < len(weights):
        raise DataError(f"data: weights {', '.join(map(str, weights))} are too far apart (at most 1 to {_STRIDE})")
    return turns


def parts(names: Sequence[str]) -> Mapping[str, float]:
    """Weights by name, in order. Raises `DataError` for a name that comes twice."""
    weights: dict[str, float] = {}
    for text in names:
        name, weight = parse_name(text)
        if name in weights:
            raise DataError(f"data {name}: named twice")
        weights[name] = weight
    return weights
