"""What is read in the vision tower lies at the slots where its patches went."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests.families import FAMILIES, IMAGE_TOKEN, build, inputs
from tests.reference.checks import build_once
from transformers import image_utils

import foveate
from foveate.engine.families.parts import resolve
from foveate.engine.families.pixels import normalisation
from foveate.reduction import View, VisionSpec

SPEC = VisionSpec(features=True, key=True, query=True)


class Look(foveate.Reducer):
    """Removes nothing, keeps the view."""

    stages = (-1,)

    def __init__(self, layer: int = -1):
        self.vision_taps = {layer: SPEC}
        self.views: list[View] = []

    def decide(self, view: View) -> None:
        self.views.append(view)


def look(model, kwargs, layer: int = -1) -> View:
    reducer = Look(layer)
    with torch.no_grad(), foveate.apply(model, reducer):
        model(**kwargs)
    return reducer.views[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_lie_at_their_slots(family: str) -> None:
    """Change a patch of the picture: features and visual tokens change most at one and the same slot."""
    model = build(family)
    kwargs = inputs(family, model, batch=2)
    layer = resolve(model).vision_layer
    before = look(model, kwargs, layer)
    patches = before.vision[layer]
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        pixels = kwargs["pixel_values"].clone()
        if pixels.dim() == 2:  # a stream of patches; one visual token is made of several neighbours
            group = 4 * int(torch.randint(len(pixels) // 4, (1,), generator=generator))
            pixels[group : group + 4] += 3 * torch.randn(pixels[:4].shape, generator=generator)
        else:
            side, step = pixels.shape[-1], 16
            y, x = (int(torch.randint(side // step, (1,), generator=generator)) * step for _ in range(2))
            tile = pixels[0] if pixels.dim() == 4 else pixels[0, seed % min(3, pixels.shape[1])]
            tile[..., y : y + step, x : x + step] += 3 * torch.randn(step, step, generator=generator)
        after = look(model, {**kwargs, "pixel_values": pixels}, layer)
        moved = (after.vision[layer].features - patches.features).norm(dim=-1)
        moved = patches.to_slots(moved, *before.visual.shape)
        arrived = (after.hidden - before.hidden).norm(dim=-1).masked_fill(moved == 0, 0)
        top_moved, top_arrived = moved.flatten().topk(2).indices, arrived.flatten().topk(2).indices
        assert set(top_moved.tolist()) & set(top_arrived.tolist()), f"seed {seed}"


@pytest.mark.parametrize("images", [1, [2, 1]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_patch_has_one_slot(family: str, images: int | list[int]) -> None:
    model = build_once(family)
    view = look(model, inputs(family, model, images=images))
    patches = view.vision[-1]
    flat = (patches.rows[:, None] * view.visual.shape[1] + patches.slots)[patches.valid]
    assert len(flat) == len(flat.unique())
    assert bool(view.visual.flatten()[flat].all())
    newlines = 0 if view.layout is None else sum(len(i.newline) for row in view.layout.images for i in row)
    assert len(flat) + newlines == int(view.visual.sum())


@torch.no_grad()
def test_tiles_and_thumbnail_share_the_budget_of_their_image() -> None:
    """InternVL: two tiles and the thumbnail of one image, then an image of one tile; pixel shuffle in each."""
    model = build_once("internvl")
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 7, *[IMAGE_TOKEN] * 48, 8, 9, *[IMAGE_TOKEN] * 16, 10, 11]])
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    view = look(model, kwargs)
    patches = view.vision[-1]
    assert patches.slots.tolist() == [list(range(start, start + 16)) for start in (2, 18, 34, 52)]
    assert patches.grid.tolist() == [[4, 4]] * 4
    assert view.images.tolist() == [2]
    for tile in range(4):  # each tile's features are those of its own pixels
        lone = {**kwargs, "pixel_values": pixels.roll(-tile, 0)}
        torch.testing.assert_close(look(model, lone).vision[-1].attention[0], patches.attention[tile])
    with foveate.apply(model, foveate.FoPru(keep=12)) as session:
        model(**kwargs)
    kept = session.trace.kept(-1)[0]
    assert [int(kept[a:b].sum()) for a, b in ((2, 18), (18, 34), (34, 50), (52, 68))] == [4, 4, 4, 12]


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "vipllava"])
def test_cls_row_equals_eager_attention(family: str) -> None:
    model = build(family, impl="eager")
    for module in resolve(model).vision_attention():  # another scaling than d^-0.5
        setattr(module, "scaling" if hasattr(module, "scaling") else "scale", 0.9)
    kwargs = inputs(family, model, batch=2)
    seen = []
    tower = model.base_model.vision_tower
    hook = tower.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(**kwargs, output_attentions=True)
        hook.remove()
    if not seen or getattr(seen[-1], "attentions", None) is None:
        with torch.no_grad():
            hook = tower.register_forward_pre_hook(lambda module, args, kw: seen.append((args, kw)), with_kwargs=True)
            model(**kwargs)
            hook.remove()
            args, kw = seen[-1]
            seen.append(tower(*args, **{**kw, "output_attentions": True}))
    expected = seen[-1].attentions[-1][:, :, 0, 1:]
    patches = look(model, kwargs).vision[-1]
    if expected.shape == patches.attention.shape:
        torch.testing.assert_close(patches.attention, expected, atol=1e-5, rtol=1e-4)
    else:  # pixel shuffle: a token is the mean of its 2 x 2 patches
        side = int(expected.shape[-1] ** 0.5)
        pooled = expected.view(*expected.shape[:2], side // 2, 2, side // 2, 2).mean((3, 5)).flatten(2)
        torch.testing.assert_close(patches.attention, pooled, atol=1e-5, rtol=1e-4)


def test_pixels_are_normalised_as_processors_do() -> None:
    for kind, mean, deviation in (
        ("clip_vision_model", image_utils.OPENAI_CLIP_MEAN, image_utils.OPENAI_CLIP_STD),
        ("siglip_vision_model", image_utils.IMAGENET_STANDARD_MEAN, image_utils.IMAGENET_STANDARD_STD),
        ("internvl_vision", image_utils.IMAGENET_DEFAULT_MEAN, image_utils.IMAGENET_DEFAULT_STD),
    ):
        assert normalisation(SimpleNamespace(model_type=kind)) == (tuple(mean), tuple(deviation))


def test_beams_see_their_own_image() -> None:
    model = build("llava")
    kwargs = inputs("llava", model, batch=2)
    single = look(model, kwargs).vision[-1]
    reducer = Look()
    with torch.no_grad(), foveate.apply(model, reducer):
        model.generate(**kwargs, max_new_tokens=1, num_beams=3, do_sample=False, pad_token_id=0)
    beams = reducer.views[-1].vision[-1]
    for row in range(6):
        blocks = beams.rows == row
        assert int(blocks.sum()) == 1
        torch.testing.assert_close(beams.attention[blocks], single.attention[row // 3][None])


def test_a_cls_row_is_refused_where_there_is_no_cls_token() -> None:
    reducer, model = Look(), build("paligemma")
    reducer.vision_taps = {-1: VisionSpec(attention="cls")}
    with pytest.raises(foveate.UnsupportedError, match="no CLS token"):
        foveate.apply(model, reducer)
    assert not model.base_model.language_model.layers[0]._forward_hooks


def test_the_projector_is_offered_only_where_it_is_right() -> None:
    model = build("llava")
    kwargs = inputs("llava", model, batch=2)
    view = look(model, kwargs, layer=-2)
    patches = view.vision[-2]
    assert view.project is not None
    projected = view.project(patches.features)
    for block, row in enumerate(patches.rows.tolist()):
        torch.testing.assert_close(projected[block], view.hidden[row, patches.slots[block]], atol=1e-5, rtol=1e-4)
    assert look(model, kwargs).project is None  # layer -1 is not what LLaVA projects
