"""ToMe and PiToMe in vision encoders on their own: ViT, CLIP, SigLIP, with the schedules of their papers."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import transformers as hf
from tests import families
from tests.reference.checks import footprint
from tests.reference.meters import flops
from torch import Tensor
from torch.nn.functional import elu, normalize

import foveate

SIDE, PATCH, DEPTH = 64, 8, 4
PATCHES = (SIDE // PATCH) ** 2
SIZE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": DEPTH, "num_attention_heads": 4,
    "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50,
    "max_position_embeddings": 8, "eos_token_id": 2,
}  # fmt: skip
PIXELS = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
MODELS = {
    "ViTModel": lambda: hf.ViTModel(hf.ViTConfig(**SIZE)),
    "ViTForImageClassification": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZE, num_labels=5)),
    "CLIPVisionModel": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SIZE)),
    "CLIPVisionModelWithProjection": lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**SIZE)),
    "CLIPModel": lambda: hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=SIZE, projection_dim=16)),
    "SiglipModel": lambda: hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=SIZE)),
}


@functools.cache
def model_of(name: str, impl: str = "sdpa") -> Any:
    model = families.spread_weights(MODELS[name]())
    model.set_attn_implementation(impl)
    answer(model)  # transformers leaves its recorders in a model at the first use
    return model


@torch.no_grad()
def answer(model: Any) -> Tensor:
    """Logits, scores of texts, or the states."""
    texts = {"input_ids": torch.tensor([[1, 7, 2]])} if hasattr(model, "text_model") else {}
    output = model(pixel_values=PIXELS, output_hidden_states=not texts, **texts)
    for name in ("logits", "logits_per_image", "image_embeds", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    raise AssertionError(type(output))


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_every_encoder_is_served_and_given_back(name: str, impl: str):
    model = model_of(name, impl)
    before, full = footprint(model), answer(model)
    cls = int("Siglip" not in name)
    cases = [
        (foveate.PiToMe(ratio=0.8), 28),  # a fifth of what is left goes in each layer, rounded down
        (foveate.ToMe(r=9), PATCHES - 9 * DEPTH),
        (foveate.PiToMe(keep=20), 20),
        (foveate.ToMe(keep=0.25), PATCHES // 4),
    ]
    for reducer, left in cases:
        with foveate.apply(model, reducer) as session:
            short = answer(model)
        assert short.shape == full.shape
        assert not torch.allclose(short, full, atol=1e-3)
        entering, kept = session.trace.entering, session.trace.kept()
        assert session.reducer is reducer
        assert kept.shape == (2, PATCHES + cls)
        assert kept.sum(1).tolist() == [left, left]
        assert not (cls and bool(kept[:, 0].any())), "a class token is no patch"
        assert entering[0] == PATCHES + cls
        assert all(later < earlier for earlier, later in itertools.pairwise(entering))
        assert {len(row.unique()) for row in session.trace.place} == {left + cls}
        assert footprint(model) == before
        assert torch.equal(answer(model), full)
    with foveate.apply(model, foveate.PiToMe(keep=1.0)):
        assert torch.equal(answer(model), full)


# ------------------------------------------------------------------------------------------- the paper, written out
MARGINS = {"deit": (0.75, 0.75), "mae": (0.75, 0.75), "clip": (0.9, 0.9), "openclip": (0.95, 0.95), "blip": (0.9, 0.9),
           "blip2": (0.75, 0.4)}  # fmt: skip
KEYS = ("deit", "mae", "blip2")


def slow_groups(x: Tensor, margin: float, keep: float, most_similar: bool) -> list[list[int]]:
    """PiToMe's groups of the tokens (T, C) behind the class token; numbers count from 1."""
    units = normalize(x[1:], dim=-1)
    similarity = units @ units.T
    energy = elu(similarity - margin).mean(1).tolist()
    rank = sorted(range(len(energy)), key=lambda i: -energy[i])
    r = int(len(rank) - len(rank) * keep)
    a, b = (rank[::2], rank[1::2]) if most_similar else (rank[: 2 * r : 2], rank[1 : 2 * r : 2])
    nearest = {i: max(b, key=lambda j: similarity[i, j].item()) for i in a}
    if most_similar:
        a = sorted(a, key=lambda i: -similarity[i, nearest[i]].item())[:r]
    groups = {i: [i] for i in rank if i not in a}
    for i in a:
        groups[nearest[i]].append(i)
    return [[0], *([i + 1 for i in group] for group in groups.values())]


@torch.no_grad()
def slow_pitome(vit: Any, pixels: Tensor, preset: str, keep: float) -> Tensor:
    """PiToMe in a ViT, image by image and group by group: the class token's state."""
    start, slope = MARGINS[preset]
    found = []
    for picture in pixels:
        x = vit.embeddings(picture[None])[0]
        sizes = [1.0] * len(x)
        for number, layer in enumerate(vit.layers):
            attention, normed = layer.attention, layer.layernorm_before(x)
            q, k, v = (
                p(normed).unflatten(-1, (attention.num_attention_heads, -1)).transpose(0, 1)
                for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            weights = (q @ k.transpose(-1, -2) * attention.head_dim**-0.5).softmax(-1)
            x = x + attention.o_proj((weights @ v).transpose(0, 1).flatten(1))
            if preset == "clip":  # merges behind the whole layer
                x = x + layer.mlp(layer.layernorm_after(x))
            metric = k.mean(0) if preset in KEYS else x
            early = number < DEPTH / 2
            by_similarity = early if preset == "deit" else not early if preset == "mae" else False
            if not (preset == "blip" and number == DEPTH - 1):
                groups = slow_groups(metric, start - slope * number / DEPTH, keep, by_similarity)
                x = torch.stack([sum(sizes[i] * x[i] for i in g) / sum(sizes[i] for i in g) for g in groups])
                sizes = [sum(sizes[i] for i in g) for g in groups]
            if preset != "clip":
                x = x + layer.mlp(layer.layernorm_after(x))
        found.append(vit.layernorm(x)[0])
    return torch.stack(found)


@pytest.mark.parametrize("preset", MARGINS)
def test_the_papers_schedules_in_a_vit(preset: str):
    model = model_of("ViTModel")
    with foveate.apply(model, foveate.PiToMe(ratio=0.8, preset=preset)) as session, torch.no_grad():
        states = model(PIXELS[:2]).last_hidden_state
    torch.testing.assert_close(states[:, 0], slow_pitome(model, PIXELS[:2], preset, 0.8), atol=2e-5, rtol=1e-4)
    counts = [PATCHES]
    for layer in range(DEPTH):
        spared = preset == "blip" and layer == DEPTH - 1
        counts.append(counts[-1] if spared else counts[-1] - int(counts[-1] - counts[-1] * 0.8))
    assert session.trace.entering == [n + 1 for n in counts[:-1]]
    assert len(session.trace.place[0].unique()) == counts[-1] + 1


# ---------------------------------------------------------------------------------------------------------- the cost
@pytest.mark.parametrize("name", ["ViTModel", "CLIPVisionModel"])
def test_operations_are_those_of_the_tokens_left(name: str):
    """Counted by torch; eager attention, whose products torch can count."""
    model = model_of(name, "eager")
    cls, width, inner = 1, SIZE["hidden_size"], SIZE["intermediate_size"]

    def layer(entering: int, leaving: int, between: bool) -> float:
        mlp = leaving if between else entering
        return 2 * (4 * entering * width**2 + 2 * entering**2 * width + 2 * mlp * width * inner)

    def run() -> None:
        model(PIXELS[:1])

    full = flops(run)
    assert full >= DEPTH * layer(PATCHES + cls, PATCHES + cls, True)
    for reducer, between in ((foveate.ToMe(keep=8), True), (foveate.PiToMe(keep=8, preset="clip"), False)):
        with foveate.apply(model, reducer) as session:
            used = flops(run)
        counts = [*session.trace.entering, len(session.trace.place[0].unique())]
        whole = layer(PATCHES + cls, PATCHES + cls, True)
        saved = sum(whole - layer(n, m, between) for n, m in itertools.pairwise(counts))
        comparing = sum(2 * n * n * width for n in counts)  # tokens with each other, at most
        assert full - saved <= used <= full - saved + comparing
        assert used < 0.8 * full


# ------------------------------------------------------------------------------------------------------- what is not
def test_refusals():
    model = model_of("ViTModel")
    before = footprint(model)
    for reducer in (foveate.DivPrune(8), foveate.PiToMe(8, where="output"), foveate.FastV(8)):
        with pytest.raises(foveate.UnsupportedError, match=r"ViTModel has no language model.*PiToMe"):
            foveate.apply(model, reducer)
    with foveate.apply(model, foveate.ToMe(8)), pytest.raises(foveate.UnsupportedError, match="already"):
        foveate.apply(model, foveate.ToMe(8))
    deit = hf.DeiTModel(hf.DeiTConfig(**SIZE))
    with pytest.raises(foveate.UnsupportedError, match="distillation token"):
        foveate.apply(deit, foveate.ToMe(8))
    dino = hf.Dinov2Model(hf.Dinov2Config(**SIZE))
    with pytest.raises(foveate.UnsupportedError, match="CLIP, SigLIP or ViT"):
        foveate.apply(dino, foveate.ToMe(8))
    assert footprint(model) == before


def test_downsample_too():
    model = model_of("CLIPVisionModel")
    with foveate.apply(model, foveate.Downsample(16)) as session, torch.no_grad():
        states = model(PIXELS).last_hidden_state
    assert states.shape == (2, PATCHES + 1, 32)
    assert len(session.trace.place[0].unique()) == 17
