"""Fewer tokens inside the vision tower: patches merge between its layers, or the image itself is made smaller.

Forward hooks on the tower's layers shorten the hidden states, so that attention and MLP of what follows really run on
fewer tokens. When the tower is done, its features are written back to their full length (each patch gets the feature
of the token it went into), so that the model's own selection, projector and scatter see what they are used to; which
patches share one token is handed to the method, which keeps one slot of each before layer 0.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ...ops.bipartite import Merging
from ...reduction import UnsupportedError
from ..decoder.taps import AttentionTap
from ..families.parts import Anatomy
from ..stopwatch import deciding
from ..trace import TowerCall
from .reader import _lay, _square_plan

__all__ = ["MergeSpec", "ShrinkSpec", "TowerReduction"]

_ATTENTION_NAMES = ("self_attn", "attn", "attention")
_NORM_NAMES = ("layer_norm2", "layernorm_after")


@runtime_checkable
class MergeSpec(Protocol):
    """How a method merges tokens between the layers of a tower.

    Attributes:
        metric: what is compared: "key", the layer's keys averaged over the heads, or "hidden", the hidden states.
        place: "between" attention and MLP of a layer, or "after" the layer.
        weighted: means weigh each token by the number of patches it stands for.
        proportional: attention counts a token as many times: log(size) is added to the logits of its key.
    """

    metric: Literal["key", "hidden"]
    place: Literal["between", "after"]
    weighted: bool
    proportional: bool

    def schedule(self, tokens: int, layers: int, class_token: bool) -> list[int]:
        """Patches left after each of `layers` layers, of `tokens` ones (the class token not counted)."""

    def match(self, metric: Tensor, r: int, layer: int, layers: int, class_token: bool) -> Merging:
        """Which of the tokens (I, T, C) go together, `r` of them vanishing."""


@runtime_checkable
class ShrinkSpec(Protocol):
    """How a method shrinks the image before the tower."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches of the smaller image, of height x width ones."""


class TowerReduction:
    """A tower that works on fewer tokens, from `install` to `remove`; also a context manager.

    Args:
        tower: a Hugging Face vision tower with layers like those of CLIP, SigLIP or ViT.
        spec: what to do.
        last: the layer whose output is used, -2 in LLaVA: nothing merges behind it.
        expand: write features back to the full length; False leaves them short (for an encoder used on its own).

    Raises:
        UnsupportedError: the tower is built differently.
    """

    def __init__(self, tower: nn.Module, spec: MergeSpec | ShrinkSpec, last: int = -1, expand: bool = True):
        self.tower, self.spec, self.expand = tower, spec, expand
        self.attention = _attention_modules(tower)
        self.layers = [_parent(tower, module) for module in self.attention]
        self.used = len(self.layers) + last + 1
        names = {name.rpartition(".")[2] for name, _ in tower.named_parameters()}
        self.class_token = bool(names & {"class_embedding", "cls_token"})
        if "distillation_token" in names:
            raise UnsupportedError(f"{type(tower).__name__} has a distillation token, which must not merge")
        self.maps: list[Tensor] = []
        """Per call of the tower (I, T): the token that each patch, class token included, went into."""
        self.calls: list[TowerCall] = []
        """Per call of the tower, how many tokens its layers computed."""
        self._undo: list[Callable[[], None]] = []
        self._schedule: list[int] = []
        self._by_length: dict[int, Tensor] = {}
        self._map: Tensor | None = None
        self._size: Tensor | None = None
        self._key: Tensor | None = None
        self._pending: Merging | None = None

    # ------------------------------------------------------------------------------------------- installing, undoing
    def install(self) -> TowerReduction:
        """Put the hooks in."""
        try:
            if isinstance(self.spec, MergeSpec):
                self._install_merging(self.spec)
            else:
                if "interpolate_pos_encoding" not in inspect.signature(self.tower.forward).parameters:
                    raise UnsupportedError(
                        f"{type(self.tower).__name__} cannot be run on a smaller image from here; resize the image "
                        "before the processor"
                    )
                self._hook(self.tower.register_forward_pre_hook(self._shrink, with_kwargs=True))
            self._hook(self.tower.register_forward_hook(self._done, prepend=True))
        except BaseException:
            self.remove()
            raise
        return self

    def _hook(self, handle: Any) -> None:
        self._undo.append(handle.remove)

    def _install_merging(self, spec: MergeSpec) -> None:
        implementation = getattr(self.attention[0].config, "_attn_implementation", None) or "eager"
        if spec.proportional and implementation not in ("sdpa", "eager"):
            raise UnsupportedError(
                f"proportional attention needs SDPA or eager attention in the tower, not {implementation}"
            )
        for layer in self.layers:
            _check_layer(layer, spec.proportional)
        self._hook(self.tower.register_forward_pre_hook(self._begin))
        for i, layer in enumerate(self.layers[: self.used]):
            self._hook(layer.register_forward_pre_hook(self._enter, with_kwargs=True))
            if spec.metric == "key":
                tap = AttentionTap(self.attention[i], self._attending)
                self._undo.append(tap.remove)
            if spec.place == "between":
                norm, mlp = _between(layer)
                self._hook(norm.register_forward_pre_hook(functools.partial(self._before_mlp, i)))
                self._hook(mlp.register_forward_hook(self._after_mlp, prepend=True))
            self._hook(layer.register_forward_hook(functools.partial(self._leave, i), prepend=True))
        for layer in self.layers[self.used :]:
            self._hook(layer.register_forward_pre_hook(self._enter, with_kwargs=True))

    def remove(self) -> None:
        """Give the tower back as it was."""
        while self._undo:
            self._undo.pop()()
        self.clear()

    def clear(self) -> None:
        """Forget what merged: new images are about to be encoded."""
        self.maps, self.calls, self._by_length, self._schedule = [], [], {}, []
        self._map = self._size = self._key = self._pending = None

    def __enter__(self) -> TowerReduction:
        return self.install()

    def __exit__(self, *exception: object) -> None:
        self.remove()

    # ------------------------------------------------------------------------------------------------------ merging
    def _begin(self, module: nn.Module, args: tuple) -> None:
        self._map = self._size = self._key = self._pending = None
        self._by_length, self._schedule = {}, []

    def _start(self, hidden: Tensor) -> None:
        images, tokens = hidden.shape[:2]
        assert isinstance(self.spec, MergeSpec)
        self._schedule = self.spec.schedule(tokens - self.class_token, self.used, self.class_token)
        self._map = torch.arange(tokens, device=hidden.device).expand(images, -1)
        self._size = torch.ones(images, tokens, 1, device=hidden.device)
        self._by_length = {tokens: self._map}
        self.calls.append(TowerCall(images, []))

    def _enter(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        assert isinstance(self.spec, MergeSpec)
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._map is None:
            self._start(hidden)
        self.calls[-1].tokens.append((hidden.shape[1], hidden.shape[1]))
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if mask is not None:
            raise UnsupportedError(
                f"{type(self.tower).__name__} hands its layers an attention mask, as for images of several sizes; "
                "merge after the tower (where='output')"
            )
        if not self.spec.proportional or self._size is None or hidden.shape[1] == next(iter(self._by_length)):
            return None
        bias = self._size.log().to(hidden.dtype).transpose(1, 2)[:, None].expand(-1, 1, hidden.shape[1], -1)
        if len(args) > 1:
            return (args[0], bias, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": bias}

    def _attending(self, module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> None:
        self._key = key.mean(1)

    @deciding
    def _match(self, layer: int, hidden: Tensor) -> Merging | None:
        assert isinstance(self.spec, MergeSpec)
        r = hidden.shape[1] - self.class_token - self._schedule[layer]
        if r <= 0:
            return None
        metric = self._key if self.spec.metric == "key" else hidden
        assert metric is not None
        with torch.no_grad():
            return self.spec.match(metric, r, layer, self.used, self.class_token)

    def _mean(self, merging: Merging, hidden: Tensor) -> Tensor:
        assert isinstance(self.spec, MergeSpec)
        assert self._size is not None
        weights = self._size.to(hidden.dtype) if self.spec.weighted else None
        return merging.mean(hidden, weights)[0]

    # What follows computes exactly "merge, then MLP": the residual is merged after the sum, for a mean is linear, and
    # the MLP's output, equal for all members of a group, is its own mean.
    def _before_mlp(self, layer: int, norm: nn.Module, args: tuple) -> tuple | None:
        self._pending = self._match(layer, args[0])
        if self._pending is None:
            return None
        merged = self._mean(self._pending, args[0])
        self.calls[-1].tokens[-1] = (args[0].shape[1], merged.shape[1])
        return (merged, *args[1:])

    def _after_mlp(self, mlp: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return None if self._pending is None else self._pending.unmerge(output)

    def _leave(self, layer: int, module: nn.Module, args: tuple, output: Any) -> Any:
        assert isinstance(self.spec, MergeSpec)
        hidden = output[0] if isinstance(output, tuple) else output
        merging = self._pending if self.spec.place == "between" else self._match(layer, hidden)
        self._pending = self._key = None
        if merging is None:
            return None
        assert self._map is not None
        assert self._size is not None
        hidden = self._mean(merging, hidden)
        self._size = merging.sums(self._size)
        self._map = merging.index.gather(1, self._map)
        self._by_length[hidden.shape[1]] = self._map
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    # ---------------------------------------------------------------------------------------------------- shrinking
    @deciding
    def _shrink(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        assert isinstance(self.spec, ShrinkSpec)
        self._map, self._by_length = None, {}
        pixels = args[0] if args else kwargs["pixel_values"]
        config: Any = self.tower.config
        patch = config.patch_size
        height, width = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        rows, columns = self.spec.grid(height, width)
        y, x = torch.arange(height) * rows // height, torch.arange(width) * columns // width
        place = (y[:, None] * columns + x).reshape(-1).to(pixels.device)
        if self.class_token:
            place = torch.cat([place.new_zeros(1), place + 1])
        self._map = place.expand(len(pixels), -1)
        tokens = rows * columns + self.class_token
        self.calls.append(TowerCall(len(pixels), [(tokens, tokens)] * len(self.layers)))
        if (rows, columns) == (height, width):
            return None
        self._by_length = {tokens: self._map}
        pixels = interpolate(
            pixels.float(), size=(rows * patch, columns * patch), mode="bilinear", antialias=True, align_corners=False
        ).to(pixels.dtype)
        kwargs = {**kwargs, "interpolate_pos_encoding": True}
        return ((pixels, *args[1:]), kwargs) if args else (args, {**kwargs, "pixel_values": pixels})

    # -------------------------------------------------------------------------------------------------- handing over
    def _full(self, states: Any) -> Any:
        """States (I, T', C) at full length; anything else as it is."""
        if isinstance(states, tuple | list):
            return type(states)(self._full(part) for part in states)
        if isinstance(states, Tensor) and states.dim() == 3 and states.shape[1] in self._by_length:
            index = self._by_length[states.shape[1]][..., None]
            return states.gather(1, index.expand(-1, -1, states.shape[2]))
        return states

    def _done(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self._map is None:
            return None
        self.maps.append(self._map)
        if not self.expand:
            return None
        if isinstance(output, tuple):
            return self._full(output)
        for name in ("last_hidden_state", "hidden_states"):
            if getattr(output, name, None) is not None:
                setattr(output, name, self._full(getattr(output, name)))
        return output

    def groups(self, anatomy: Anatomy, visual: Tensor, info: dict[str, Any]) -> Tensor | None:
        """Which visual slots show one token: (B, S) long, equal within a token of a row, -1 for all other slots.

        Args:
            anatomy: of the model whose tower this is.
            visual: (B, S) bool.
            info: what the model was called with.

        Raises:
            UnsupportedError: the model makes one visual token of several patches.
        """
        if not self.maps:
            return None
        place = torch.cat(self.maps)
        labels = place + torch.arange(len(place), device=place.device)[:, None] * place.shape[1] + 1
        labels = labels[:, int(self.class_token) :]
        plan = _square_plan(anatomy, labels.shape[0], labels.shape[1], info)
        merged = plan.merge(labels[..., None].double())
        if len(merged) != labels.numel():
            raise UnsupportedError(
                f"{type(anatomy.model).__name__} makes one visual token of several patches: nothing can be taken away "
                "in its tower; merge after it (where='output')"
            )
        patches = _lay(plan, {"features": labels[..., None].double()}, {}, visual)
        assert patches.features is not None
        return patches.to_slots(patches.features[..., 0], *visual.shape).long() - 1


def _attention_modules(tower: nn.Module) -> list[nn.Module]:
    found = [
        module
        for name, module in tower.named_modules()
        if name.rpartition(".")[2] in _ATTENTION_NAMES and hasattr(module, "config")
    ]
    if not found:
        raise UnsupportedError(f"no attention layers found in {type(tower).__name__}")
    return found


def _parent(tower: nn.Module, module: nn.Module) -> nn.Module:
    name = next(name for name, candidate in tower.named_modules() if candidate is module)
    return tower.get_submodule(name.rpartition(".")[0])


def _between(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The norm before the MLP of a layer, and the MLP."""
    norm = next((getattr(layer, name) for name in _NORM_NAMES if hasattr(layer, name)), None)
    mlp = getattr(layer, "mlp", None)
    if norm is None or mlp is None:
        raise _unlike_clip(layer)
    return norm, mlp


def _check_layer(layer: nn.Module, proportional: bool) -> None:
    _between(layer)
    accepted = inspect.signature(layer.forward).parameters
    if "cu_seqlens" in accepted:
        raise _unlike_clip(layer)
    if proportional and "attention_mask" not in accepted:
        raise UnsupportedError(f"{type(layer).__name__} takes no mask, so it needs proportional=False")


def _unlike_clip(layer: nn.Module) -> UnsupportedError:
    return UnsupportedError(
        f"{type(layer).__name__}: merging inside a vision tower needs layers like those of CLIP, SigLIP or ViT; "
        "merge after the tower (where='output')"
    )
