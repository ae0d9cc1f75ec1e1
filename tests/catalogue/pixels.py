"""Images as each class wants them: functions of (model, rows) that return keyword arguments, one image for each row.

Rows get images of different size where the class can take that, so that they differ in their number of visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Pixels = Callable[[Any, int], dict[str, Tensor]]

_GRIDS = torch.tensor([[1, 8, 6], [1, 6, 10], [1, 8, 8], [1, 4, 10]])
_PAGES = torch.tensor([[60, 50], [30, 60], [64, 64], [50, 28]])


def noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _raster(height: int, width: int, indexing: str, start: int = 0) -> Tensor:
    """(height * width, 2) coordinates."""
    axes = torch.arange(start, start + height), torch.arange(start, start + width)
    return torch.stack(torch.meshgrid(*axes, indexing=indexing), -1).reshape(-1, 2)


def _stacked(*shape: int, **more: tuple[int, ...]) -> Pixels:
    """Noise (rows, *shape) under "pixel_values", and a constant for each row."""

    def made(model: Any, rows: int) -> dict[str, Tensor]:
        return {"pixel_values": noise(rows, *shape)} | {k: torch.tensor([v] * rows) for k, v in more.items()}

    return made


def square(size: int, name: str = "pixel_values") -> Pixels:
    return lambda model, rows: {name: noise(rows, 3, size, size)}


def stream(width: int = 384, **more: int) -> Pixels:
    """Patches of all images end to end and their grids (time, height, width)."""

    def made(model: Any, rows: int) -> dict[str, Tensor]:
        grids = _GRIDS[:rows]
        patches = noise(int(grids.prod(1).sum()), width)
        return {
            "pixel_values": patches,
            "image_grid_thw": grids,
            **{k: torch.full((rows,), v) for k, v in more.items()},
        }

    return made


def stream_with_merge_sizes(model: Any, rows: int) -> dict[str, Tensor]:
    return stream(192, image_merge_sizes=2)(model, rows)


def patch_stream(model: Any, rows: int) -> dict[str, Tensor]:
    flat = stream(192)(model, rows)
    return {**flat, "pixel_values": flat["pixel_values"].view(-1, 3, 8, 8)}


def large_patch_stream(model: Any, rows: int) -> dict[str, Tensor]:
    """Patches as large as a visual token, channels last."""
    grids = torch.tensor([[1, 4, 3], [1, 3, 5], [1, 4, 4]])[:rows]
    return {"pixel_values": noise(int(grids.prod(1).sum()), 16, 16, 3), "image_grid_thw": grids}


def tiles(model: Any, rows: int) -> dict[str, Tensor]:
    """LLaVA-NeXT: a base image and four tiles."""
    return {"pixel_values": noise(rows, 5, 3, 32, 32), "image_sizes": _PAGES[:rows]}


def counted_tiles(model: Any, rows: int) -> dict[str, Tensor]:
    return {**tiles(model, rows), "batch_num_images": torch.ones(rows, dtype=torch.long)}


square_with_size = _stacked(3, 64, 64, image_sizes=(64, 64))
square_in_vocabulary = _stacked(3, 16, 16, image_sizes=(16, 16))
listed_square = _stacked(1, 3, 64, 64)
listed_square_masked = _stacked(1, 3, 64, 64, pixel_attention_mask=(True,))
small_listed_square = _stacked(1, 3, 56, 56)
aspect_tiles = _stacked(1, 2, 3, 64, 64, aspect_ratio_ids=(1,), aspect_ratio_mask=((1, 1),))


def masked_square(model: Any, rows: int) -> dict[str, Tensor]:
    return {"pixel_values": noise(rows, 3, 64, 64), "pixel_mask": torch.ones(rows, 64, 64, dtype=torch.bool)}


def two_resolutions(model: Any, rows: int) -> dict[str, Tensor]:
    return {"pixel_values": noise(rows, 3, 64, 64), "high_res_pixel_values": noise(rows, 3, 128, 128)}


def two_frame_patches(model: Any, rows: int) -> dict[str, Tensor]:
    return {"pixel_values": noise(rows * 16, 2, 8, 8, 3)}


def flat_with_height_width(model: Any, rows: int) -> dict[str, Tensor]:
    return {"pixel_values": noise(rows * 64, 192), "image_grid_hw": torch.tensor([[8, 8]] * rows)}


def padded_patches(model: Any, rows: int) -> dict[str, Tensor]:
    """SigLIP 2: patches padded to 64 for each image."""
    shapes = torch.tensor([[8, 8], [8, 6], [6, 8]])[:rows]
    mask = (torch.arange(64) < shapes.prod(1)[:, None]).long()
    return {"pixel_values": noise(rows, 64, 192), "spatial_shapes": shapes, "pixel_attention_mask": mask}


def strip(model: Any, rows: int) -> dict[str, Tensor]:
    """MiniCPM-V: all images in one strip as high as a patch."""
    return {"pixel_values": noise(1, 3, 8, rows * 64 * 8), "target_sizes": torch.tensor([[8, 8]] * rows)}


def positioned_patches(model: Any, rows: int) -> dict[str, Tensor]:
    """Gemma 4: patches in [0, 1] with their (x, y); without a tower, a patch is as large as a visual token."""
    vision = model.config.vision_config
    side = getattr(vision, "patch_size", 8)
    if model.config.model_type == "gemma4_unified":
        side *= getattr(vision, "pooling_kernel_size", 1)
    pixels = torch.rand(rows, 64, 3 * side**2, generator=torch.Generator().manual_seed(3))
    return {"pixel_values": pixels, "image_position_ids": _raster(8, 8, "xy").repeat(rows, 1, 1)}


def pooled_patches(model: Any, rows: int) -> dict[str, Tensor]:
    """Molmo 2: the table of pooled patches counts through the whole batch."""
    pool = torch.arange(64).view(4, 2, 4, 2).transpose(1, 2).reshape(16, 4)
    return {
        "pixel_values": noise(rows, 64, 192),
        "image_token_pooling": torch.cat([pool + 64 * row for row in range(rows)]),
        "image_grids": torch.tensor([[4, 4, 0, 0]] * rows),
        "image_num_crops": torch.ones(rows, dtype=torch.long),
    }


def global_and_crop(model: Any, rows: int) -> dict[str, Tensor]:
    return {
        "image_pixel_values": noise(rows, 2, 3, 64, 64),
        "image_sizes": torch.tensor([[64, 64]] * rows),
        "image_attention_mask": torch.ones(rows, 2, 8, 8, dtype=torch.long),
    }


def raw_patches(model: Any, rows: int) -> dict[str, Tensor]:
    return {"image_patches": noise(rows, 16, 768)}


def _question(rows: int) -> Tensor:
    return torch.randint(5, 140, (rows, 6), generator=torch.Generator().manual_seed(4))


def square_with_question(model: Any, rows: int) -> dict[str, Tensor]:
    return {"pixel_values": noise(rows, 3, 64, 64), "qformer_input_ids": _question(rows)}


def frames_with_question(model: Any, rows: int) -> dict[str, Tensor]:
    return {"pixel_values": noise(rows, 4, 3, 64, 64), "qformer_input_ids": _question(rows)}


def numbered_patches(model: Any, rows: int) -> dict[str, Tensor]:
    """Kosmos-2.5: every patch begins with its row and column, counted from 1."""
    places = _raster(8, 8, "ij", 1).repeat(rows, 1, 1).float()
    side = torch.full((rows,), 8)
    return {"flattened_patches": torch.cat([places, noise(rows, 64, 192)], -1), "height": side, "width": side}
