"""Fewer tokens inside the vision tower: patches merge between its layers, or the image itself is made smaller.

Forward hooks on the tower's layers shorten the hidden states, so that attention and MLP of what follows really run on
fewer tokens. When the tower is done, its features are written back to their full length (each patch gets the feature
of the token it went into), so that the model's own selection, projector and scatter see what they are used to; which
patches share one token is handed to the method, which keeps one slot of each before layer 0.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ...ops.bipartite import Merging
from ...ops.host import to_device
from ...ops.select import gather_tokens
from ...reduction import UnsupportedError
from ..decoder.taps import in_backward, tap_attention
from ..families.layout_inputs import on_host
from ..families.parts import Anatomy
from ..families.tower import square_plan
from ..families.tower_layers import attention_modules, check_mergeable, layer_of, norm_and_mlp
from ..stopwatch import deciding
from ..trace import TowerCall
from ..undo import Shared, Undo
from .reader import fill, lay

__all__ = ["MergeSpec", "ShrinkSpec", "TowerReduction"]


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


@dataclass
class _Pass:
    """One call of the tower that is running."""

    schedule: list[int]
    map: Tensor
    size: Tensor
    by_length: dict[int, Tensor]
    key: Tensor | None = None


@dataclass
class _State:
    """What one thread's images became."""

    maps: list[Tensor] = field(default_factory=list)
    calls: list[TowerCall] = field(default_factory=list)
    running: _Pass | None = None
    pending: _Merge | None = None
    """Between the norm before an MLP and its end."""


@dataclass(eq=False)
class _Merge:
    """One matching, as a checkpointed layer needs it to run again: it is replayed, never redone."""

    merging: Merging
    size: Tensor
    entered: Tensor
    """(I, T, few) of what was merged, to tell the calls of a layer apart."""


class TowerReduction(Shared):
    """A tower that works on fewer tokens, once it is installed; also a context manager.

    Args:
        tower: a Hugging Face vision tower with layers like those of CLIP, SigLIP or ViT.
        spec: what to do.
        last: the layer whose output is used, -2 in LLaVA: nothing merges after it.
        expand: write features back to the full length; False leaves them short (for an encoder used on its own).

    Raises:
        UnsupportedError: the tower is built differently.
    """

    def __init__(self, tower: nn.Module, spec: MergeSpec | ShrinkSpec, last: int = -1, expand: bool = True):
        self.tower, self.spec, self.expand = tower, spec, expand
        self.attention = attention_modules(tower)
        self.layers = [layer_of(tower, module) for module in self.attention]
        self.used = len(self.layers) + last + 1
        names = {name.rpartition(".")[2] for name, _ in tower.named_parameters()}
        self.class_token = bool(names & {"class_embedding", "cls_token"})
        if "distillation_token" in names:
            raise UnsupportedError(f"{type(tower).__name__} has a distillation token, which must not merge")
        self._local = threading.local()
        self._merges: dict[int, list[weakref.ref[_Merge]]] = {}

    # ------------------------------------------------------------------------------------------- installing, undoing
    def install(self, undo: Undo) -> None:
        """Put the hooks in, until `undo` is closed."""
        if isinstance(self.spec, MergeSpec):
            self._install_merging(undo, self.spec)
        else:
            if "interpolate_pos_encoding" not in inspect.signature(self.tower.forward).parameters:
                raise UnsupportedError(
                    f"{type(self.tower).__name__} cannot be run on a smaller image from here; resize the image "
                    "before the processor"
                )
            undo.pre_hook(self.tower, self._shrink, with_kwargs=True)
        undo.hook(self.tower, self._done, prepend=True)

    def _install_merging(self, undo: Undo, spec: MergeSpec) -> None:
        implementation = getattr(self.attention[0].config, "_attn_implementation", None) or "eager"
        if spec.proportional and implementation not in ("sdpa", "eager"):
            raise UnsupportedError(
                f"proportional attention needs SDPA or eager attention in the tower, not {implementation}"
            )
        for layer in self.layers:
            check_mergeable(layer, spec.proportional)
        undo.pre_hook(self.tower, self._begin)
        for i, layer in enumerate(self.layers[: self.used]):
            undo.pre_hook(layer, self._enter, with_kwargs=True)
            if spec.metric == "key":
                tap_attention(undo, self.attention[i], self._attending)
            if spec.place == "between":
                norm, mlp = norm_and_mlp(layer)
                undo.pre_hook(norm, functools.partial(self._before_mlp, i))
                undo.hook(mlp, self._after_mlp, prepend=True)
            undo.hook(layer, functools.partial(self._leave, i), prepend=True)
        for layer in self.layers[self.used :]:
            undo.pre_hook(layer, self._enter, with_kwargs=True)

    @property
    def _now(self) -> _State:
        if not hasattr(self._local, "state"):
            self.clear()
        return self._local.state

    @property
    def maps(self) -> list[Tensor]:
        """Per call of the tower (I, T): the token that each patch, class token included, went into."""
        return self._now.maps

    @property
    def calls(self) -> list[TowerCall]:
        """Per call of the tower, how many tokens its layers computed."""
        return self._now.calls

    def begin(self, video: bool) -> None:
        """Images, or videos, are about to be encoded."""
        if video:
            raise UnsupportedError(
                "merging inside the vision tower is for images, not for videos; merge after it (where='output')"
            )
        self.clear()

    @contextlib.contextmanager
    def blamed(self, model: nn.Module) -> Iterator[None]:
        """What a model's own code raises once its tower has fewer tokens, it raises because of them."""
        try:
            yield
        except UnsupportedError:
            raise
        except Exception as error:
            if not self.calls:
                raise
            raise UnsupportedError(
                f"{type(model).__name__} cannot go on with fewer tokens in its vision tower ({error}); merge after it "
                "(where='output')"
            ) from error

    def clear(self) -> None:
        """Forget what merged in this thread: new images are about to be encoded, or the call is over."""
        self._local.state = _State()

    def __enter__(self) -> TowerReduction:
        self._undo = Undo()
        try:
            self.install(self._undo)
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()
        self.clear()

    # ------------------------------------------------------------------------------------------------------ merging
    def _begin(self, module: nn.Module, args: tuple) -> None:
        self._now.running = self._now.pending = None

    def _start(self, hidden: Tensor) -> _Pass:
        images, tokens = hidden.shape[:2]
        assert isinstance(self.spec, MergeSpec)
        place = torch.arange(tokens, device=hidden.device).expand(images, -1)
        self._now.calls.append(TowerCall(images, []))
        return _Pass(
            self.spec.schedule(tokens - self.class_token, self.used, self.class_token), place,
            torch.ones(images, tokens, 1, device=hidden.device), {tokens: place},
        )  # fmt: skip

    def _enter(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        assert isinstance(self.spec, MergeSpec)
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._now.running is None:
            self._now.running = self._start(hidden)
        now = self._now.running
        self.calls[-1].tokens.append((hidden.shape[1], hidden.shape[1]))
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if mask is not None:
            raise UnsupportedError(
                f"{type(self.tower).__name__} hands its layers an attention mask, as for images of several sizes; "
                "merge after the tower (where='output')"
            )
        if not self.spec.proportional or hidden.shape[1] == next(iter(now.by_length)):
            return None
        bias = now.size.log().to(hidden.dtype).transpose(1, 2)[:, None].expand(-1, 1, hidden.shape[1], -1)
        if len(args) > 1:
            return (args[0], bias, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": bias}

    def _attending(self, module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> None:
        if self._now.running is not None:
            self._now.running.key = key.mean(1)

    @deciding
    def _match(self, layer: int, hidden: Tensor) -> _Merge | None:
        now = self._now.running
        assert isinstance(self.spec, MergeSpec)
        if now is None:
            return None
        r = hidden.shape[1] - self.class_token - now.schedule[layer]
        if r <= 0:
            return None
        with torch.no_grad():
            metric = now.key if self.spec.metric == "key" else hidden.detach()
            assert metric is not None
            merging = self.spec.match(metric, r, layer, self.used, self.class_token)
        return _Merge(merging, now.size, hidden.detach()[..., :4].clone())

    def _mean(self, merge: _Merge, hidden: Tensor) -> Tensor:
        assert isinstance(self.spec, MergeSpec)
        weights = merge.size.to(hidden.dtype) if self.spec.weighted else None
        return merge.merging.mean(hidden, weights)[0]

    # What follows computes exactly "merge, then MLP": the residual is merged after the sum, for a mean is linear, and
    # the MLP's output, equal for all members of a group, is its own mean.
    def _before_mlp(self, layer: int, norm: nn.Module, args: tuple) -> tuple | None:
        again = in_backward()
        pending = self._recall(layer, args[0]) if again else self._match(layer, args[0])
        self._now.pending = pending
        if pending is None:
            return None
        merged = self._mean(pending, args[0])
        if not again:
            self.calls[-1].tokens[-1] = (args[0].shape[1], merged.shape[1])
        return (merged, *args[1:])

    def _after_mlp(self, mlp: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        pending = self._now.pending
        if in_backward():
            self._now.pending = None
        return None if pending is None else pending.merging.unmerge(output)

    def _leave(self, layer: int, module: nn.Module, args: tuple, output: Any) -> Any:
        assert isinstance(self.spec, MergeSpec)
        now = self._now.running
        if now is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        merge = self._now.pending if self.spec.place == "between" else self._match(layer, hidden)
        self._now.pending = now.key = None
        if merge is None:
            return None
        self._remember(layer, merge, hidden)
        hidden = self._mean(merge, hidden)
        now.size = merge.merging.sums(now.size)
        now.map = merge.merging.index.gather(1, now.map)
        now.by_length[hidden.shape[1]] = now.map
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    # The layer of a checkpoint runs again in the backward pass, maybe in another thread, and maybe several calls later.
    def _remember(self, layer: int, merge: _Merge, hidden: Tensor) -> None:
        """Keep a matching for as long as the graph of the layer's output lives."""
        if hidden.grad_fn is None:
            return
        kept_with_node: Any = hidden.grad_fn.metadata
        kept_with_node["foveate_merge"] = merge
        alive = [reference for reference in self._merges.get(layer, ()) if reference() is not None]
        self._merges[layer] = [*alive, weakref.ref(merge)]

    def _recall(self, layer: int, hidden: Tensor) -> _Merge | None:
        """The matching of the call that runs again: the one that saw nearly the same, since kernels may round anew."""
        with torch.no_grad():
            few = hidden[..., :4]
            known = [merge for reference in self._merges.get(layer, ()) if (merge := reference()) is not None]
            known = [merge for merge in known if merge.entered.shape == few.shape]
            return min(known, key=lambda merge: float((merge.entered - few).abs().sum()), default=None)

    # ---------------------------------------------------------------------------------------------------- shrinking
    @deciding
    def _shrink(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        assert isinstance(self.spec, ShrinkSpec)
        pixels = args[0] if args else kwargs["pixel_values"]
        config: Any = self.tower.config
        patch = config.patch_size
        height, width = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        rows, columns = self.spec.grid(height, width)
        y, x = torch.arange(height) * rows // height, torch.arange(width) * columns // width
        place = to_device((y[:, None] * columns + x).reshape(-1), pixels.device)
        if self.class_token:
            place = torch.cat([place.new_zeros(1), place + 1])
        place = place.expand(len(pixels), -1)
        tokens = rows * columns + self.class_token
        self.calls.append(TowerCall(len(pixels), [(tokens, tokens)] * len(self.layers)))
        whole = (rows, columns) == (height, width)
        self._now.running = _Pass([], place, place, {} if whole else {tokens: place})
        if whole:
            return None
        pixels = interpolate(
            pixels.float(), size=(rows * patch, columns * patch), mode="bilinear", antialias=True, align_corners=False
        ).to(pixels.dtype)
        kwargs = {**kwargs, "interpolate_pos_encoding": True}
        return ((pixels, *args[1:]), kwargs) if args else (args, {**kwargs, "pixel_values": pixels})

    # -------------------------------------------------------------------------------------------------- handing over
    def _done(self, module: nn.Module, args: tuple, output: Any) -> Any:
        done, self._now.running = self._now.running, None
        if done is None:
            return None
        self.maps.append(done.map)
        if not self.expand:
            return None
        if isinstance(output, tuple):
            return _full(output, done.by_length)
        for name in ("last_hidden_state", "hidden_states"):
            if getattr(output, name, None) is not None:
                setattr(output, name, _full(getattr(output, name), done.by_length))
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
        slots, info = on_host(visual, info)
        plan = square_plan(anatomy, labels.shape[0], labels.shape[1], info)
        merged = plan.merge(labels[..., None].float())
        if len(merged) != labels.numel():
            raise UnsupportedError(
                f"{type(anatomy.model).__name__} makes one visual token of several patches: nothing can be taken away "
                "in its tower; merge after it (where='output')"
            )
        patches = fill(plan, lay(plan, slots, visual.device), {"features": labels[..., None].float()}, {})
        assert patches.features is not None
        return patches.to_slots(patches.features[..., 0], *visual.shape).long() - 1


def _full(states: Any, by_length: dict[int, Tensor]) -> Any:
    """States (I, T', C) at full length, each patch with the state of its token; anything else as it is."""
    if isinstance(states, tuple | list):
        return type(states)(_full(part, by_length) for part in states)
    if isinstance(states, Tensor) and states.dim() == 3 and states.shape[1] in by_length:
        return gather_tokens(states, by_length[states.shape[1]])
    return states
