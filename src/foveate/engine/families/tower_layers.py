"""What the layers of a vision tower are made of: attention, and the norm and MLP after it."""

from __future__ import annotations

import inspect

from torch import nn

from ...reduction import UnsupportedError

__all__ = ["attention_modules", "check_mergeable", "layer_of", "norm_and_mlp"]

_ATTENTION_NAMES = ("self_attn", "attn", "attention")
_NORM_NAMES = ("layer_norm2", "layernorm_after")


def attention_modules(tower: nn.Module) -> list[nn.Module]:
    """The self-attention modules of a tower, in depth order. Raises `UnsupportedError` if none can be read."""
    paths = [(name.split("."), module) for name, module in tower.named_modules()]
    # Of a list of layers: MiniCPM-V's tower merges patches between two of them, by attention of its own.
    listed = [(path, module) for path, module in paths if any(part.isdigit() for part in path)] or paths
    named = [module for path, module in listed if path[-1] in _ATTENTION_NAMES]
    found = [module for module in named if hasattr(module, "config")]
    if not found:
        what = f"computes its attention by itself ({type(named[0]).__name__})" if named else "has no attention"
        raise UnsupportedError(f"{type(tower).__name__} {what}; a method can read none in this vision tower")
    return found


def layer_of(tower: nn.Module, attention: nn.Module) -> nn.Module:
    """The layer of a tower that holds an attention module."""
    name = next(name for name, candidate in tower.named_modules() if candidate is attention)
    return tower.get_submodule(name.rpartition(".")[0])


def norm_and_mlp(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The norm before the MLP of a layer, and the MLP. Raises `UnsupportedError` for layers unlike CLIP's."""
    norm = next((getattr(layer, name) for name in _NORM_NAMES if hasattr(layer, name)), None)
    mlp = getattr(layer, "mlp", None)
    if norm is None or mlp is None:
        raise _unlike_clip(layer)
    return norm, mlp


def check_mergeable(layer: nn.Module, proportional: bool) -> None:
    """Refuse layers in which tokens cannot merge, or cannot be weighted by a mask. Raises `UnsupportedError`."""
    norm_and_mlp(layer)
    accepted = inspect.signature(layer.forward).parameters
    attention = (part for name, part in layer.named_children() if name in _ATTENTION_NAMES)
    if any("cu_seqlens" in inspect.signature(part.forward).parameters for part in (layer, *attention)):
        raise _unlike_clip(layer)
    if proportional and "attention_mask" not in accepted:
        raise UnsupportedError(f"{type(layer).__name__} takes no mask, so it needs proportional=False")


def _unlike_clip(layer: nn.Module) -> UnsupportedError:
    return UnsupportedError(
        f"{type(layer).__name__}: merging inside a vision tower needs layers like those of CLIP, SigLIP or ViT; "
        "merge after the tower (where='output')"
    )
