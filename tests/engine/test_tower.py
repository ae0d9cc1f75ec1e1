"""Merging and shrinking inside vision towers."""

import functools

import pytest
import torch
import transformers as hf
from tests import families
from tests.reference.checks import footprint

import foveate
from foveate.engine.families.parts import resolve
from foveate.engine.vision.merging import TowerReduction
from foveate.ops.bipartite import soft_matching
from foveate.reducers.pitome import PiToMe
from foveate.reducers.pooling import Downsample
from foveate.reducers.tome import ToMe

SIZE = {**families.TOWER, "num_hidden_layers": 4, "image_size": 32, "patch_size": 8}
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@functools.cache
def tower(name: str, impl: str = "sdpa") -> hf.PreTrainedModel:
    made = {
        "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SIZE)),
        "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIZE, vision_use_head=False)),
        "vit": lambda: hf.ViTModel(hf.ViTConfig(**SIZE)),
    }[name]()
    made = families.spread_weights(made)
    made.set_attn_implementation(impl)
    with torch.no_grad():
        made(PIXELS, output_hidden_states=True)
    return made


def lengths(module: hf.PreTrainedModel, reduction: TowerReduction, **options) -> tuple[list[int], object]:
    seen: list[int] = []
    hooks = [
        layer.mlp.fc1.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[1])) for layer in reduction.layers
    ]
    with torch.no_grad():
        output = module(PIXELS, **options)
    for hook in hooks:
        hook.remove()
    return seen, output


@torch.no_grad()
def slow_tome(clip: hf.CLIPVisionModel, r: int, proportional: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """ToMe in CLIP, written out: attention, merge, MLP."""
    x = clip.pre_layrnorm(clip.embeddings(PIXELS))
    size = torch.ones(*x.shape[:2], 1)
    members = torch.eye(x.shape[1]).expand(len(x), -1, -1)
    for layer in clip.encoder.layers:
        attention, normed = layer.self_attn, layer.layer_norm1(x)
        q, k, v = (
            p(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        logits = q @ k.transpose(-1, -2) * attention.scale
        if proportional:
            logits = logits + size.log()[:, None, None, :, 0]
        x = x + attention.out_proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        merging = soft_matching(k.mean(1), r, class_token=True)
        x, size = merging.mean(x, size)
        members = merging.membership().float() @ members
        x = x + layer.mlp(layer.layer_norm2(x))
    return x, members


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_tome_in_clip_is_attention_merge_mlp(impl, proportional):
    clip = tower("clip", impl)
    expected, members = slow_tome(clip, 3, proportional)
    with TowerReduction(clip, ToMe(r=3, proportional=proportional).tower, expand=False) as reduction:
        seen, output = lengths(clip, reduction)
    assert seen == [14, 11, 8, 5]
    assert torch.allclose(output.last_hidden_state, expected, atol=1e-5)
    with TowerReduction(clip, ToMe(r=3, proportional=proportional).tower) as reduction:
        full = clip(PIXELS, output_hidden_states=True)
        assert torch.allclose(full.last_hidden_state, members.transpose(1, 2) @ expected, atol=1e-5)
        assert all(states.shape[1] == 17 for states in full.hidden_states)
        assert torch.equal(reduction.maps[0], members.argmax(1))


@pytest.mark.parametrize("preset", ["clip", "openclip", "deit", "mae", "llava", None])
@pytest.mark.parametrize("name", ["clip", "siglip", "vit"])
def test_pitome_shortens_and_leaves_no_trace(name, preset):
    module = tower(name)
    before, untouched = footprint(module), module(PIXELS).last_hidden_state
    with TowerReduction(module, PiToMe(ratio=0.8, preset=preset).tower) as reduction:
        seen, output = lengths(module, reduction)
    assert seen[-1] < seen[0]
    assert output.last_hidden_state.shape == untouched.shape
    assert not torch.allclose(output.last_hidden_state, untouched, atol=1e-3)
    assert footprint(module) == before
    assert torch.equal(module(PIXELS).last_hidden_state, untouched)


def test_pitome_keeps_as_many_as_the_official_code_in_llava():
    for ratio, left in ((0.975, 330), (0.95, 183), (0.925, 101), (0.9, 54), (0.875, 30), (0.85, 17)):
        assert PiToMe(ratio=ratio, faithful=True).tower.schedule(576, 23, True)[-1] == left
    for keep in (192, 64, 0.5):
        assert PiToMe(keep).tower.schedule(576, 23, True)[-1] == (keep if isinstance(keep, int) else 288)
        assert ToMe(keep, inflect=-0.7).tower.schedule(576, 23, True)[-1] == (keep if isinstance(keep, int) else 288)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_downsample_is_the_tower_on_a_smaller_image(name):
    module = tower(name)
    smaller = torch.nn.functional.interpolate(
        PIXELS, size=(16, 24), mode="bilinear", antialias=True, align_corners=False
    )
    expected = module(smaller, interpolate_pos_encoding=True).last_hidden_state
    with TowerReduction(module, Downsample(6).tower) as reduction:
        seen, output = lengths(module, reduction)
    cls = expected.shape[1] - 6
    assert seen == [6 + cls] * 4
    assert torch.equal(output.last_hidden_state[:, : cls + 1], expected[:, : cls + 1])
    assert torch.equal(output.last_hidden_state[:, -1], expected[:, -1])


@pytest.mark.parametrize("method", [ToMe, PiToMe, Downsample])
@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "paligemma"])
@torch.no_grad()
def test_whole_models(name, method):
    model = families.build(name)
    inputs = families.inputs(name, model, images=[2, 1])
    before = footprint(model)
    reducer, projected = method(0.4), []
    decide = reducer.decide

    def watched(view):
        projected.append(view)
        return decide(view)

    reducer.decide = watched
    with foveate.apply(model, reducer) as session:
        model(**inputs)
    assert footprint(model) == before
    view = projected[0]
    groups = view.tower_groups
    for row in range(2):
        for label in groups[row][groups[row] >= 0].unique():
            states = view.hidden[row, groups[row] == label]
            assert torch.allclose(states, states[:1].expand_as(states), atol=1e-6)
    left = session.trace.visual_tokens[:, 0]
    budget = torch.tensor([sum(round(0.4 * len(i.slots)) for i in images) for images in view.layout.images])
    assert bool((left <= budget).all())
    assert method is Downsample or torch.equal(left, budget)


def test_other_towers_are_refused():
    for name in ("qwen2_vl", "mistral3"):
        anatomy = resolve(families.build(name))
        for reducer in (ToMe(4), PiToMe(4), Downsample(4)):
            with pytest.raises(foveate.UnsupportedError), TowerReduction(anatomy.vision, reducer.tower):
                pass
