"""easy-VQA (V. Zhou, MIT): one shape on a plain background, from the PyPI package ``easy-vqa``.

Lives here: reading its splits as `foveate.zoo.scenes.Sample`. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from .scenes import GRID, IMAGE_SIZE, PATCH, Sample

__all__ = ["easyvqa"]

_COVERED = 0.22  # as in scenes
_CONTRAST = 40  # summed over the channels: a pixel that differs more than this from the border belongs to the object


def easyvqa(split: str = "test", count: int | None = None, seed: int = 0) -> list[Sample]:
    """Questions of easy-VQA.

    Args:
        split: "train" (38,575 questions on 4,000 images) or "test" (9,673 on 1,000 other images).
        count: how many, drawn at random without repetition; None for all of them in file order.
        seed: of the draw.

    Raises:
        ImportError: the package is not installed.
        ValueError: unknown split.
    """
    questions, paths = _read(split)
    chosen: Sequence[int] = range(len(questions))
    if count is not None and count < len(questions):
        chosen = sorted(random.Random(seed).sample(chosen, count))
    samples = []
    for index in chosen:
        text, answer, image_id = questions[index]
        image, mask = _image(paths[image_id])
        samples.append(Sample(image, text, answer, "easy", image_id, mask, mask.astype(np.int64)))
    return samples


@functools.cache
def _read(split: str) -> tuple[list[tuple[str, str, int]], Mapping[int, str]]:
    """The (question, answer, image id) rows and the image paths of a split."""
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("easy-VQA needs the package easy-vqa: pip install easy-vqa") from error
    readers = {
        "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
        "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
    }
    if split not in readers:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(readers)}")
    questions, paths = readers[split]
    return list(zip(*questions())), paths()


@functools.lru_cache(maxsize=8192)
def _image(path: str) -> tuple[Image.Image, np.ndarray]:
    """The image as shipped (64 x 64) and the object's patches, bool (G, G), found by contrast to the border."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    pixels = np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)).astype(np.int64)
    border = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    inside = np.abs(pixels - border).sum(2) > _CONTRAST
    patches = inside.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID, GRID, -1)
    return image, patches.mean(2) > _COVERED
