"""What the images of each model family consist of, in the order in which their features fill the visual slots.

One planner per way of cutting an image (not per model), chosen by what the inputs and the config say. A planner returns
pieces (rectangles of patches); it raises whatever it likes if the inputs do not add up, and `layout` then guesses.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from .layout_inputs import THUMB, LayoutInputs, Run, modality, runs_of
from .streams import merge_side, shaped
from .tower import pack, tiles_of

__all__ = ["Piece", "Stream", "plan"]

WHOLE = (0.0, 0.0, 1.0, 1.0)
_MARKER = 8  # tokens at most for a line break, <fake> and the tag of a tile, which is one token or spelt out


@dataclass(frozen=True)
class Piece:
    """A rectangle of patches that fills consecutive visual slots row by row.

    Attributes:
        kind: as in `Block`.
        grid: (h, w) patches.
        box: area of the image shown, None if unknown.
        newlines: newline slots after each row of patches.
        shown: (h * w,) bool, patches that fill a slot; None: all of them.
    """

    kind: Literal["base", "tile", "thumbnail", "frame"]
    grid: tuple[int, int]
    box: tuple[float, float, float, float] | None = WHOLE
    newlines: int = 0
    shown: Tensor | None = None

    @property
    def length(self) -> int:
        """Slots filled, newline slots included."""
        if self.shown is not None:
            return int(self.shown.sum())
        return self.grid[0] * (self.grid[1] + self.newlines)


NEWLINE = Piece("base", (1, 0), None, newlines=1)
Stream = tuple[list[tuple[int, int]], list[list[Piece]]]
"""(row, slot) pairs in order, and the images that fill them."""


# ------------------------------------------------------------------------------------------------------- planners
def plan(prompt: LayoutInputs) -> list[Stream]:
    """The streams of visual slots and the images that fill them. Raises whatever, if the inputs do not add up."""
    kind = getattr(prompt.config, "model_type", "")
    if prompt.anatomy.resampler is not None:
        raise ValueError("visual tokens show no patches of their own")
    if kind in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[kind](prompt)
    if "image_grid_thw" in prompt.info or "video_grid_thw" in prompt.info:
        return _grids(prompt)
    if hasattr(prompt.anatomy.base, "pack_image_features"):
        return _anyres(prompt)
    if "image_sizes" in prompt.info and getattr(prompt.vision_config, "model_type", "") == "pixtral":
        return _native_sizes(prompt)
    return _squares(prompt)


def _squares(prompt: LayoutInputs) -> list[Stream]:
    """LLaVA, VipLLaVA, Gemma 3, PaliGemma: each image one square of a fixed number of patches.

    A crop of Gemma 3's pan-and-scan is an image of its own: nothing in the inputs says that it is a crop.
    """
    images, videos = modality(prompt.anatomy, prompt.visual, prompt.info)
    slots, streams = prompt.slots(images), _frames(prompt, videos)
    if slots:
        if prompt.oblong:
            raise ValueError("the pixels are no squares")
        tokens = getattr(prompt.config, "mm_tokens_per_image", None)
        if not tokens:
            tokens = prompt.lengths[0] if prompt.lengths and len(set(prompt.lengths)) == 1 else _tower_side(prompt) ** 2
        streams.append((slots, [[Piece("base", _square(tokens))] for _ in range(_times(len(slots), tokens))]))
    return streams


def _frames(prompt: LayoutInputs, slots: Tensor) -> list[Stream]:
    """Videos as whole frames: Video-LLaVA (class tokens are slots, too), LLaVA-NeXT-Video, LLaVA-OneVision (pooled
    frames, a newline slot at the end)."""
    if not bool(slots.any()):
        return []
    ends = [NEWLINE] if hasattr(prompt.anatomy.base, "apply_pooling") else []
    lengths = prompt.video_lengths
    if lengths is None and torch.equal(slots, prompt.visual):  # Perception LM encodes frames as images
        lengths = prompt.lengths
    if lengths is None or prompt.video_frames is None:
        if not ends:
            return [(prompt.slots(slots), _runs_as_frames(prompt, runs_of(slots)))]
        side = -(-_tower_side(prompt) // 2)
        pooled = Piece("frame", (side, side))
        runs = runs_of(slots)
        return [(prompt.slots(slots), [[*[pooled] * _times(run.length - 1, side**2), *ends] for run in runs])]
    videos, frames = prompt.video_frames
    per_frame = _times(_times(sum(lengths), videos) - len(ends), frames)
    has_class_token = math.isqrt(per_frame) ** 2 != per_frame
    frame = [*[NEWLINE] * has_class_token, Piece("frame", _square(per_frame - has_class_token))]
    return [(prompt.slots(slots), [[*frame * frames, *ends] for _ in range(videos)])]


def _runs_as_frames(prompt: LayoutInputs, runs: list[Run]) -> list[list[Piece]]:
    """Gemma 4, Molmo 2: frames between which time stamps stand; the features of each video come end to end."""
    if prompt.video_lengths is None:
        raise ValueError("frames are not told apart")
    copies = max(1, sum(run.length for run in runs) // max(1, sum(prompt.video_lengths)))  # beams repeat each row
    videos, left = [], iter([run for run in runs if run.row % copies == 0])
    for length in prompt.video_lengths:
        frames: list[Run] = []
        while sum(run.length for run in frames) < length:
            frames.append(next(left))
        if len(frames) < 2 or len({run.length for run in frames}) > 1:  # MiniCPM-V: features come frame by frame
            raise ValueError("frames are not told apart")
        side = math.isqrt(frames[0].length)
        grid, box = ((side, side), WHOLE) if side**2 == frames[0].length else ((1, frames[0].length), None)
        videos.append([Piece("frame", grid, box)] * len(frames))
    return videos


def _grids(prompt: LayoutInputs) -> list[Stream]:
    """Qwen-VL, GLM-4V: (t, h, w) per image or video, in patches of the tower; merge x merge of them make one slot.

    VideoLLaMA 3 says how many for each image, and leaves out patches that are as in the frame before.
    """
    info, streams = prompt.info, []
    for slots, what in zip(modality(prompt.anatomy, prompt.visual, info), ("image", "video")):
        if not bool(slots.any()):
            continue
        grids = info[f"{what}_grid_thw"].tolist()
        merges = info.get(f"{what}_merge_sizes")
        sides = [merge_side(prompt.anatomy) or 0] * len(grids) if merges is None else merges.tolist()
        images: list[list[Piece]] = []
        for (t, h, w), side in zip(grids, sides):
            is_video = t > 1 or what == "video"
            images.append([Piece("frame" if is_video else "base", (h // side, w // side))] * t)
        if what == "video" and "video_compression_mask" in info:
            images = _left_out(images, info["video_compression_mask"])
        streams.append((prompt.slots(slots), images))
    return streams


def _left_out(videos: list[list[Piece]], shown: Tensor) -> list[list[Piece]]:
    """Frames of which only the patches of a mask, all videos end to end, fill a slot."""
    parts = iter(shown.split([piece.length for frames in videos for piece in frames]))
    return [[replace(piece, shown=next(parts)) for piece in frames] for frames in videos]


def _native_sizes(prompt: LayoutInputs) -> list[Stream]:
    """Mistral 3, LLaVA with Pixtral: the image at its own size; [IMG_BREAK] tokens between the rows are text."""
    step = prompt.vision_config.patch_size * (getattr(prompt.config, "spatial_merge_size", None) or 1)
    sizes = torch.as_tensor(prompt.info["image_sizes"]).tolist()
    return [(prompt.slots(prompt.visual), [[Piece("base", (h // step, w // step))] for h, w in sizes])]


def _anyres(prompt: LayoutInputs) -> list[Stream]:
    """LLaVA-NeXT, LLaVA-OneVision: base image, then the unpadded mosaic of its tiles, a newline slot after each line.

    The model's own packing is run on coordinates in place of features, so every rounding in it is the model's.
    """
    image_slots, video_slots = modality(prompt.anatomy, prompt.visual, prompt.info)
    streams = _frames(prompt, video_slots)
    if bool(image_slots.any()):
        sizes, tiles = torch.as_tensor(prompt.info["image_sizes"]).tolist(), tiles_of(prompt.anatomy, prompt.info)
        streams.append((prompt.slots(image_slots), [_packed(prompt, size, n) for size, n in zip(sizes, tiles)]))
    return streams


def _packed(prompt: LayoutInputs, size: list[int], tiles: int) -> list[Piece]:
    side = _tower_side(prompt)
    (packed,) = pack(prompt.anatomy, [torch.zeros(tiles, side * side, 1)], [size])
    ends = (packed[side * side :] < 0).nonzero().flatten().tolist()
    whole = Piece("base", (side, side))
    if tiles == 1:
        return [whole, *[NEWLINE] * len(ends)]
    return [whole, Piece("tile", (len(ends), ends[0]), WHOLE, newlines=1)]


def _tiles_in_a_run(prompt: LayoutInputs) -> list[Stream]:
    """InternVL: the tiles of an image without anything between them, the thumbnail last."""
    tokens = prompt.lengths[0] if prompt.lengths else prompt.config.image_seq_length
    return _tiled(prompt, [[run] for run in runs_of(prompt.visual)], tokens)


def _tiles_closed(prompt: LayoutInputs, after: int) -> list[Stream]:
    """Aya Vision, Cohere 2 Vision: tags between the tiles of an image, the thumbnail last, then a closing tag."""
    tokens = prompt.lengths[0] if prompt.lengths else (_tower_side(prompt) // prompt.config.downsample_factor) ** 2
    return _tiled(prompt, _by_tag(prompt, lambda run: run.end + after), tokens)


def _by_tag(prompt: LayoutInputs, place: Callable[[Run], int], opens: bool = False) -> list[list[Run]]:
    """The runs of each image, which a tag closes, that behind the last run of a row; or opens, that before its first.

    Args:
        prompt: with `input_ids`.
        place: slot of the tag of a run, if it has one.
        opens: the tag begins an image.
    """
    ids, images = prompt.of_prompt("input_ids"), list[list[Run]]()
    if ids is None:  # a tag between tiles, two tags at least between images
        for run in runs_of(prompt.visual):
            last = images[-1][-1] if images else None
            goes_on = last is not None and last.row == run.row and run.start == last.end + 1
            images[-1].append(run) if goes_on else images.append([run])
        return images
    for _, group in itertools.groupby(runs_of(prompt.visual), lambda run: run.row):
        runs = list(group)
        tag = int(ids[runs[0].row, place(runs[0 if opens else -1])])
        marked = [int(ids[run.row, place(run)]) == tag for run in runs]
        starts = marked if opens else [True, *marked[:-1]]
        for run, first in zip(runs, starts):
            images.append([run]) if first else images[-1].append(run)
    return images


def _tiles_before_the_whole(prompt: LayoutInputs) -> list[Stream]:
    """Llama 4: tiles of the picture on a canvas of their own, of which the inputs do not say how much it fills."""
    images = _by_tag(prompt, lambda run: run.end)
    pieces = [[*(Piece("tile", _square(run.length), None) for run in tiles), Piece("thumbnail", _square(last.length))]
              if tiles else [Piece("base", _square(last.length))] for *tiles, last in images]  # fmt: skip
    return [(prompt.slots(prompt.visual), pieces)]


def _shapes(prompt: LayoutInputs) -> list[Stream]:
    """LFM2-VL, MiniCPM-V: tiles of different sizes, of which the inputs do not say what part they show."""
    opens = "lfm2" not in prompt.config.model_type
    images = _by_tag(prompt, lambda run: run.start - 1 if opens else run.end, opens)
    sizes = iter(shaped(prompt.anatomy, prompt.info, sum(run.length for runs in images for run in runs)))
    pieces = []
    for runs in images:
        box = WHOLE if len(runs) == 1 else None
        pieces.append([Piece("base" if len(runs) == 1 else "tile", next(sizes), box) for _ in runs])
    return [(prompt.slots(prompt.visual), pieces)]


def _tiled(prompt: LayoutInputs, images: list[list[Run]], tokens: int) -> list[Stream]:
    grid, pieces, first = _square(tokens), [], 0
    total = _times(int(prompt.visual.sum()), tokens)
    copies = total // len(prompt.thumbs) if prompt.thumbs is not None else 1
    for runs in images:
        if copies > 1 and runs[0].row % copies:
            continue  # a repeated row (beam search): the images were given once
        count = _times(sum(run.length for run in runs), tokens)
        if count == 1:
            pieces.append([Piece("base", grid)])
        else:
            mosaic = _mosaic(prompt.thumbs, first, count)
            boxes = [None] * (count - 1) if mosaic is None else _tile_boxes(*mosaic)
            pieces.append([*(Piece("tile", grid, box) for box in boxes), Piece("thumbnail", grid)])
        first += count
    return [(prompt.slots(prompt.visual), pieces)]


def _mosaic(thumbs: Tensor | None, first: int, count: int) -> tuple[int, int] | None:
    """(rows, columns) in which the tiles of an image lie, by comparing them with its thumbnail; None if undecided."""
    if thumbs is None or thumbs.shape[0] < first + count:
        return None
    tiles, thumbnail = thumbs[first : first + count - 1], thumbs[first + count - 1]
    errors = []
    for rows in (r for r in range(1, count) if (count - 1) % r == 0):
        columns = (count - 1) // rows
        picture = tiles.reshape(rows, columns, -1, THUMB, THUMB).permute(2, 0, 3, 1, 4)
        picture = picture.reshape(-1, rows * THUMB, columns * THUMB)
        error = functional.adaptive_avg_pool2d(picture, THUMB) - thumbnail
        errors.append((float(error.square().mean()), (rows, columns)))
    errors.sort()
    return errors[0][1] if len(errors) == 1 or errors[0][0] < 0.8 * errors[1][0] else None


def _marked_tiles(prompt: LayoutInputs) -> list[Stream]:
    """Idefics 3, SmolVLM: `<fake><row_i_col_j>` before each tile, a line break after each row, the global image last.

    Every image ends with `<fake>`, which is therefore what follows the last run of a row.
    """
    ids, runs = prompt.of_prompt("input_ids"), runs_of(prompt.visual)
    tokens = (_tower_side(prompt) // prompt.config.scale_factor) ** 2
    grid = _square(tokens)
    images: list[list[list[Run]]] = []
    for before, run in zip([None, *runs], runs):
        if ids is None or before is None or before.row != run.row:
            images.append([[run]])
            continue
        end = next(r.end for r in reversed(runs) if r.row == run.row)
        fake = int(ids[run.row, end]) if end < ids.shape[1] else None
        first, *others = ids[run.row, before.end : run.start].tolist()
        if first == fake and len(others) == 1:
            images[-1][-1].append(run)
        elif first != fake and fake in others and len(others) < _MARKER:
            images[-1].append([run])
        else:
            images.append([[run]])
    return [(prompt.slots(prompt.visual), [_marked_image(rows, tokens, grid) for rows in images])]


def _marked_image(rows: list[list[Run]], tokens: int, grid: tuple[int, int]) -> list[Piece]:
    if any(run.length != tokens for row in rows for run in row):
        raise ValueError("a tile of another size")
    *tiles, last = rows
    if not tiles and len(last) == 1:
        return [Piece("base", grid)]
    if len(last) != 1 or len({len(row) for row in tiles}) != 1:
        raise ValueError("not a grid of tiles followed by the global image")
    boxes = _tile_boxes(len(tiles), len(tiles[0]))
    return [*(Piece("tile", grid, box) for box in boxes), Piece("thumbnail", grid)]


_BY_MODEL_TYPE: dict[str, Callable[[LayoutInputs], list[Stream]]] = {
    "internvl": _tiles_in_a_run,
    "aya_vision": functools.partial(_tiles_closed, after=0),
    "cohere2_vision": functools.partial(_tiles_closed, after=1),  # each tile ends with a line break
    "lfm2_vl": _shapes,
    "llama4": _tiles_before_the_whole,
    "minicpmv4_6": _shapes,
    "minicpmv4_7": _shapes,
    "idefics3": _marked_tiles,
    "smolvlm": _marked_tiles,
    "mistral3": _native_sizes,
}


# ------------------------------------------------------------------------------------------------------- arithmetic
def _tower_side(prompt: LayoutInputs) -> int:
    size, patch = prompt.vision_config.image_size, prompt.vision_config.patch_size
    size = size[0] if isinstance(size, list | tuple) else size
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    return size // patch


def _square(tokens: int) -> tuple[int, int]:
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(f"{tokens} patches are not a square")
    return side, side


def _times(slots: int, tokens: int) -> int:
    if tokens < 1 or slots < 1 or slots % tokens:
        raise ValueError(f"{slots} slots are not whole images of {tokens}")
    return slots // tokens


def _tile_boxes(rows: int, columns: int) -> list[tuple[float, float, float, float]]:
    return [
        (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
        for row in range(rows)
        for column in range(columns)
    ]
