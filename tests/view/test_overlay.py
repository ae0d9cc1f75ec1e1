"""The picture marks what was kept, and nothing else."""

import numpy as np
import pytest
import torch
from PIL import Image

import foveate
from foveate.engine.trace import StageRecord, Trace
from foveate.evaluate.answer import answer, load
from foveate.view import SheetCell, SheetRow, overlay, save, sheet
from foveate.view.patches import Cell, canvases, paint
from foveate.zoo.scenes import scenes


def grid(side, first=0):
    return [
        Cell(first + y * side + x, (x / side, y / side, (x + 1) / side, (y + 1) / side))
        for y in range(side)
        for x in range(side)
    ]


def patch(pixels, cell):
    """The inside of a patch, borders left out."""
    height, width = pixels.shape[:2]
    left, top, right, bottom = (round(c * s) for c, s in zip(cell.box, (width, height, width, height)))
    return pixels[top + 2 : bottom - 2, left + 2 : right - 2].astype(float)


@pytest.fixture
def colourful():
    return np.random.default_rng(0).integers(60, 255, (64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("kept", [[], [0], [3, 5, 9], list(range(16))])
def test_kept_patches_are_untouched_and_removed_ones_dark_and_grey(colourful, kept):
    cells = grid(4)
    origins = torch.full((16,), -1)
    origins[kept] = torch.tensor(kept, dtype=torch.long)
    painted = paint(colourful, cells, origins)
    for cell in cells:
        before, after = patch(colourful, cell), patch(painted, cell)
        if cell.slot in kept:
            assert (before == after).all()
        else:
            assert after.mean() < 0.5 * before.mean()
            assert np.ptp(after, axis=-1).max() <= 1


def test_members_of_a_merged_token_share_a_tint(colourful):
    origins = torch.full((16,), -1)
    origins[[1, 2]], origins[[8, 9, 10]], origins[15] = 1, 9, 15
    painted = paint(colourful, grid(4), origins)
    change = [patch(painted, cell).mean((0, 1)) - patch(colourful, cell).mean((0, 1)) for cell in grid(4)]
    direction = [delta / (np.linalg.norm(delta) + 1e-9) for delta in change]
    assert direction[8] @ direction[10] > 0.9
    assert direction[2] @ direction[10] < 0.9
    assert np.abs(change[15]).max() == 0  # on its own: no tint


def test_the_painted_picture_is_the_trace(tmp_path):
    vlm = load("zoo:tiny-llava")
    sample = scenes(1, seed=5)[0]
    with foveate.apply(vlm.model, foveate.FastV(keep=0.2, layer=2)) as session:
        said = answer(vlm, vlm.inputs([sample])).texts[0]
    trace = session.trace
    figure = overlay(sample.image, trace, question=sample.question, answers=("star", said), heat=True)
    first, painted, scores = (axes.images[0].get_array() for axes in figure.axes if axes.images)
    assert "after layer 1: 39 of 196 tokens" in figure.axes[1].get_title()
    slots = trace.visual[0].nonzero().flatten().tolist()
    kept = trace.kept(1)[0]
    for cell, slot in zip(grid(14), slots, strict=True):
        same = (patch(np.asarray(first), cell) == patch(np.asarray(painted), cell)).all()
        assert same == bool(kept[slot])
    assert np.asarray(scores).shape == np.asarray(first).shape
    path = tmp_path / "there" / "kept.png"
    save(figure, path)
    assert Image.open(path).size[0] > 500
    rows = [SheetRow(sample.image, sample.question, "star", [SheetCell("fastv", trace, said)])]
    assert len(sheet(rows * 2, "title").axes) == 4


def made_up(visual, *records, layout=None):
    tokens = torch.ones_like(visual)
    trace = Trace(4, visual, tokens, layout=layout)
    trace.records = [StageRecord(stage, active, None, None) for stage, active in records]
    return trace


def test_unknown_layout_gives_a_plain_grid_and_unchanged_stages_are_left_out():
    visual = torch.zeros(2, 12, dtype=torch.bool)
    visual[:, 1:8] = True
    some = torch.ones_like(visual)
    some[:, 3:6] = False
    trace = made_up(visual, (0, torch.ones_like(visual)), (1, some), (2, some))
    figure = overlay(Image.new("RGB", (40, 20)), trace, row=1)
    assert [axes.get_title() for axes in figure.axes][1:] == ["after layer 1: 4 of 7 tokens"]
    assert "not known" in figure.axes[0].get_title()


class FakeBlock:
    def __init__(self, kind, slots, size, box):
        self.kind, self.slots, self.grid, self.box = kind, torch.tensor(slots), size, box

    def patch_box(self, patch):
        (height, width), (left, top, right, bottom) = self.grid, self.box
        y, x = divmod(patch, width)
        return (
            left + x * (right - left) / width, top + y * (bottom - top) / height,
            left + (x + 1) * (right - left) / width, top + (y + 1) * (bottom - top) / height,
        )  # fmt: skip


class FakeImage:
    def __init__(self, blocks):
        self.blocks, self.known = blocks, True


class FakeLayout:
    def __init__(self, *images):
        self.images = [list(images)]


def test_tiles_make_one_picture_and_frames_one_each():
    base = FakeBlock("base", range(4), (2, 2), (0, 0, 1, 1))
    tiles = [FakeBlock("tile", range(4 + 4 * i, 8 + 4 * i), (2, 2), (i / 2, 0, (i + 1) / 2, 1)) for i in range(2)]
    frames = [FakeBlock("frame", range(12 + 4 * i, 16 + 4 * i), (2, 2), (0, 0, 1, 1)) for i in range(2)]
    layout = FakeLayout(FakeImage([base, *tiles]), FakeImage(frames))
    visual = torch.ones(1, 20, dtype=torch.bool)
    keep = torch.zeros_like(visual)
    keep[0, [5, 9]] = True
    trace = made_up(visual, (-1, keep))
    pictures = [Image.new("RGB", (32, 16), colour) for colour in ("red", "green", "blue")]
    found = canvases(pictures, trace, 0, layout)
    assert [canvas.label for canvas in found] == [
        "image 1, base",
        "image 1, tile",
        "image 2, frame 1",
        "image 2, frame 2",
    ]
    assert [canvas.picture.getpixel((0, 0)) for canvas in found] == [
        (255, 0, 0), (255, 0, 0), (0, 128, 0), (0, 0, 255),
    ]  # fmt: skip
    assert {cell.slot for cell in found[1].cells} == set(range(4, 12))
    assert found[1].cells[-1].box == (0.75, 0.5, 1.0, 1.0)
    assert len(overlay(pictures, trace, layout=layout).axes) == 8


def test_errors(tmp_path):
    visual = torch.ones(1, 4, dtype=torch.bool)
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="no stage"):
        overlay(image, made_up(visual))
    trace = made_up(visual, (0, visual))
    with pytest.raises(ValueError, match="row=3"):
        overlay(image, trace, row=3)
    with pytest.raises(ValueError, match="png"):
        save(overlay(image, trace), tmp_path / "x.bmp")
    with pytest.raises(ValueError, match="equally many"):
        sheet([])
