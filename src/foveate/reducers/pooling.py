"""Honest baselines: average neighbouring visual tokens, or show the tower a smaller image.

Neither looks at the content, both are cheap, and many published methods do not beat them on every benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.host import to_device
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
from ._images import blocks_on_host, by_image, on_device, renumber_if_possible, take
from ._merging import decide_by_groups, decide_by_origin, spread, tower_leaders

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
        images = by_image(view)
        if view.layout is None or not len(images.rows):
            return None
        size = images.valid.sum(1)
        sizes, counts = torch.stack([size, self._budget.per_row(size, most=images.slots.shape[1])]).tolist()
        blocks, owners = blocks_on_host(view.layout)
        if counts == sizes or not owners:
            return None
        # Where which patch goes is arithmetic, and is done on the host.
        cells, middles = _cells(blocks, _shares(owners, blocks.valid.sum(1).tolist(), counts))
        number, shape = int(cells.max()) + 1, view.active.shape
        origin = spread(blocks, middles.gather(1, cells.clamp_min(0)), *shape)
        cell = torch.arange(len(cells))[:, None] * number + cells + 1
        cell = blocks.to_slots(torch.where(cells >= 0, cell, 0), *shape)
        pooled = cell > 0
        leads = pooled & (origin == torch.arange(shape[1]))
        slots = padded_indices(leads, int(leads.sum(1).max()))
        whole = torch.zeros(shape, dtype=torch.bool)  # an image that keeps all its tokens keeps its row ends, too
        for image, had, has in zip((i for row in view.layout.images for i in row), sizes, counts):
            whole[image.row, image.slots] = had == has

        device = view.hidden.device
        hidden, inside = take(view.hidden, on_device(blocks, device)), to_device(cells >= 0, device)
        place = to_device(cells.clamp_min(0), device)
        total = torch.zeros(len(cells), number, device=device).scatter_add_(1, place, inside.float())
        means = torch.zeros(len(cells), number, hidden.shape[2], device=device)
        means.scatter_add_(1, place[..., None].expand_as(hidden), hidden.float() * inside[..., None])
        means /= total.clamp_min(1)[..., None]
        dropped = view.visual & to_device(~(pooled | whole), device)
        decision = decide_by_origin(view, to_device(origin, device), dropped)
        cell = to_device((cell.gather(1, slots.clamp_min(0)) - 1).clamp_min(0), device)
        slots = to_device(slots, device)
        decision.slots = torch.where(view.active.gather(1, slots.clamp_min(0)), slots, -1)
        decision.values = means.flatten(0, 1)[cell].to(view.hidden.dtype)
        return decision


def _shares(owners: list[int], patches: list[int], budgets: list[int]) -> list[int]:
    """Tokens for each block: the image's budget by number of patches, remainders to the first ones."""
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
    grids = blocks.grid.tolist()
    targets = [pooled_grid(h, w, share) if share and h else (0, 0) for (h, w), share in zip(grids, shares)]
    rows, columns = torch.tensor(targets).T[:, :, None]
    height, width = blocks.grid.T[:, :, None]
    place = torch.arange(blocks.slots.shape[1])
    y, x = place // width.clamp_min(1), place % width.clamp_min(1)
    cells = y * rows // height.clamp_min(1) * columns + x * columns // width.clamp_min(1)
    cells = torch.where(blocks.valid & (rows > 0), cells, -1)
    number = torch.arange(int((rows * columns).max()) if len(targets) else 0)
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
