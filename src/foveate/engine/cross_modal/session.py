"""Fewer tokens inside encoder-style VLMs, where image and text meet in the layers: ViLT, METER, BridgeTower.

No KV cache and no frame here: hooks shorten the hidden states between the attention and the MLP of a layer, and every
attention of these layers runs through `attend`, which knows what is left.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...ops.pumer import Reduction
from ...reduction import OptionError, UnsupportedError
from ..session import Session
from .parts import CrossModal, EncoderMethod, EncoderTrace, attend, resolve_encoder, text_rows

__all__ = ["EncoderMethod", "EncoderSession", "EncoderTrace"]

_ROUTE = "foveate_encoder"
_LISTENER = "_foveate_encoder"
_READS_TEXT = ("ForMaskedLM", "ForTokenClassification")
"""Heads that expect one state for each text token."""


@dataclass
class _Pass:
    """State of one call of the base model. Masks are those of what is left now."""

    text_mask: Tensor
    image_mask: Tensor | None
    maps: bool
    """Whether the caller wants attention maps."""
    trace: EncoderTrace = field(default_factory=EncoderTrace)
    text_before: Tensor | None = None
    """Mask of the text as it entered the present layer."""
    text_map: Reduction | None = None
    image_map: Reduction | None = None
    image_reduction: Reduction | None = None
    """Waits for the image side of the present layer."""
    text_key: Tensor | None = None
    text_states: Tensor | None = None
    """What looks at the image in the present layer."""
    seen: CrossModal | None = None
    reduced: Tensor | None = None
    known: list[tuple[Tensor, bool]] = field(default_factory=list)
    joined: Tensor | None = None

    def padded(self, mask: Tensor) -> bool:
        """Whether some place of a mask is not in use; the device is asked once for each mask."""
        for seen, answer in self.known:
            if seen is mask:
                return answer
        self.known.append((mask, not bool((mask > 0).all())))
        return self.known[-1][1]

    def joint_mask(self) -> Tensor:
        """(B, L + N), text before image."""
        assert self.image_mask is not None
        if self.joined is None:
            self.joined = torch.cat([self.text_mask, self.image_mask.to(self.text_mask.dtype)], 1)
        return self.joined

    def images(self, count: int, like: Tensor) -> Tensor:
        """(B, N) bool; nothing is padding until something else is known."""
        if self.image_mask is None:
            self.image_mask = torch.ones(like.shape[0], count, dtype=torch.bool, device=like.device)
        return self.image_mask

    def enter(self) -> None:
        assert self.image_mask is not None
        self.trace.visual.append((self.image_mask > 0).sum(1))
        self.trace.text.append((self.text_mask > 0).sum(1))
        self.text_before = self.text_mask

    def reduce(self, method: EncoderMethod, layer: int) -> tuple[Reduction | None, Reduction | None]:
        assert self.seen is not None
        image, text = method.reduce(self.seen)
        self.seen = self.text_key = self.text_states = self.joined = None
        if image is not None:
            self.image_mask = image.mask
            self.image_map = image if self.image_map is None else self.image_map.then(image)
        if text is not None:
            self.text_mask = text.mask
            self.text_map = text if self.text_map is None else self.text_map.then(text)
        if self.image_map is not None:
            self.trace.places[layer] = self.image_map.origin()
        return image, text


def _routed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    return module.__dict__[_LISTENER](module, query, key, value, attention_mask, **kwargs)


class EncoderSession(Session):
    """One method at work in one encoder-style VLM.

    Attributes:
        trace: an `EncoderTrace` of the calling thread's last pass; None before the first.

    Raises:
        UnsupportedError: the model is of another kind, has a session already, or its head needs every text token.
    """

    def __init__(self, model: nn.Module, reducer: EncoderMethod):
        self.anatomy = resolve_encoder(model)
        self.layers = reducer.encoder_layers(self.anatomy)
        beyond = [layer for layer in self.layers if not 0 <= layer < self.anatomy.depth]
        if beyond:
            raise OptionError(f"layer {beyond[0]} does not exist, the model has {self.anatomy.depth} (from 0 on)")
        name = type(model).__name__
        if self.layers and reducer.merges_text(self.anatomy) and name.endswith(_READS_TEXT):
            raise UnsupportedError(f"{name} needs a state for every text token; use merge_text=0")
        super().__init__(self.anatomy.base)
        self.reducer = reducer
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    @property
    def traces(self) -> list[EncoderTrace]:
        """One record for each pass of the calling thread's last call of the model."""
        if not hasattr(self._local, "traces"):
            self._local.traces = []
        return self._local.traces

    @property
    def _pass(self) -> _Pass | None:
        return getattr(self._local, "running", None)

    @_pass.setter
    def _pass(self, running: _Pass | None) -> None:
        self._local.running = running

    def begin(self, text_mask: Tensor, image_mask: Tensor | None = None, maps: bool = False) -> None:
        """Start a pass; the model does so itself. For layers that are called on their own.

        Args:
            text_mask: (B, L), 1 for text.
            image_mask: (B, N), or None: no padding.
            maps: the caller wants attention maps.
        """
        text_mask = text_mask if self.reducer.faithful else text_mask > 0
        running = _Pass(text_mask, None if image_mask is None else image_mask > 0, maps)
        self._pass = running
        self.traces.append(running.trace)
        self._record(running.trace)

    # ------------------------------------------------------------------------------------------------ installing
    def _install(self) -> None:
        parts, base, undo = self.anatomy, self.anatomy.base, self._undo
        if parts.model is not base:
            undo.pre_hook(parts.model, self._model_called)
            undo.hook(parts.model, self._model_done, always_call=True)
        undo.pre_hook(base, self._base_called, with_kwargs=True)
        undo.hook(base, self._base_done, always_call=True)
        if parts.joint:
            undo.hook(base.embeddings, self._embedded)
            self._watch_patches(base.embeddings)
        for i, layer in enumerate(parts.text_layers):
            undo.pre_hook(layer, self._layer_called, with_kwargs=True)
            if not self.layers:
                continue
            if parts.joint:
                self._install_joint(i, layer)
            else:
                self._install_cross(i, layer, parts.image_layers[i])
        for name in ("text", "image") if self.layers else ():
            towers = getattr(base, f"cross_modal_{name}_link_tower", None)
            for tower in towers if isinstance(towers, nn.ModuleList) else [towers] if towers is not None else []:
                undo.pre_hook(tower, functools.partial(self._bridge, name))
        undo.copied(parts.model, base)

    def _watch_patches(self, embeddings: Any) -> None:
        embed = embeddings.visual_embed

        @functools.wraps(embed)
        def watched(*args: Any, **kwargs: Any) -> Any:
            embedded = embed(*args, **kwargs)
            self._local.patches = embedded[2][0]
            return embedded

        self._undo.set(embeddings, "visual_embed", watched)

    def _install_joint(self, index: int, layer: Any) -> None:
        attention = layer.attention.attention
        self._undo.set(attention, "forward", functools.partial(self._joint_attention, index, attention))
        if index in self.layers:
            self._undo.pre_hook(layer.layernorm_after, functools.partial(self._between, index))
            self._undo.pre_hook(layer.output, self._residual)

    def _install_cross(self, index: int, text_layer: Any, image_layer: Any) -> None:
        for side, layer in (("text", text_layer), ("image", image_layer)):
            for kind in ("attention", "crossattention"):
                self._route(getattr(layer, kind).self, functools.partial(self._cross_attention, index, side, kind))
        if index in self.layers:
            self._undo.pre_hook(text_layer.crossattention, self._text_looks)
            self._undo.hook(text_layer.crossattention, functools.partial(self._crossed, index))
            self._undo.pre_hook(image_layer, self._image_layer_called, with_kwargs=True)

    def _route(self, module: Any, listener: Callable[..., Any]) -> None:
        if _ROUTE not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(_ROUTE, _routed)
        routed = copy.copy(module.config)
        routed._attn_implementation_internal = _ROUTE
        self._undo.set(module, "config", routed)
        self._undo.set(module, _LISTENER, listener)

    # ----------------------------------------------------------------------------------------------- one call
    def _model_called(self, module: nn.Module, args: tuple) -> None:
        if self._begin("model"):
            self._local.traces = []

    def _model_done(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._end("model")

    def _base_called(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._begin("base"):
            return
        if torch.compiler.is_compiling():
            raise UnsupportedError("token reduction depends on the data; call the model without torch.compile")
        layers = (*self.anatomy.text_layers, *self.anatomy.image_layers)
        if module.training and any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
            raise UnsupportedError("gradient checkpointing runs layers twice; switch it off to reduce tokens")
        if module is self.anatomy.model:
            self._local.traces = []
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        wanted = given.get("output_attentions")
        maps = bool(getattr(module.config, "output_attentions", False) if wanted is None else wanted)
        if self.anatomy.joint:
            self._local.maps = maps
            return
        mask, ids = given.get("attention_mask"), given.get("input_ids")
        if mask is None and ids is not None:
            mask = torch.ones_like(ids)
        if mask is not None:
            self.begin(mask, None, maps)

    def _embedded(self, module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> None:
        if self._closed:
            return
        length = args[1].shape[1]
        self.begin(output[1][:, :length], output[1][:, length:], getattr(self._local, "maps", False))
        self.traces[-1].patches, self._local.patches = self._local.patches, None

    def _base_done(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._pass = None
        self._end("base")

    def _layer_called(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._pass is None:
            return
        if not self.anatomy.joint:
            image = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
            self._pass.images(image.shape[1], image)
        self._pass.enter()

    # --------------------------------------------------------------------------------------------- single stream
    def _joint_attention(
        self, index: int, module: Any, hidden_states: Tensor, attention_mask: Any = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        now, official = self._pass, self.reducer.faithful
        if now is None:
            return type(module).forward(module, hidden_states, attention_mask, output_attentions)
        assert now.image_mask is not None
        shape = (*hidden_states.shape[:2], -1, module.attention_head_size)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (module.query, module.key, module.value)
        )
        mask, length = now.joint_mask(), now.text_mask.shape[1]
        scaling, dropout = module.attention_head_size**-0.5, module.dropout.p if module.training else 0.0
        out, weights = attend(query, key, value, mask, now.padded(mask), scaling, dropout, official, output_attentions)
        if index in self.layers:
            keys = key.mean(1)

            def rows(one_head: bool) -> Tensor:
                if official and weights is not None:
                    return weights[:, : 1 if one_head else None, :length, length:]
                return text_rows(query[:, :, :length], key, mask, scaling, length, one_head)

            now.seen = CrossModal(
                now.text_mask, now.image_mask, keys[:, :length], keys[:, length:], query[:, :, :length].mean(1),
                lambda: keys[:, :length], rows, self.anatomy,
            )  # fmt: skip
        out = out.reshape(*hidden_states.shape[:2], -1)
        return (out, weights) if output_attentions and weights is not None else (out,)

    def _between(self, index: int, module: nn.Module, args: tuple) -> tuple | None:
        """Before the MLP's norm: fewer tokens enter."""
        now = self._pass
        if now is None:
            return None
        hidden, length = args[0], now.text_mask.shape[1]
        image, text = now.reduce(self.reducer, index)
        if image is None and text is None:
            return None
        parts = (hidden[:, :length], text), (hidden[:, length:], image)
        now.reduced = torch.cat([x if reduction is None else reduction.apply(x) for x, reduction in parts], 1)
        return (now.reduced, *args[1:])

    def _residual(self, module: nn.Module, args: tuple) -> tuple | None:
        """The MLP's output is added to the tokens that entered it."""
        now = self._pass
        if now is None or now.reduced is None:
            return None
        reduced, now.reduced = now.reduced, None
        return (args[0], reduced, *args[2:])

    # ----------------------------------------------------------------------------------------------- co-attention
    def _cross_attention(
        self, index: int, side: str, kind: str, module: Any, query: Tensor, key: Tensor, value: Tensor,
        attention_mask: Any, dropout: float = 0.0, scaling: float | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        now = self._pass
        if now is None:
            raise UnsupportedError("a layer of this model was called on its own; call the model, or begin() first")
        to_text = (side == "text") == (kind == "attention")
        masks = (now.text_mask, now.text_before) if to_text else (now.image_mask,)
        # A text that merged is shorter, so its length tells which of the two the image looks at.
        mask = next(mask for mask in masks if mask is not None and mask.shape[1] == key.shape[2])
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        official = self.reducer.faithful
        out, weights = attend(query, key, value, mask, now.padded(mask), scaling, dropout, official, now.maps)
        if side == "text" and index in self.layers:
            if kind == "attention":
                now.text_key = key.mean(1)
            else:
                self._see(module, now, query, key, mask, scaling, weights if official else None)
        return out.contiguous(), weights

    def _see(
        self, module: Any, now: _Pass, query: Tensor, key: Tensor, mask: Tensor, scaling: float, weights: Tensor | None
    ) -> None:
        assert now.text_key is not None

        def rows(one_head: bool) -> Tensor:
            if weights is not None:
                return weights[:, :1] if one_head else weights
            return text_rows(query, key, mask, scaling, 0, one_head)

        def score_key() -> Tensor:
            assert now.text_states is not None
            return module.key(now.text_states).unflatten(2, (-1, query.shape[-1])).mean(2)

        now.seen = CrossModal(
            now.text_mask, mask, now.text_key, key.mean(1), query.mean(1), score_key, rows, self.anatomy
        )

    def _text_looks(self, module: nn.Module, args: tuple) -> None:
        if self._pass is not None:
            self._pass.text_states = args[0]

    def _crossed(self, index: int, module: nn.Module, args: tuple, output: tuple) -> tuple | None:
        """After the text has looked at the image, before its MLP."""
        now = self._pass
        if now is None:
            return None
        now.image_reduction, text = now.reduce(self.reducer, index)
        return None if text is None else (text.apply(output[0]), *output[1:])

    def _image_layer_called(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        now = self._pass
        if now is None or now.image_reduction is None:
            return None
        reduction, now.image_reduction = now.image_reduction, None
        if args:
            return (reduction.apply(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": reduction.apply(kwargs["hidden_states"])}

    def _bridge(self, name: str, module: nn.Module, args: tuple) -> tuple | None:
        """BridgeTower adds states of its single-modality towers, whose tokens go where those before them went."""
        now = self._pass
        reduction = None if now is None else now.text_map if name == "text" else now.image_map
        return None if reduction is None else (reduction.apply(args[0]), *args[1:])
