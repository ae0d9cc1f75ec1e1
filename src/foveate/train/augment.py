"""RandAugment (arXiv 1909.13719): some of thirteen changes, drawn for each image, at one strength.

Without inversion and cut-out, which ViLT leaves out because questions ask for colours and small things. Nothing flips.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

__all__ = ["rand_augment"]

CHANGES = 2
STRENGTH = 9 / 30
"""PuMer's: two changes at strength 9 of 30."""

Change = Callable[[Image.Image, float, int], Image.Image]
"""(image, strength from 0 to 1, sign)."""


def rand_augment(
    image: Image.Image, rng: np.random.Generator, changes: int = CHANGES, strength: float = STRENGTH
) -> Image.Image:
    """An RGB image changed by `changes` operations drawn from `rng`; the size stays."""
    for _ in range(changes):
        change, sign = _CHANGES[rng.integers(len(_CHANGES))], 1 if rng.integers(2) else -1
        image = change(image, strength, sign)
    return image


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Change:
    return lambda image, strength, sign: kind(image).enhance(1 + sign * 0.9 * strength)


_CHANGES: tuple[Change, ...] = (
    lambda image, strength, sign: ImageOps.autocontrast(image),
    lambda image, strength, sign: ImageOps.equalize(image),
    lambda image, strength, sign: ImageOps.posterize(image, 8 - round(4 * strength)),
    lambda image, strength, sign: ImageOps.solarize(image, 256 - round(256 * strength)),
    lambda image, strength, sign: image.rotate(30 * strength * sign, Image.Resampling.BILINEAR),
    lambda image, strength, sign: _affine(image, 1, 0.3 * strength * sign, 0, 0, 1, 0),
    lambda image, strength, sign: _affine(image, 1, 0, 0, 0.3 * strength * sign, 1, 0),
    lambda image, strength, sign: _affine(image, 1, 0, image.width / 3 * strength * sign, 0, 1, 0),
    lambda image, strength, sign: _affine(image, 1, 0, 0, 0, 1, image.height / 3 * strength * sign),
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
)
