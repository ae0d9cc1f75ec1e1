"""What a whole prefill costs on paper: vision tower, connector, decoder and head of any supported model.

A weight matrix costs two FLOPs per element and row it is applied to; attention costs 4 H d n^2 for n tokens that see
each other. So it is enough to know how many tokens pass where: this is read off the pixel arguments (tiles, grids,
windows), the trace (tokens left in each decoder layer, and in each tower layer if a method works there), and the
modules themselves (their matrices).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engine.families.parts import Anatomy, resolve
from ..engine.families.streams import merge_side
from ..engine.families.tower import is_stream, tiles_of
from ..engine.trace import TowerCall, Trace
from ..reduction import UnsupportedError
from .flops import exact_flops
from .geometry import Geometry

__all__ = ["PrefillFlops", "prefill_flops"]

_PIXELS = ("pixel_values", "pixel_values_videos")
_PATCH_EMBEDDING = ("patch_embed", "patch_conv", "patchify")


class PrefillFlops(NamedTuple):
    """FLOPs of one prefill, all rows of the batch together."""

    vision: int
    """Vision tower: patch embedding and layers."""
    connector: int
    """What makes visual tokens of its features: projector, merger, pixel shuffle with its projection."""
    decoder: int
    """Layers of the language model."""
    head: int
    """Logits."""

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self)


def prefill_flops(
    model: nn.Module, trace: Trace | None, inputs: Mapping[str, Any], *, logits: int = 1, fillers: bool = True
) -> PrefillFlops:
    """FLOPs of a prefill, images included, as `torch.utils.flop_counter` counts them on eager attention.

    Two FLOPs per multiply-add. With W(x) the elements of the weight matrices and convolutions below x:

    * vision: 2 p W(patch embedding) for p patches, plus for each layer 2 n W(attention) + 4 H d sum(b^2) + 2 m W(rest),
      n tokens attending in blocks of b (an image; in streams a frame or a window), m tokens in the MLP;
    * connector: 2 v W, v visual tokens as they leave the tower's merger or the projector, before tiles are unpadded;
    * decoder and head: `exact_flops`.

    Not counted, here or by torch: norms, activations, RoPE, interpolation, pooling. Not counted here: what deciding
    costs (rows of attention, similarities), the term that counted FLOPs of a reduced prefill exceed this by.

    Args:
        model: the vision-language model; its weights are not read, so it may lie on the meta device.
        trace: of the prefill, `session.trace`; None for the unreduced model.
        inputs: what the model was called with: `input_ids`, `pixel_values`, grids and sizes. Without pixels (features
            were given) vision and connector cost nothing.
        logits: positions per row for which the head runs; 0 leaves it out.
        fillers: count padding and the fillers of a ragged batch, as they are computed; False counts tokens only, as
            `exact_flops` does by itself.

    Raises:
        UnsupportedError: the tower or connector is built in a way this cannot follow, or videos without a grid.
        ValueError: a mixture of experts (its cost depends on the router), or another depth than the trace's.
    """
    anatomy = resolve(model)
    if trace is None:
        trace = untouched(anatomy, inputs)
    shape = Geometry.from_config(anatomy.config, visual_tokens=0, text_tokens=0)
    decoder = exact_flops(shape, trace, logits=0, fillers=fillers)
    head = exact_flops(shape, trace, logits=logits, fillers=fillers) - decoder
    if all(inputs.get(name) is None for name in _PIXELS):
        return PrefillFlops(0, 0, decoder, head)
    seen = _images(anatomy, inputs)
    _check_count(anatomy, seen, trace)
    vision = _embedding(anatomy, seen, trace.tower) + _layers(anatomy, seen, trace.tower) + _pooling_head(anatomy, seen)
    return PrefillFlops(vision, 2 * seen.features * _connector_weights(anatomy), decoder, head)


def untouched(anatomy: Anatomy, inputs: Mapping[str, Any]) -> Trace:
    """Trace of a prefill of `inputs` in which nothing is removed."""
    ids, embeds, mask = (inputs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
    visual = anatomy.find_placeholders(ids, embeds)
    if visual is None:
        raise UnsupportedError("the inputs hold neither input_ids nor inputs_embeds")
    tokens = mask.bool() if isinstance(mask, Tensor) and mask.shape == visual.shape else torch.ones_like(visual)
    return Trace(anatomy.depth, visual, tokens)


# ------------------------------------------------------------------------------------------- what the tower is shown
@dataclass
class _Images:
    """Images of a batch as the tower sees them.

    Attributes:
        patches: what the patch embedding computes.
        blocks: tokens that attend to each other in a layer, class tokens included.
        windows: the same for layers with windowed attention.
        features: visual tokens that leave the tower and its connector.
        images: number of images or tiles, 0 for a stream.
    """

    patches: int
    blocks: list[int]
    windows: list[int]
    features: int
    images: int = 0


def _images(anatomy: Anatomy, inputs: Mapping[str, Any]) -> _Images:
    config = anatomy.vision_config
    grids = [
        grid
        for name in ("image_grid_thw", "video_grid_thw")
        if inputs.get(name) is not None
        for grid in torch.as_tensor(inputs[name]).tolist()
    ]
    if grids:
        return _stream(config, grids, merge_side(anatomy) or 1)
    if inputs.get("pixel_values_videos") is not None:
        raise UnsupportedError(f"{type(anatomy.model).__name__}: FLOPs of videos are known only for towers with a grid")
    height, width = inputs["pixel_values"].shape[-2:]
    down, across = _pair(config.patch_size)
    per_image = (height // down) * (width // across)
    count = _tiles(anatomy, inputs)
    if is_stream(anatomy, dict(inputs)):  # without grids: each image is cut to its own size
        sizes = torch.as_tensor(inputs["image_sizes"]).tolist()
        tokens = sum((h // down) * (w // across) for h, w in sizes)
        return _Images(count * per_image, [tokens], [tokens], tokens // _patches_per_token(anatomy, per_image))
    blocks = [per_image + _has_class_token(anatomy)] * count
    features = count * (per_image // _patches_per_token(anatomy, per_image))
    return _Images(count * per_image, blocks, blocks, features, count)


def _stream(config: Any, grids: list[list[int]], merge: int) -> _Images:
    """Qwen-VL, GLM-4V: each frame attends to itself; windows are squares of merged patches, cut at the edges."""
    frames = [(h, w) for t, h, w in grids for _ in range(t)]
    blocks = [h * w for h, w in frames]
    windows = blocks
    if getattr(config, "window_size", None):
        side = config.window_size // merge // config.patch_size
        windows = [
            rows * columns * merge * merge
            for h, w in frames
            for rows in _cut(h // merge, side)
            for columns in _cut(w // merge, side)
        ]
    return _Images(sum(blocks), blocks, windows, sum(blocks) // merge**2)


def _cut(length: int, side: int) -> Iterator[int]:
    for start in range(0, length, side):
        yield min(side, length - start)


def _tiles(anatomy: Anatomy, inputs: Mapping[str, Any]) -> int:
    """Images, or tiles of images, that are really encoded; the rest of the batch is padding."""
    pixels = inputs["pixel_values"]
    if pixels.dim() == 4:
        return len(pixels)
    if not hasattr(anatomy.base, "pack_image_features"):
        return int((pixels != 0).flatten(2).any(2).sum())  # Idefics: empty images fill up the shorter rows
    return sum(tiles_of(anatomy, inputs))


def _patches_per_token(anatomy: Anatomy, patches: int) -> int:
    """How many of the patches of an image make one visual token."""
    config = anatomy.config
    if getattr(config, "mm_tokens_per_image", None):
        return patches // config.mm_tokens_per_image
    ratio = getattr(config, "downsample_ratio", None)
    names = ("scale_factor", "downsample_factor", "spatial_merge_size")
    side = round(1 / ratio) if ratio else next((v for v in (getattr(config, n, None) for n in names) if v), 1)
    return int(side) ** 2


def _check_count(anatomy: Anatomy, seen: _Images, trace: Trace) -> None:
    """Refuse connectors of another kind: their output does not have the expected number of tokens."""
    if hasattr(anatomy.base, "pack_image_features"):  # unpadding and newlines come after the connector
        return
    shown = int(trace.visual.sum())
    if not seen.features or shown % seen.features:  # beams repeat the rows, not the images
        raise UnsupportedError(
            f"{type(anatomy.model).__name__}: {seen.features} visual tokens expected from its config, the prompt has "
            f"{shown}; its FLOPs cannot be worked out"
        )


def _has_class_token(anatomy: Anatomy) -> bool:
    return any(name.endswith(("class_embedding", "cls_token")) for name, _ in anatomy.vision_parameters())


def _pair(size: Any) -> tuple[int, int]:
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) else (int(size), int(size))


# ----------------------------------------------------------------------------------------------------- tower, matrices
def weights(module: nn.Module) -> int:
    """Elements of the weight matrices and convolutions in a module: multiply-adds per row."""
    total = 0
    for part in module.modules():
        known: Any = part
        if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            total += part.weight.numel()
        elif hasattr(known, "in_features") and hasattr(known, "out_features") and not any(part.children()):
            total += known.in_features * known.out_features  # quantised weights are packed, their sizes are not
    return total


def _embedding(anatomy: Anatomy, seen: _Images, calls: list[TowerCall]) -> int:
    patches = seen.patches
    if calls:
        patches = sum(call.images * (call.tokens[0][0] - _has_class_token(anatomy)) for call in calls)
    return 2 * patches * sum(weights(part) for _, part in _split(anatomy)[0])


def _split(anatomy: Anatomy) -> tuple[list[tuple[str, nn.Module]], list[tuple[str, nn.Module]]]:
    """Leaves of the tower outside its layers: the patch embedding, and what comes after the layers (merger, head)."""
    assert anatomy.vision is not None
    inside = {id(part) for module in anatomy.vision_attention() for part in anatomy.parent(module).modules()}
    before: list[tuple[str, nn.Module]] = []
    after: list[tuple[str, nn.Module]] = []
    for name, part in anatomy.vision.named_modules():
        if any(part.children()) or id(part) in inside:
            continue
        (before if any(word in name for word in _PATCH_EMBEDDING) else after).append((name, part))
    return before, after


def _layers(anatomy: Anatomy, seen: _Images, calls: list[TowerCall]) -> int:
    # Where no layer is named as attending to everything, every layer does.
    full = getattr(anatomy.vision_config, "fullatt_block_indexes", range(len(anatomy.vision_attention())))
    total = 0
    for i, attention in enumerate(anatomy.vision_attention()):
        blocks = seen.blocks if i in full else seen.windows
        attending, passing = sum(blocks), sum(blocks)
        if calls:
            blocks = [call.tokens[i][0] for call in calls for _ in range(call.images)]
            attending, passing = sum(blocks), sum(call.images * call.tokens[i][1] for call in calls)
        inner = weights(attention)
        total += 2 * attending * inner + 2 * passing * (weights(anatomy.parent(attention)) - inner)
        total += 4 * _width(attention) * sum(block**2 for block in blocks)
    return total


def _width(attention: Any) -> int:
    """H d of an attention module, from its query projection."""
    for name, part in attention.named_modules():
        if hasattr(part, "out_features"):
            last = name.rpartition(".")[2]
            if "qkv" in last:
                return part.out_features // 3
            if last.startswith(("q", "query")):
                return part.out_features
    raise UnsupportedError(f"{type(attention).__name__}: no query projection found, its FLOPs cannot be worked out")


def _pooling_head(anatomy: Anatomy, seen: _Images) -> int:
    """SigLIP's head, where a tower has it: one query per image looks at all its tokens. Its result is not used."""
    head: Any = getattr(anatomy.vision, "head", None)
    attention = getattr(head, "attention", None)
    if not isinstance(attention, nn.MultiheadAttention):
        return 0
    width, tokens = attention.embed_dim, sum(seen.blocks)
    rows = 2 * width**2 * (2 * seen.images + 2 * tokens) + 4 * width * tokens
    return rows + 2 * seen.images * weights(head.mlp)


def _connector_weights(anatomy: Anatomy) -> int:
    """Multiply-adds per visual token between the tower's last layer and the decoder."""
    merger = sum(weights(part) for name, part in _split(anatomy)[1] if not name.startswith("head."))
    elsewhere = (anatomy.decoder, anatomy.vision, anatomy.model.get_output_embeddings())
    skipped = {id(part) for root in elsewhere if root is not None for part in root.modules()}
    projector = 0
    for name, part in anatomy.base.named_modules():
        if id(part) in skipped or isinstance(part, nn.Embedding) or name.startswith("audio"):
            continue
        leaf = 0 if any(part.children()) else weights(part)
        bare = (p.numel() for p in part._parameters.values() if p is not None and p.dim() == 2)
        projector += leaf or sum(bare)  # Gemma 3 multiplies with a bare matrix
    return merger + projector
