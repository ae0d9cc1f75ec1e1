"""What a layout is worked out from: the inputs of a call, and which of its visual slots are images and which videos."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...ops.host import host_copies

if TYPE_CHECKING:
    from .parts import Anatomy

__all__ = ["THUMB", "LayoutInputs", "Run", "modality", "on_host", "runs_of"]

_PLACED_BY_PIXELS = ("internvl", "aya_vision", "cohere2_vision")
_OF_IMAGES = ("image_grid_thw", "pixel_values", "image_features")
_OF_VIDEOS = ("video_grid_thw", "pixel_values_videos", "video_features")
_NAMES = (
    "input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "image_sizes", "batch_num_images",
    "image_merge_sizes", "video_merge_sizes", "video_compression_mask", "spatial_shapes", "target_sizes",
    "downsample_mode",
)  # fmt: skip
"""Inputs that say what fills the visual slots."""
THUMB = 16
"""Pixels per side to which tiles are shrunk, to compare them with the thumbnail."""


class Run(NamedTuple):
    """Contiguous visual slots `start` .. `end - 1` of a row."""

    row: int
    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class LayoutInputs:
    """What a layout is worked out from. Holds no features and no full-size pixels: it outlives the pass."""

    anatomy: Any = None
    visual: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    info: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] | None = None
    thumbs: Tensor | None = None
    video_lengths: tuple[int, ...] | None = None
    video_frames: tuple[int, int] | None = None
    """Videos, and frames of each, where they come as (videos, frames, ...)."""
    oblong: bool = False
    """Whether images were given as anything but square pictures."""
    items: Tensor | None = None
    """(B, S) long, 1, 2, ... for the items of a row, as the caller numbers them."""

    @classmethod
    def of(cls, anatomy: Anatomy, visual: Tensor, info: dict[str, Any], items: Tensor | None = None) -> LayoutInputs:
        """Take what is needed out of `info`; no device sync."""
        kept = {name: info[name] for name in _NAMES if info.get(name) is not None}
        kept |= {name: True for name in (*_OF_IMAGES, *_OF_VIDEOS) if name not in kept and info.get(name) is not None}
        thumbs = None
        if getattr(anatomy.config, "model_type", "") in _PLACED_BY_PIXELS:
            thumbs = _shrink(info.get("pixel_values"))
        videos = info.get("pixel_values_videos")
        frames = None
        if isinstance(videos, Tensor) and videos.dim() == 5:
            frames = (videos.shape[0], videos.shape[1])
        pixels = info.get("pixel_values")
        oblong = isinstance(pixels, Tensor) and (pixels.dim() < 4 or pixels.shape[-1] != pixels.shape[-2])
        of_images, of_videos = (_lengths(info.get(name)) for name in ("image_features", "video_features"))
        return cls(anatomy, visual, kept, of_images, thumbs, of_videos, frames, oblong, items)

    def on_cpu(self, visual: Tensor) -> LayoutInputs:
        """The same with all tensors on the CPU (the device sync of a layout)."""
        visual, info = on_host(visual, self.info)
        thumbs = None if self.thumbs is None else self.thumbs.cpu()
        items = None if self.items is None else self.items.cpu()
        return replace(self, visual=visual, info=info, thumbs=thumbs, items=items)

    @property
    def rows(self) -> int:
        return self.visual.shape[0]

    @property
    def config(self) -> Any:
        return self.anatomy.config

    @property
    def vision_config(self) -> Any:
        return self.config.vision_config

    def slots(self, mask: Tensor) -> list[tuple[int, int]]:
        """(row, slot) pairs of a (B, S) bool mask, in reading order."""
        return [(row, slot) for row, slot in mask.nonzero().tolist()]

    def of_prompt(self, name: str) -> Tensor | None:
        """A (B, S) tensor of the inputs, cut to the prompt; None if it is absent or of another shape."""
        return _cut_to(self.visual, self.info.get(name))


def on_host(visual: Tensor, info: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The visual slots (B, S), and the inputs that say what fills them, on the CPU: one copy, made once in a pass."""
    named = {name: info[name] for name in _NAMES if isinstance(info.get(name), Tensor)}
    visual, *copies = host_copies(visual, *named.values())
    return visual, {**info, **dict(zip(named, copies))}


def modality(anatomy: Anatomy, visual: Tensor, info: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Slots of images and slots of videos, each (B, S) bool.

    Args:
        anatomy: of the model.
        visual: (B, S) bool, slots of either.
        info: what the model was called with.
    """
    types, ids = (_cut_to(visual, info.get(name)) for name in ("mm_token_type_ids", "input_ids"))
    video = anatomy.video_token_id
    both = [any(info.get(name) is not None for name in names) for names in (_OF_IMAGES, _OF_VIDEOS)]
    if both == [False, True]:  # Molmo 2 writes the patches of frames with the id of those of images
        is_video = torch.ones_like(visual)
    elif types is not None and bool((types[visual] > 0).all()):
        is_video = types == 2
    elif ids is not None and video is not None:
        is_video = ids == video
    else:
        is_video = torch.zeros_like(visual)
    return visual & ~is_video, visual & is_video


def _cut_to(visual: Tensor, value: Any) -> Tensor | None:
    """A (B, S) tensor of the inputs, cut to the prompt; None if it is absent or of another shape."""
    if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[0] != visual.shape[0]:
        return None
    return value[:, : visual.shape[1]].to(visual.device) if value.shape[1] >= visual.shape[1] else None


def runs_of(mask: Tensor) -> list[Run]:
    """The contiguous runs of a (B, S) bool mask, in reading order."""
    edges = functional.pad(mask.int(), (1, 1)).diff(dim=1)
    starts, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    return [Run(row, start, end) for (row, start), (_, end) in zip(starts, ends)]


def _lengths(features: Any) -> tuple[int, ...] | None:
    if isinstance(features, Tensor) and features.dim() == 3 and features.shape[1] > 1:  # Inkling: patches, one by one
        return (features.shape[1],) * features.shape[0]
    if isinstance(features, list | tuple) and all(isinstance(part, Tensor) for part in features):
        return tuple(part.shape[:-1].numel() for part in features)
    return None


def _shrink(pixels: Any) -> Tensor | None:
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or pixels.numel() == 0:
        return None
    return functional.adaptive_avg_pool2d(pixels.detach().float(), THUMB)
