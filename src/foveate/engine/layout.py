"""Which sequence slot is which patch of which image, tile or frame: for merging, budgets and pictures.

Lives here: the description, and how patches are laid onto the slots of the prompt. What a family's images consist of is
in `families.images`. Nothing here is needed to run a model: an unknown family gets contiguous runs, marked as a guess.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..ops.host import to_device
from .families.images import Piece, plan
from .families.layout_inputs import LayoutInputs, Run, runs_of

if TYPE_CHECKING:
    from .families.parts import Anatomy

__all__ = ["Block", "ImageLayout", "Layout", "build_layout"]

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Block:
    """A rectangle of patches: a whole image, a tile of it, its thumbnail, or a frame of a video.

    Attributes:
        kind: `"base"` the whole image, `"tile"` a part of it in higher resolution, `"thumbnail"` the whole image beside
            its tiles, `"frame"` one time step of a video.
        slots: (h * w,) long, on the CPU: sequence slots of the patches, row by row; -1 for a patch that the model has
            left out of the prompt (VideoLLaMA 3's compression).
        grid: (h, w) patches.
        box: (x0, y0, x1, y1) of the image area shown, as fractions of the image; None if the area cannot be known. The
            image is what the processor hands on: after a centre crop or padding (`families.pixels.shown`).
    """

    kind: Literal["base", "tile", "thumbnail", "frame"]
    slots: Tensor
    grid: tuple[int, int]
    box: Box | None

    def patch_box(self, patch: int) -> Box | None:
        """Area of patch number `patch` of this block, as fractions of the image; None if it cannot be known."""
        if self.box is None:
            return None
        (height, width), (x0, y0, x1, y1) = self.grid, self.box
        y, x = divmod(patch, width)
        step_x, step_y = (x1 - x0) / width, (y1 - y0) / height
        return x0 + x * step_x, y0 + y * step_y, x0 + (x + 1) * step_x, y0 + (y + 1) * step_y


@dataclass(frozen=True)
class ImageLayout:
    """One image, or one video, of one row of the batch.

    Attributes:
        row: row of the batch.
        slots: (n,) long, on the CPU: all its sequence slots, newline slots included, in order.
        blocks: its patches.
        newline: (k,) long: slots of learnt row ends (LLaVA-NeXT, LLaVA-OneVision). They show no part of the image.
        known: False if slots and grid are guessed from contiguous runs of visual slots.
        images: how many images the caller made one item of.
    """

    row: int
    slots: Tensor
    blocks: list[Block]
    newline: Tensor
    known: bool
    images: int = 1


class Layout:
    """Where the patches of a batch are. Worked out when first asked for, at one device sync; free until then.

    Attributes:
        numbered: whether the caller numbered the images and videos himself.

    Made by `build_layout`.
    """

    def __init__(self, visual: Tensor, prompt: LayoutInputs):
        self._visual, self._prompt = visual, prompt
        self.numbered = prompt.items is not None

    @cached_property
    def images(self) -> list[list[ImageLayout]]:
        """The images of each row of the batch, in the order of their slots."""
        prompt, self._prompt = self._prompt.on_cpu(self._visual), LayoutInputs()
        return _lay_out(prompt)

    @cached_property
    def image_index(self) -> Tensor:
        """(B, S) long, on the device of the model: number of the image in its row, -1 for slots that are not visual."""
        index = torch.full(self._visual.shape, -1)
        for row, images in enumerate(self.images):
            for number, image in enumerate(images):
                index[row, image.slots] = number
        return to_device(index, self._visual.device)

    @cached_property
    def image_counts(self) -> Tensor:
        """(B,) long, on the device of the model: images in each row; a video counts as one."""
        return to_device([len(images) for images in self.images], self._visual.device)

    @property
    def known(self) -> bool:
        """False if any image was guessed from runs of visual slots."""
        return all(image.known for images in self.images for image in images)


def build_layout(anatomy: Anatomy, visual: Tensor, info: dict[str, Any], items: Tensor | None = None) -> Layout:
    """The layout of a prompt. Never raises on odd input: what does not add up is described by contiguous runs.

    Args:
        anatomy: of the model.
        visual: (B, S) bool, slots of visual tokens.
        info: what the model was called with, as far as known: `input_ids` (B, S), `mm_token_type_ids` (B, S),
            `image_grid_thw`, `video_grid_thw`, `image_sizes`, `batch_num_images`; `image_features`, the features as
            scattered (only their lengths are used); `pixel_values`, used (shrunk) to find out how the tiles of
            InternVL and Aya Vision lie, which nothing else in the inputs says: without it their `box` is None.
        items: (B, S) long, what the caller numbers 1, 2, ... in a row: images of one number become one item, frames of
            a video as a rule. None: as the inputs say.
    """
    return Layout(visual, LayoutInputs.of(anatomy, visual, info, items))


# ------------------------------------------------------------------------------------------ patches onto the slots
def _lay_out(prompt: LayoutInputs) -> list[list[ImageLayout]]:
    try:
        streams = plan(prompt)
        laid = [image for slots, images in streams for image in _fill(slots, images, prompt.rows)]
        if sum(len(image.slots) for image in laid) != len(prompt.slots(prompt.visual)):
            raise ValueError("the images do not fill the visual slots")
    except Exception:  # foreign configs and inputs may be odd in any way; a guess is always possible
        laid = [_guess(run) for run in runs_of(prompt.visual)]
    if prompt.items is not None:
        laid = _by_item(laid, prompt.items)
    rows: list[list[ImageLayout]] = [[] for _ in range(prompt.rows)]
    for image in sorted(laid, key=lambda image: (image.row, int(image.slots[0]))):
        rows[image.row].append(image)
    return rows


def _fill(slots: list[tuple[int, int]], images: list[list[Piece]], rows: int) -> list[ImageLayout]:
    """Deal the (row, slot) pairs out to the images, as transformers scatters features: one after the other."""
    needed = sum(piece.length for pieces in images for piece in pieces)
    copies = len(slots) // needed if needed else 0
    if not needed or copies * needed != len(slots) or rows % copies:
        raise ValueError("the images do not fill the visual slots")
    # Beams and return sequences repeat each row `copies` times, but the images were given once.
    laid: list[ImageLayout] = []
    for copy in range(copies):
        laid += _fill_once([pair for pair in slots if pair[0] % copies == copy], images)
    return laid


def _fill_once(slots: list[tuple[int, int]], images: list[list[Piece]]) -> list[ImageLayout]:
    laid, start = [], 0
    for pieces in images:
        end = start + sum(piece.length for piece in pieces)
        part, start = slots[start:end], end
        if len({row for row, _ in part}) != 1:
            raise ValueError("an image does not end in the row in which it began")
        laid.append(_image(part[0][0], [slot for _, slot in part], pieces))
    return laid


def _image(row: int, slots: list[int], pieces: list[Piece], known: bool = True) -> ImageLayout:
    blocks, newline, start = [], [], 0
    for piece in pieces:
        part, start = slots[start : start + piece.length], start + piece.length
        height, width = piece.grid
        step = width + piece.newlines
        if piece.shown is not None:
            there = iter(part)
            laid = [next(there) if here else -1 for here in piece.shown.tolist()]
            blocks.append(Block(piece.kind, torch.tensor(laid), (height, width), piece.box))
            continue
        patches = [slot for i, slot in enumerate(part) if i % step < width] if width else []
        newline += [slot for i, slot in enumerate(part) if i % step >= width]
        if patches:
            blocks.append(Block(piece.kind, torch.tensor(patches), (height, width), piece.box))
    return ImageLayout(row, torch.tensor(slots), blocks, torch.tensor(newline, dtype=torch.long), known)


def _by_item(laid: list[ImageLayout], items: Tensor) -> list[ImageLayout]:
    """Images that the caller gave one number, as one; an image that he gave several, as contiguous runs of each."""
    groups: dict[tuple[int, int], list[ImageLayout]] = {}
    for image in laid:
        numbers = items[image.row, image.slots].unique().tolist()
        parts = [image]
        if len(numbers) > 1:
            alone = torch.zeros_like(items)
            alone[image.row, image.slots] = items[image.row, image.slots]
            parts = [_guess(run) for number in numbers for run in runs_of(alone == number)]
        for part in parts:
            groups.setdefault((part.row, int(items[part.row, part.slots[0]])), []).append(part)
    return [_one(images) for images in groups.values()]


def _one(images: list[ImageLayout]) -> ImageLayout:
    """Images as one item, each of them a frame if they are whole."""
    if len(images) == 1:
        return images[0]
    images = sorted(images, key=lambda image: int(image.slots[0]))
    blocks = [block for image in images for block in image.blocks]
    if len(blocks) == len(images):
        blocks = [replace(block, kind="frame") for block in blocks]
    slots, newline = (torch.cat([getattr(image, name) for image in images]) for name in ("slots", "newline"))
    return ImageLayout(images[0].row, slots, blocks, newline, all(image.known for image in images), len(images))


def _guess(run: Run) -> ImageLayout:
    """A contiguous run as one image: near-square if its length allows, else one line."""
    height = next(h for h in range(math.isqrt(run.length), 0, -1) if run.length % h == 0)
    width = run.length // height
    grid = (height, width) if width <= 2 * height else (1, run.length)
    return _image(run.row, list(range(run.start, run.end)), [Piece("base", grid)], known=False)
