"""Prompts with videos for every family that takes them, and for two into which frames go as numbered images.

A row is made from its number alone, so that it is the same in a batch as by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tests import families
from tests.catalogue.build import build as build_class
from tests.families import DECODER, IMAGE_TOKEN, PINPOINTS, VIDEO_TOKEN, spread_weights, token_types
from tests.reference.checks import greedy

__all__ = ["FAMILIES", "NUMBERED", "build", "numbers", "prompt"]

_GRIDS = [(2, 4, 6), (3, 4, 4), (4, 4, 4)]
"""Time, height, width in patches of the tower: 12, 12 and 16 visual tokens in frames of 6 and of 4."""
_WHOLE = {"llava_onevision": (4, 1), "llava_next_video": (4, 0), "video_llava": (17, 0)}
"""Slots of a frame, and after the last one."""
_FRAMES = [3, 2, 4]
"""Of the families that see frames as images."""
NUMBERED = ["internvl", "smolvlm"]
_STREAMS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "qwen3_5", "video_llama_3", "video_llama_3_compressed"]
FAMILIES = [*_STREAMS, *_WHOLE, *NUMBERED]


@functools.cache
def build(name: str) -> Any:
    """A tiny random model, shared by all tests of a process."""
    model = _build(name.removesuffix("_compressed"))
    with torch.no_grad():  # transformers installs its own recorders at the first use, and leaves them there
        model(**prompt(name), output_hidden_states=True)
        greedy(model, prompt(name), 2)
    return model


def _build(name: str) -> Any:
    if name in ("video_llama_3", "qwen3_5"):
        return build_class(name)
    if name in families.FAMILIES:
        return families.build(name)
    config = {"vision_config": families.build("llava").config.vision_config, "text_config": hf.LlamaConfig(**DECODER)}
    config |= {"image_token_index": IMAGE_TOKEN, "video_token_index": VIDEO_TOKEN}
    if name == "video_llava":
        return spread_weights(hf.VideoLlavaForConditionalGeneration(hf.VideoLlavaConfig(**config)))
    config = hf.LlavaNextVideoConfig(**config, image_grid_pinpoints=PINPOINTS)
    return spread_weights(hf.LlavaNextVideoForConditionalGeneration(config))


def _noise(row: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(row))


def _shown(name: str, row: int) -> Tensor:
    """(time, patches) bool, visual tokens that the prompt holds: all of them, unless the processor compresses."""
    time, height, width = _GRIDS[row]
    shown = torch.ones(time, height * width // 4, dtype=torch.bool)
    if name.endswith("_compressed"):
        shown[1:] = _noise(row, *shown[1:].shape) > -0.5
    return shown


def _ids(name: str, row: int) -> list[int]:
    """One row: words, a video, words."""
    if name in _STREAMS:
        frames = [[VIDEO_TOKEN] * int(here.sum()) for here in _shown(name, row)]
        if name in ("qwen3_vl", "qwen3_5", "glm4v"):  # each frame between brackets, behind its time stamp
            start, end = (154, 155) if name == "glm4v" else (families.IMAGE_START, families.IMAGE_END)
            opened, closed = ([start], [end]) if name == "glm4v" else ([], [])
            token = IMAGE_TOKEN if name == "glm4v" else VIDEO_TOKEN  # GLM's processor writes frames as images
            bracket = (families.IMAGE_START, families.IMAGE_END)
            video = opened + [t for f in frames for t in (20 + row, bracket[0], *[token] * len(f), bracket[1])] + closed
        else:
            video = [families.IMAGE_START, *[t for f in frames for t in f], families.IMAGE_END]
    elif name in _WHOLE:
        frame, after = _WHOLE[name]
        video = [VIDEO_TOKEN] * (4 * frame + after)
    else:
        video = [t for _ in range(_FRAMES[row]) for t in (30, *[IMAGE_TOKEN] * 16)]
    return [1, 10 + row, 11, *video, *range(20, 28 + 3 * row)]


def prompt(name: str, rows: Sequence[int] = (0, 1)) -> dict[str, Tensor]:
    """Keyword arguments of a left-padded batch of these rows."""
    ids = [_ids(name, row) for row in rows]
    length = max(map(len, ids))
    input_ids = torch.tensor([[0] * (length - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids])
    return {"input_ids": input_ids, "attention_mask": mask, **_types(name, input_ids), **_pixels(name, rows)}


def _types(name: str, ids: Tensor) -> dict[str, Tensor]:
    if name == "glm4v":
        return {"mm_token_type_ids": 2 * (ids == IMAGE_TOKEN).int()}
    return token_types(name, ids)


def _pixels(name: str, rows: Sequence[int]) -> dict[str, Tensor]:
    if name in _STREAMS:
        is_llama, width = name.startswith("video_llama_3"), 192 if name.startswith("video_llama_3") else 384
        grids = torch.tensor([_GRIDS[row] for row in rows])
        patches = torch.cat([_noise(row, int(grid.prod()), width) for row, grid in zip(rows, grids)])
        more = {"video_merge_sizes": torch.full((len(rows),), 2)} if is_llama else {}
        if name.endswith("_compressed"):
            more["video_compression_mask"] = torch.cat([_shown(name, row).flatten() for row in rows])
        return {"pixel_values_videos": patches, "video_grid_thw": grids, **more}
    if name in _WHOLE:
        return {"pixel_values_videos": torch.stack([_noise(row, 4, 3, 32, 32) for row in rows])}
    frames = [_noise(row, _FRAMES[row], 3, 64, 64) for row in rows]
    if name == "internvl":
        return {"pixel_values": torch.cat(frames)}
    most = max(map(len, frames))  # rows with fewer images are padded with empty ones
    return {"pixel_values": torch.stack([torch.cat([f, f.new_zeros(most - len(f), 3, 64, 64)]) for f in frames])}


def numbers(name: str, ids: Tensor) -> dict[str, Tensor]:
    """What `apply` must be told: `visual=` for families that see frames as images."""
    return {"visual": (ids == IMAGE_TOKEN).long()} if name in NUMBERED else {}
