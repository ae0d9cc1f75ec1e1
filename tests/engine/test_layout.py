"""Which slot is which patch: the tiny families against what their own feature code does, and hand-made prompts."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from tests import families

import foveate
from foveate.engine.families.parts import resolve
from foveate.engine.layout import Layout, build_layout


@functools.cache
def model_of(name):
    return families.build(name)


def layout_of(name, **options) -> tuple[Layout, dict, torch.Tensor]:
    model = model_of(name)
    # Idefics 3 hands its features over per row; its images are as long as LLaVA's here, and nothing else is needed.
    source = "llava" if name in ("idefics3", "smolvlm") else name
    inputs = families.inputs(source, model_of(source), **options)
    visual = families.visual_slots(inputs["input_ids"])
    return build_layout(resolve(model), visual, inputs), inputs, visual


def toy(model_type, **config) -> SimpleNamespace:
    """An anatomy that has a config and nothing else."""
    return SimpleNamespace(
        base=object(),
        config=SimpleNamespace(model_type=model_type, **config),
        vision_config=config.get("vision_config"),
        video_token_id=config.get("video_token_id"),
        resampler=None,
    )


def tower(**config) -> SimpleNamespace:
    return SimpleNamespace(**{"image_size": 32, "patch_size": 8, **config})


def check_partition(layout: Layout, visual: torch.Tensor) -> None:
    """Every visual slot is in exactly one image and is a patch or a newline slot; the numbers agree."""
    for row, images in enumerate(layout.images):
        slots = [slot for image in images for slot in image.slots.tolist()]
        assert sorted(slots) == visual[row].nonzero().flatten().tolist()
        assert layout.image_counts[row] == len(images)
        for number, image in enumerate(images):
            assert image.row == row
            parts = torch.cat([*(block.slots for block in image.blocks), image.newline])
            assert sorted(parts.tolist()) == image.slots.tolist()
            assert (layout.image_index[row, image.slots] == number).all()
            assert all(len(block.slots) == block.grid[0] * block.grid[1] for block in image.blocks)
    assert torch.equal(layout.image_index >= 0, visual)


# -------------------------------------------------------------------------------------------- every family, as it is
@pytest.mark.parametrize("name", families.FAMILIES)
@pytest.mark.parametrize("images", [1, [2, 1]])
def test_every_family_is_known_and_complete(name, images):
    layout, _, visual = layout_of(name, images=images)
    check_partition(layout, visual)
    assert layout.known
    assert layout.image_counts.tolist() == ([1, 1] if images == 1 else images)


@pytest.mark.parametrize(
    ("name", "grid"),
    [("llava", (4, 4)), ("vipllava", (4, 4)), ("gemma3", (4, 4)), ("paligemma", (4, 4)), ("internvl", (4, 4)),
     ("idefics3", (4, 4)), ("smolvlm", (4, 4)), ("aya_vision", (4, 4)), ("mistral3", (4, 4))],
)  # fmt: skip
def test_one_square_block(name, grid):
    layout, _, visual = layout_of(name)
    for row, (image,) in enumerate(layout.images):
        (block,) = image.blocks
        assert (block.kind, block.grid, block.box) == ("base", grid, (0.0, 0.0, 1.0, 1.0))
        assert block.slots.tolist() == visual[row].nonzero().flatten().tolist()
        assert len(image.newline) == 0


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_grids_give_the_shape(name):
    layout, inputs, _ = layout_of(name)
    grids = [image.blocks[0].grid for images in layout.images for image in images]
    assert grids == [(h // 2, w // 2) for _, h, w in inputs["image_grid_thw"].tolist()]


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("images", [1, [2, 1]])
def test_anyres_newlines_are_where_the_model_puts_them(name, images):
    """The slots said to be newlines carry the model's own newline embedding, and no other slot does."""
    layout, inputs, visual = layout_of(name, images=images)
    model = model_of(name)
    arguments = {k: inputs[k] for k in ("pixel_values", "image_sizes", "batch_num_images") if k in inputs}
    with torch.no_grad():
        features = torch.cat(model.base_model.get_image_features(**arguments, return_dict=True).pooler_output)
    is_newline = (features == model.base_model.image_newline).all(-1)
    expected = torch.zeros_like(visual)
    expected[visual] = is_newline
    found = torch.zeros_like(visual)
    for row, row_images in enumerate(layout.images):
        for image in row_images:
            found[row, image.newline] = True
    assert torch.equal(found, expected)
    assert int(found.sum()) > 0


def test_anyres_patches_lie_where_the_model_looks():
    """A bright spot in one tile lights up the patch of the mosaic that the layout puts there."""
    name = "llava_next"
    model = model_of(name)
    inputs = families.inputs(name, model, batch=1)
    inputs["image_sizes"] = torch.tensor([[64, 64]])
    pixels = torch.zeros(1, 5, 3, 32, 32)
    with torch.no_grad():
        dark = model.base_model.get_image_features(pixels, inputs["image_sizes"], return_dict=True).pooler_output[0]
        pixels[0, 4, :, 8:16, 24:32] = 3.0  # lower right tile, patch row 1, last column
        lit = model.base_model.get_image_features(pixels, inputs["image_sizes"], return_dict=True).pooler_output[0]
    brightest = int((lit - dark).norm(dim=-1).argmax())
    visual = torch.ones(1, len(lit), dtype=torch.bool)
    ((image,),) = build_layout(resolve(model), visual, {"image_sizes": inputs["image_sizes"]}).images
    _, mosaic = image.blocks
    assert mosaic.grid == (8, 8)
    patch = mosaic.slots.tolist().index(brightest)
    assert divmod(patch, 8) == (4 + 1, 7)
    assert mosaic.patch_box(patch) == (7 / 8, 5 / 8, 1.0, 6 / 8)


def test_onevision_image_of_several_is_left_whole():
    layout, _, _ = layout_of("llava_onevision", images=[2, 1])
    (first, second), (alone,) = layout.images
    assert [len(first.blocks), len(second.blocks), len(alone.blocks)] == [1, 1, 2]
    assert len(first.newline) == 1


# ----------------------------------------------------------------------------------------------- hand-made prompts
def test_video_frames_of_qwen_and_images_in_one_prompt():
    ids = torch.tensor([[1, 2, 9, 9, 9, 9, 3, 8, 8, 4, 8, 8, 5]])
    anatomy = toy("qwen3_vl", video_token_id=8, vision_config=tower(spatial_merge_size=2))
    info = {"input_ids": ids, "image_grid_thw": torch.tensor([[1, 4, 4]]), "video_grid_thw": torch.tensor([[2, 2, 4]])}
    layout = build_layout(anatomy, (ids == 8) | (ids == 9), info)
    check_partition(layout, (ids == 8) | (ids == 9))
    image, video = layout.images[0]
    assert [b.kind for b in image.blocks] == ["base"]
    assert [b.kind for b in video.blocks] == ["frame", "frame"]
    assert [b.slots.tolist() for b in video.blocks] == [[7, 8], [10, 11]]
    assert layout.known


def test_glm_video_uses_the_image_token():
    ids = torch.tensor([[1, 9, 9, 2, 9, 9, 3]])
    types = torch.tensor([[0, 1, 1, 0, 2, 2, 0]])
    anatomy = toy("glm4v", video_token_id=8, vision_config=tower(spatial_merge_size=2))
    info = {"input_ids": ids, "mm_token_type_ids": types, "image_grid_thw": torch.tensor([[1, 2, 4]]),
            "video_grid_thw": torch.tensor([[2, 2, 2]])}  # fmt: skip
    image, video = build_layout(anatomy, ids == 9, info).images[0]
    assert [b.kind for b in image.blocks + video.blocks] == ["base", "frame", "frame"]


def test_onevision_video_ends_with_a_newline():
    ids = torch.tensor([[1] + [families.VIDEO_TOKEN] * (3 * 4 + 1) + [2]])
    anatomy = resolve(model_of("llava_onevision"))
    ((video,),) = build_layout(anatomy, ids == families.VIDEO_TOKEN, {"input_ids": ids}).images
    assert [b.grid for b in video.blocks] == [(2, 2)] * 3
    assert video.newline.tolist() == [13]
    assert video.known


def test_smolvlm_rows_of_tiles_then_global_image():
    fake, tag, line, image, word = 90, 91, 92, 99, 5
    tile = [image] * 4
    split = []
    for _ in range(2):
        for _ in range(3):
            split += [fake, tag, *tile]
        split += [line]
    split = [*split[:-1], line, line, fake, tag, *tile, fake]  # the row's own line break, and one more
    single = [fake, tag, *tile, fake]
    rows = [[*single, word, *split, word], [*split, *split]]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    anatomy = toy("smolvlm", vision_config=tower(), scale_factor=2)
    layout = build_layout(anatomy, ids == image, {"input_ids": ids})
    check_partition(layout, ids == image)
    assert layout.known
    assert [len(i.blocks) for i in layout.images[0]] == [1, 7]
    assert [len(i.blocks) for i in layout.images[1]] == [7, 7]
    blocks = layout.images[0][1].blocks
    assert [b.kind for b in blocks] == ["tile"] * 6 + ["thumbnail"]
    assert blocks[4].box == pytest.approx((1 / 3, 1 / 2, 2 / 3, 1.0))
    assert blocks[4].patch_box(3) == pytest.approx((1 / 2, 3 / 4, 2 / 3, 1.0))


def picture_in_tiles(rows, columns, side=64) -> torch.Tensor:
    """(rows * columns + 1, 3, side, side): a picture, cut up, and its thumbnail last."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, rows * side), torch.linspace(-1, 1, columns * side), indexing="ij")
    picture = torch.stack([x, y, torch.sin(5 * x) * y])
    tiles = picture.reshape(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).reshape(-1, 3, side, side)
    thumbnail = torch.nn.functional.interpolate(picture[None], (side, side), mode="bilinear", antialias=True)
    return torch.cat([tiles, thumbnail])


@pytest.mark.parametrize("count", [2, 4])
def test_tiles_that_may_lie_either_way_are_not_placed(count):
    """Of one colour, they fit the thumbnail as a row and as a column."""
    ids = torch.tensor([[1, *[9] * (4 * (count + 1)), 8]])
    anatomy = toy("internvl", vision_config=tower(), image_seq_length=4)
    layout = build_layout(anatomy, ids == 9, {"input_ids": ids, "pixel_values": torch.ones(count + 1, 3, 64, 64)})
    (image,) = layout.images[0]
    assert layout.known
    assert [block.kind for block in image.blocks] == ["tile"] * count + ["thumbnail"]
    assert [block.box for block in image.blocks[:-1]] == [None] * count


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (2, 1), (2, 3), (3, 2), (2, 2), (1, 4), (4, 3)])
@pytest.mark.parametrize("family", ["internvl", "aya_vision"])
def test_how_tiles_lie_is_read_from_the_pixels(family, rows, columns):
    count, mark = rows * columns + 1, [7] if family == "aya_vision" else []
    ids = torch.tensor([[1, 6] + (mark + [9] * 4) * count + [8, 6] + mark + [9] * 4 + [8]])
    anatomy = toy(family, vision_config=tower(), image_seq_length=4, downsample_factor=2)
    pixels = torch.cat([picture_in_tiles(rows, columns), torch.randn(1, 3, 64, 64)])
    layout = build_layout(anatomy, ids == 9, {"input_ids": ids, "pixel_values": pixels})
    image, single = layout.images[0]
    assert layout.known
    assert [b.kind for b in image.blocks] == ["tile"] * (count - 1) + ["thumbnail"]
    assert image.blocks[-2].box == pytest.approx((1 - 1 / columns, 1 - 1 / rows, 1.0, 1.0))
    assert image.blocks[-1].box == (0.0, 0.0, 1.0, 1.0)
    assert [b.kind for b in single.blocks] == ["base"]
    # Nothing else says how they lie, so without pixels the place is unknown and not made up.
    unplaced = build_layout(anatomy, ids == 9, {"input_ids": ids}).images[0][0]
    assert [b.box for b in unplaced.blocks[:-1]] == [None] * (count - 1)
    # Beam search repeats the rows, not the images.
    twice = build_layout(anatomy, (ids == 9).repeat(2, 1), {"pixel_values": pixels})
    assert [[b.box for b in i.blocks] for i in twice.images[1]] == [[b.box for b in i.blocks] for i in layout.images[0]]


def test_mistral_rows_are_separated_by_break_tokens():
    height, width = 2, 3
    row = ([9] * width + [7]) * height
    ids = torch.tensor([[1, *row[:-1], 8, *row[:-1], 8, 2]])
    anatomy = toy("mistral3", vision_config=tower(model_type="pixtral"), spatial_merge_size=2)
    sizes = torch.tensor([[height * 16, width * 16]] * 2)
    layout = build_layout(anatomy, ids == 9, {"input_ids": ids, "image_sizes": sizes})
    check_partition(layout, ids == 9)
    assert layout.image_counts.tolist() == [2]
    assert [b.grid for image in layout.images[0] for b in image.blocks] == [(2, 3), (2, 3)]


def test_return_sequences_repeat_the_rows():
    name = "qwen2_vl"
    inputs = families.inputs(name, model_of(name))
    visual = families.visual_slots(inputs["input_ids"])
    twice = {k: v.repeat_interleave(2, 0) if k == "input_ids" else v for k, v in inputs.items()}
    layout = build_layout(resolve(model_of(name)), visual.repeat_interleave(2, 0), twice)
    check_partition(layout, visual.repeat_interleave(2, 0))
    assert layout.known
    assert [images[0].blocks[0].grid for images in layout.images] == [(4, 3), (4, 3), (3, 5), (3, 5)]


# ------------------------------------------------------------------------------------------------------ odd inputs
def test_unknown_family_gets_runs():
    visual = torch.tensor([[0] + [1] * 12 + [0] + [1] * 7, [0] * 20 + [1]]).bool()
    layout = build_layout(toy("something_new"), visual, {})
    check_partition(layout, visual)
    assert not layout.known
    assert [image.blocks[0].grid for image in layout.images[0]] == [(3, 4), (1, 7)]
    assert layout.image_counts.tolist() == [2, 1]


def test_rows_without_images_and_empty_batches():
    visual = torch.zeros(2, 5, dtype=torch.bool)
    layout = build_layout(toy("llava", vision_config=tower()), visual, {})
    assert layout.image_counts.tolist() == [0, 0]
    assert (layout.image_index == -1).all()
    assert build_layout(toy("x"), torch.zeros(0, 5, dtype=torch.bool), {}).image_counts.tolist() == []


@pytest.mark.parametrize(
    "info",
    [
        {"image_grid_thw": torch.tensor([[1, 4, 8]])},
        {"image_grid_thw": torch.zeros(0, 3, dtype=torch.long)},
        {"image_grid_thw": "nonsense"},
        {"image_sizes": torch.tensor([[0, 0]])},
        {"input_ids": torch.zeros(3, 2, dtype=torch.long), "image_features": [torch.zeros(3, 2)]},
        {"pixel_values": torch.zeros(2, 2), "mm_token_type_ids": 3, "batch_num_images": torch.tensor([1, 1])},
    ],
)
@pytest.mark.parametrize("name", families.FAMILIES)
def test_odd_inputs_never_raise(name, info):
    visual = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 0, 1]]).bool()
    layout = build_layout(resolve(model_of(name)), visual, info)
    check_partition(layout, visual)
    assert layout.image_counts.tolist() == [3]
    assert not layout.known


def test_nothing_is_worked_out_before_it_is_asked_for():
    layout = build_layout(toy("llava", vision_config=tower()), torch.ones(1, 16, dtype=torch.bool), {})
    assert "images" not in layout.__dict__
    assert layout.image_counts.tolist() == [1]
    assert "image_index" not in layout.__dict__


@pytest.mark.parametrize("name", families.FAMILIES)
def test_layout_inside_a_session_with_beams(name):
    """What the engine knows while `generate` runs is enough, also when each row is repeated."""
    model = model_of(name)
    inputs = families.inputs(name, model)
    with foveate.apply(model, foveate.Random(keep=5)) as session, torch.no_grad():
        model.generate(**inputs, max_new_tokens=2, num_beams=2, do_sample=False)
    layout = session.trace.layout
    check_partition(layout, families.visual_slots(inputs["input_ids"]).repeat_interleave(2, 0))
    assert layout.known
    assert layout.image_counts.tolist() == [1] * 4
    alone = build_layout(resolve(model), families.visual_slots(inputs["input_ids"]), inputs)
    grids = [[block.grid for block in images[0].blocks] for images in alone.images]
    assert [[block.grid for block in images[0].blocks] for images in layout.images] == [grids[0]] * 2 + [grids[1]] * 2
