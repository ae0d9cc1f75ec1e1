"""Rows into batches of an encoder-style model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data import Finite, Mixture, draw_texts
from .models import Student
from .rows import Row
from .vocabulary import Vocabulary

__all__ = ["Collator", "Held"]


class Held:
    """Evaluation rows of several data sets, one after the other: position -> (position, row)."""

    def __init__(self, sources: Sequence[Finite]) -> None:
        self.sources = list(sources)
        self._places = [(number, i) for number, source in enumerate(sources) for i in range(source.size or 0)]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, position: int) -> tuple[int, Row]:
        number, index = self._places[position]
        return position, self.sources[number].row(index)

    def source(self, position: int) -> int:
        """Number of the data set at a position."""
        return self._places[position][0]

    def wrong_texts(self, position: int, image_id: int | str, count: int) -> list[str]:
        """As in a mixture, the same in every run."""
        rng = np.random.default_rng([13, position])
        return draw_texts(self.sources[self.source(position)], rng, image_id, count)


class Collator:
    """Batches of `(position, row)`.

    A batch has `input_ids` and `attention_mask` (B, L), `pixel_values` (B, 3, H, W) or (B, 2, 3, H, W), `pixel_mask`
    where the model takes it, `labels`, and `source`, the number of each row's data set. In retrieval each image has
    `1 + negatives` texts, the right one first: `input_ids` (B * texts, L), and one label 0 per image.

    Args:
        positions: whose rows are collated, for wrong texts and augmentation.
        augment: RandAugment, drawn from the position.
    """

    def __init__(
        self,
        task: str,
        student: Student,
        vocabulary: Vocabulary | None,
        positions: Mixture | Held,
        negatives: int = 0,
        augment: bool = False,
    ) -> None:
        self.task, self.student, self.vocabulary = task, student, vocabulary
        self.positions, self.negatives, self.augment = positions, negatives, augment

    def __call__(self, items: Sequence[tuple[int, Row]]) -> dict[str, Tensor]:
        places = [position for position, _ in items]
        rows = [row for _, row in items]
        batch = self._images(items)
        batch |= self._texts(self._phrases(items))
        batch["labels"] = self._labels(rows)
        if isinstance(self.positions, Held):
            batch["source"] = torch.tensor([self.positions.source(position) for position in places])
        return batch

    def _images(self, items: Sequence[tuple[int, Row]]) -> dict[str, Tensor]:
        pictures = [image for _, row in items for image in row.images]
        if self.augment and isinstance(self.positions, Mixture):
            from .augment import rand_augment

            rngs = [self.positions.rng(position, 1) for position, row in items for _ in row.images]
            pictures = [rand_augment(image, rng) for image, rng in zip(pictures, rngs)]
        batch = dict(self.student.image_processor(images=pictures, return_tensors="pt"))
        if self.student.family == "meter":
            batch.pop("pixel_mask", None)
        pair = len(items[0][1].images)
        return batch if pair == 1 else {name: value.unflatten(0, (-1, pair)) for name, value in batch.items()}

    def _phrases(self, items: Sequence[tuple[int, Row]]) -> list[str]:
        if self.task != "retrieval":
            return [row.text for _, row in items]
        return [
            text
            for position, row in items
            for text in (row.text, *self.positions.wrong_texts(position, row.image_id, self.negatives))
        ]

    def _texts(self, texts: list[str]) -> dict[str, Tensor]:
        encoded: Any = self.student.tokenizer(
            texts, padding=True, truncation=True, max_length=self.student.words, return_tensors="pt"
        )
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    def _labels(self, rows: Sequence[Row]) -> Tensor:
        if self.task == "retrieval" or self.vocabulary is None:
            return torch.zeros(len(rows), dtype=torch.long)
        if self.task == "vqa":
            return torch.stack([self.vocabulary.target(row.answer) for row in rows])
        return torch.tensor([self.vocabulary.label(row.answer) for row in rows])
