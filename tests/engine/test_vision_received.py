"""Attention received where a tower has no CLS token: against whole maps, in variable-length calls, and its memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.families import inputs
from tests.reference.checks import build_once
from tests.reference.meters import peak_memory
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import foveate
from foveate.engine.families.parts import resolve
from foveate.ops.attention import attention_received
from foveate.reduction import Patches, View, VisionSpec

CASES = [
    ("paligemma", -1), ("gemma3", -1), ("idefics3", -2), ("smolvlm", -1), ("qwen2_vl", 1), ("qwen2_5_vl", 0),
    ("qwen2_5_vl", 1), ("qwen3_vl", -1), ("glm4v", -1), ("mistral3", -1),
]  # fmt: skip
"""Family and layer; of Qwen2.5-VL one with windows and one without."""


class Look(foveate.Reducer):
    """Removes nothing, keeps what was read."""

    stages = (-1,)

    def __init__(self, layer: int):
        self.vision_taps = {layer: VisionSpec("received", key=True)}

    def decide(self, view: View) -> None:
        (self.patches,) = view.vision.values()


@torch.no_grad()
def read(model: Any, prompt: dict[str, Tensor], layer: int) -> Patches:
    with foveate.apply(model, Look(layer)) as session:
        model(**prompt)
    return session.reducer.patches


@contextmanager
def whole_maps(module: nn.Module) -> Iterator[list[Tensor]]:
    """The (B, H, N, N) maps of one module, as its own eager code makes them."""
    file: Any = sys.modules[type(module).__module__]
    real, maps = file.eager_attention_forward, []

    def recorded(asked: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        output = real(asked, *args, **kwargs)
        if asked is module:
            maps.append(output[1])
        return output

    file.eager_attention_forward = recorded
    try:
        yield maps
    finally:
        file.eager_attention_forward = real


@contextmanager
def scaled(*modules: nn.Module) -> Iterator[None]:
    """Attention with another scaling than d^-0.5, for a while."""
    names = ["scaling" if hasattr(module, "scaling") else "scale" for module in modules]
    before = [getattr(module, name) for module, name in zip(modules, names)]
    for module, name, value in zip(modules, names, before):
        setattr(module, name, 2.5 * value)
    yield
    for module, name, value in zip(modules, names, before):
        setattr(module, name, value)


def squares(received: Tensor, height: int, width: int, step: int) -> Tensor:
    """(H, height * width) -> (H, tokens), means over step x step patches, cell by cell."""
    cells = [
        [y * width + x for y in range(top, top + step) for x in range(left, left + step)]
        for top in range(0, height, step)
        for left in range(0, width, step)
    ]
    return torch.stack([received[:, cell].mean(1) for cell in cells], 1)


def unwindowed(height: int, width: int, side: int) -> list[int]:
    """Of height x width tokens: where each is in a stream that goes window by window."""
    stream = [
        y * width + x
        for top in range(0, height, side)
        for left in range(0, width, side)
        for y in range(top, min(top + side, height))
        for x in range(left, min(left + side, width))
    ]
    return [stream.index(token) for token in range(height * width)]


def expected(name: str, model: Any, prompt: dict[str, Tensor], maps: list[Tensor], tokens: int) -> list[Tensor]:
    """(H, tokens) of each block."""
    seen = [m.sum(2) / (m > 0).sum(2).clamp_min(1) for m in maps]  # a mean over the queries that may see it
    tower = resolve(model).vision_config
    if "image_grid_thw" in prompt:
        merge = tower.spatial_merge_size
        stream = torch.cat(seen, 2)[0].unflatten(1, (-1, merge * merge)).mean(2)
        blocks, start = [], 0
        for _, h, w in prompt["image_grid_thw"].tolist():
            block = stream[:, start : start + h * w // merge**2]
            start += block.shape[1]
            if name == "qwen2_5_vl":
                block = block[:, unwindowed(h // merge, w // merge, tower.window_size // merge // tower.patch_size)]
            blocks.append(block)
        return blocks
    if name == "mistral3":
        sizes = [(h // tower.patch_size, w // tower.patch_size) for h, w in prompt["image_sizes"].tolist()]
        parts = seen[0][0].split([h * w for h, w in sizes], 1)
        return [squares(part, h, w, model.config.spatial_merge_size) for part, (h, w) in zip(parts, sizes)]
    images = torch.cat(seen)
    side = round(images.shape[2] ** 0.5)
    return [squares(image, side, side, round((images.shape[2] // tokens) ** 0.5)) for image in images]


@torch.no_grad()
@pytest.mark.parametrize(("name", "layer"), CASES)
def test_it_is_the_column_mean_of_the_whole_map(name: str, layer: int):
    eager, sdpa = build_once(name, "eager"), build_once(name)
    prompt = inputs(name, eager)
    module = resolve(eager).vision_attention()[layer]
    with scaled(module, resolve(sdpa).vision_attention()[layer]):
        with whole_maps(module) as maps:
            found = read(eager, prompt, layer)
        other = read(sdpa, prompt, layer)
    wanted = expected(name, eager, prompt, maps, int(found.valid.sum(1).max()))
    assert len(wanted) == len(found.rows)
    assert max(m.shape[-1] for m in maps) > found.valid.sum(1).max() or name in ("paligemma", "qwen2_5_vl")
    for block, values in enumerate(wanted):
        own = found.attention[block, :, found.valid[block]]
        torch.testing.assert_close(own, values, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(other.attention, found.attention, atol=1e-6, rtol=1e-4)
    assert torch.equal(other.slots, found.slots)


# ------------------------------------------------------------------------------------------- variable-length layouts
VARIABLE = "pretended_variable_length_flash_attention_2"


def _variable_length(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """All images, or windows, end to end in one row, as FlashAttention is handed them."""
    lengths = kwargs["cu_seq_lens_q"].diff().tolist()
    assert len(query) == 1
    assert sum(lengths) == query.shape[2]
    parts = zip(*(t.split(lengths, 2) for t in (query, key, value)))
    done = [(q @ k.transpose(-1, -2) * scaling).softmax(-1) @ v for q, k, v in parts]
    return torch.cat(done, 2).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(VARIABLE, _variable_length)


@torch.no_grad()
@pytest.mark.parametrize(("name", "layer"), [("qwen2_vl", 1), ("qwen2_5_vl", 0), ("qwen2_5_vl", 1), ("glm4v", -1)])
def test_variable_length_calls(name: str, layer: int):
    model = build_once(name)
    prompt = inputs(name, model, batch=3)
    config = resolve(model).vision.config
    real = config._attn_implementation
    with scaled(resolve(model).vision_attention()[layer]):
        wanted = read(model, prompt, layer)
        config._attn_implementation = VARIABLE
        try:
            found = read(model, prompt, layer)
        finally:
            config._attn_implementation = real
    torch.testing.assert_close(found.attention, wanted.attention, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.key, wanted.key, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.slots, wanted.slots)


# ---------------------------------------------------------------------------------------------------------- in blocks
def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [None, 5])
@pytest.mark.parametrize("kind", ["none", "bool", "added"])
def test_blocks_and_masks(kind: str, block: int | None):
    query, key = draw(2, 3, 13, 4, seed=0), draw(2, 3, 13, 4, seed=1)
    seen = draw(2, 1, 13, 13, seed=2) > -1
    seen[1, :, :, 7] = False  # nobody may look there
    seen[0, :, 4] = False  # and this one may look nowhere
    mask = {"none": None, "bool": seen, "added": torch.where(seen, 0.0, torch.finfo(torch.float32).min)}[kind]
    logits = query @ key.transpose(-1, -2) * 0.7
    if mask is None:
        wanted = logits.softmax(-1).mean(2)
    else:
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        wanted = weights.sum(2) / seen.sum(2).clamp_min(1)
    found = attention_received(query, key, 0.7, mask, block)
    if kind == "added":  # a row of nothing but the lowest number is a row of equals to every implementation
        weights = (logits + mask).softmax(-1)
        wanted = weights.sum(2) / seen.sum(2).clamp_min(1)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_low_precision_is_read_in_float32():
    query, key = draw(1, 2, 40, 8, seed=0), draw(1, 2, 40, 8, seed=1)
    found = attention_received(query.bfloat16(), key.bfloat16(), 8**-0.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(2), torch.ones(1, 2), atol=1e-4, rtol=0)


def test_never_the_map_of_all_heads():
    """Of a tower as large as Qwen-VL's for a photograph, 2,304 patches: some 20 MB, not the 340 of the map."""
    tokens = 2304
    query, key = draw(1, 16, tokens, 8, seed=0), draw(1, 16, tokens, 8, seed=1)
    held = peak_memory(lambda: attention_received(query, key, 0.3))
    assert held <= 25e6
    assert 16 * tokens**2 * 4 >= 13 * held
