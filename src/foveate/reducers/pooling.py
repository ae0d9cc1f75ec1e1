"""Honest baselines: average neighbouring visual tokens, or show the tower a smaller image.

Neither looks at the content, both are cheap, and many published methods do not beat them on every benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.select import padded_indices
from ..reduction import (
    BEFORE_LAYERS,
    Budget,
    Decision,
    MethodInfo,
    OptionError,
    Patches,
    Reducer,
    UnsupportedError,
    View,
    register,
)
from ._images import by_block, by_image, counts_per_image, renumber_if_possible, take
from ._merging import decide_by_groups, tower_leaders

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["AveragePool", "Downsample", "pooled_grid"]


def pooled_grid(height: int, width: int, most: int) -> tuple[int, int]:
    """A coarser grid of at most `most` cells: many cells, near-square ones (at most twice as long as wide if possible).

    The cells' number divided by the fourth root of their side ratio is maximal: (12, 16) for 192 of 24 x 24, (11, 11)
    for 128, (8, 8) for 64.
    """

    def rank(grid: tuple[int, int]) -> tuple[bool, float]:
        ratio = height / grid[0] * grid[1] / width
        stretch = max(ratio, 1 / ratio)
        return (True, grid[0] * grid[1] / stretch**0.25) if stretch <= 2 else (False, -stretch)

    grids = [
        (rows, columns)
        for rows in range(1, min(height, most) + 1)
        for columns in range(1, min(width, most // rows) + 1)
    ]
    return max(grids, key=rank)


@register("averagepool", MethodInfo(paper="baseline", acts="before the LLM", needs="nothing"))
@dataclass
class AveragePool(Reducer):
    """Average the visual tokens in the cells of a coarser grid, block by block (image, tile, frame).

    A block gets its share of `keep` by its number of patches; its grid is `pooled_grid` of that. Where no near-square
    grid has that many cells fewer tokens stay (121 for 128 of 24 x 24; of tiny images a good deal fewer), never more;
    `Trace` says how many. Cells differ by a row or a column where the grids do not divide. A pooled token lives at the
    slot in the middle of its cell; learnt row ends (LLaVA-NeXT) are dropped. Positions are renumbered, kept
    with M-RoPE and sliding windows.

    Args:
        keep: visual tokens per image (int), or their fraction (float in (0, 1]).
        faithful: accepted like everywhere; there is no official code, so it changes nothing.

    Raises:
        BudgetError: bad `keep`.
    """

    keep: int | float
    faithful: bool = False

    def __post_init__(self) -> None:
        self._budget = Budget(self.keep)
        self.stages = (BEFORE_LAYERS,)

    def prepare(self, anatomy: Anatomy) -> None:
        self.positions = renumber_if_possible(anatomy)

    def decide(self, view: View) -> Decision | None:
        images, blocks = by_image(view), by_block(view)
        if not len(images.rows) or not len(blocks.rows):
            return None
        counts = counts_per_image(self._budget, images)
        if bool((counts == images.valid.sum(1)).all()):
            return None
        cells, middles = _cells(blocks, _shares(view, images, blocks, counts))
        number = int(cells.max()) + 1
        hidden = take(view.hidden, blocks)
        inside = (cells >= 0).to(torch.float32)
        place = cells.clamp_min(0)
        total = inside.new_zeros(len(cells), number).scatter_add(1, place, inside)
        means = inside.new_zeros(len(cells), number, hidden.shape[2])
        means = means.scatter_add(1, place[..., None].expand_as(hidden), hidden.float() * inside[..., None])
        means = means / total.clamp_min(1)[..., None]

        leaders = middles.gather(1, place)
        pooled = blocks.to_slots((cells + 1).clamp_min(0), *view.active.shape) > 0
        # An image that keeps all its tokens keeps its row ends, too.
        whole = images.to_slots((images.valid & (counts == images.valid.sum(1))[:, None]).float(), *view.active.shape)
        decision = decide_by_groups(view, blocks, leaders, dropped=view.visual & ~pooled & (whole == 0))
        kept = pooled if decision.keep is None else pooled & decision.keep
        decision.slots = padded_indices(kept, int(kept.sum(1).max()))
        flat = torch.arange(len(cells), device=cells.device)[:, None] * number + cells + 1
        cell = blocks.to_slots(torch.where(cells >= 0, flat, 0), *view.active.shape)
        cell = cell.gather(1, decision.slots.clamp_min(0))
        decision.values = means.flatten(0, 1)[(cell - 1).clamp_min(0)].to(view.hidden.dtype)
        return decision


def _shares(view: View, images: Patches, blocks: Patches, counts: Tensor) -> list[int]:
    """Tokens for each block: the image's budget by number of patches, remainders to the first ones."""
    numbers = torch.arange(len(images.rows), device=counts.device)
    owner = images.to_slots(numbers[:, None].expand_as(images.slots), *view.active.shape)
    owners, patches, budgets = (
        owner[blocks.rows, blocks.slots[:, 0]].tolist(), blocks.valid.sum(1).tolist(), counts.tolist(),
    )  # fmt: skip
    whole = [0] * len(budgets)
    for image, size in zip(owners, patches):
        whole[image] += size
    shares, seen = [], [0] * len(budgets)
    for image, size in zip(owners, patches):
        budget = min(budgets[image], whole[image])
        before, seen[image] = budget * seen[image] // whole[image], seen[image] + size
        shares.append(budget * seen[image] // whole[image] - before)
    return shares


def _cells(blocks: Patches, shares: list[int]) -> tuple[Tensor, Tensor]:
    """Cell of each patch (I, N), -1 where it has none; place in its block of each cell's middle patch (I, cells)."""
    device = blocks.slots.device
    grids = blocks.grid.tolist()
    targets = [pooled_grid(h, w, share) if share and h else (0, 0) for (h, w), share in zip(grids, shares)]
    rows, columns = torch.tensor(targets, device=device).T[:, :, None]
    height, width = blocks.grid.T[:, :, None]
    place = torch.arange(blocks.slots.shape[1], device=device)
    y, x = place // width.clamp_min(1), place % width.clamp_min(1)
    cells = y * rows // height.clamp_min(1) * columns + x * columns // width.clamp_min(1)
    cells = torch.where(blocks.valid & (rows > 0), cells, -1)
    number = torch.arange(int((rows * columns).max()) if len(targets) else 0, device=device)
    row, column = number // columns.clamp_min(1), number % columns.clamp_min(1)

    def middle(index: Tensor, parts: Tensor, whole: Tensor) -> Tensor:
        first = -(-index * whole // parts.clamp_min(1))
        last = -(-(index + 1) * whole // parts.clamp_min(1)) - 1
        return (first + last) // 2

    middles = middle(row, rows, height) * width + middle(column, columns, width)
    return cells, middles.clamp(0, max(blocks.slots.shape[1] - 1, 0))


@dataclass(frozen=True)
class _SmallerImage:
    """See `foveate.engine.vision.merging.ShrinkSpec`."""

    budget: Budget

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return pooled_grid(height, width, self.budget.of(height * width))


@register("downsample", MethodInfo(paper="baseline", acts="before the vision tower", needs="CLIP or SigLIP tower"))
@dataclass
class Downsample(Reducer):
    """Show the vision tower a smaller image: fewer patches, each covering more of it.

    The pixels are reduced (bilinear, antialiased) to the size whose patches are `pooled_grid` of `keep`, and the tower
    runs on that with interpolated position embeddings, as CLIP and SigLIP offer it; so the tower becomes cheaper, too.
    Each feature takes the slot of the first patch of its cell. Fewer than `keep` tokens may stay where `keep` is no
    grid (see `AveragePool`); where tiles are unpadded (LLaVA-NeXT) cells at the edge may make it a few more, and learnt
    row ends are dropped. Families that take images of any size (Qwen-VL, Pixtral) need no method for this: resize the
    image before the processor.

    Args:
        keep: visual tokens per image (int), or their fraction (float in (0, 1]); only a fraction where an image has
            several tiles.
        faithful: accepted like everywhere; there is no official code, so it changes nothing.

    Raises:
        BudgetError: bad `keep`.
        OptionError: an int where images have several tiles.
        UnsupportedError: when applied to a tower that takes images of one size only, or of any size.
    """

    keep: int | float
    faithful: bool = False
    tower: _SmallerImage = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.tower = _SmallerImage(Budget(self.keep))
        self.stages = (BEFORE_LAYERS,)

    def prepare(self, anatomy: Anatomy) -> None:
        self.positions = renumber_if_possible(anatomy)
        if anatomy.vision is None:
            raise UnsupportedError("there is no vision tower; give it a smaller image yourself")
        if isinstance(self.keep, int) and hasattr(anatomy.base, "pack_image_features"):
            raise OptionError(f"keep={self.keep}: images have several tiles here; give a fraction")

    def decide(self, view: View) -> Decision | None:
        images = by_image(view)
        if not len(images.rows):
            return None
        leaders = tower_leaders(view, images)
        own = torch.arange(leaders.shape[1], device=leaders.device)
        smaller = ((leaders != own) & images.valid).any(1, keepdim=True)
        reduced = images.to_slots((images.valid & smaller).float(), *view.active.shape) > 0
        assert view.tower_groups is not None  # `tower_leaders` has refused it
        ends = reduced & (view.tower_groups < 0)  # a row end belongs to the larger image
        return decide_by_groups(view, images, leaders, dropped=ends)
