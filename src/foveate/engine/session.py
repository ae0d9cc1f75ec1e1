"""`apply`: a method goes into a model, and comes out again without a trace.

Official forward hooks on the decoder and its layers, instance attributes over three methods of the model
(`generate`, `get_placeholder_mask`, `get_*_features`) and attention taps; `Session.remove` takes all of them back.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..reduction import BEFORE_LAYERS, OptionError, Reducer, UnsupportedError, bind
from .compat import given_cache
from .cross_modal.session import EncoderMethod, EncoderSession
from .decoder.cache import LogicalLayer, check_cache
from .decoder.forward_pass import ForwardPass
from .decoder.taps import AttentionTap
from .families.parts import Anatomy, resolve
from .layout import build_layout
from .trace import Trace
from .vision.encoder import PlainSession, find_encoder
from .vision.merging import TowerReduction
from .vision.reader import VisionReader

try:  # private: asked only whether somebody collects hidden states in this call
    from transformers.utils.output_capturing import _active_collector as _collector
except ImportError:  # pragma: no cover
    _collector: Any = None  # type: ignore[no-redef]

__all__ = ["Session", "apply"]

_MARK = "_foveate_session"


def apply(model: nn.Module, reducer: Reducer, *, visual: Tensor | None = None) -> Any:
    """Reduce the visual tokens of a model, until the returned session is left or removed.

    Example:
        with foveate.apply(model, foveate.SparseVLM(keep=192)) as session:
            output = model.generate(**inputs)

    Args:
        model: any Hugging Face vision-language model; with `visual`, any Hugging Face decoder; a vision encoder.
        reducer: the method.
        visual: (B, S) bool, the visual slots of the prompt, for a VLM of your own around a text decoder that is fed
            with `inputs_embeds`.

    Returns:
        The session; a context manager. `session.trace` describes the last prefill. A `Session`, or an `EncoderSession`
        for methods that work inside encoder-style models (PuMer), or a `PlainSession` for ToMe, PiToMe and Downsample
        in a vision encoder on its own (ViT, CLIP, SigLIP).

    Raises:
        UnsupportedError: the model has no images to reduce, has a session already, or cannot do what the method asks.
        OptionError: the method asks for a layer that the model does not have.
    """
    if isinstance(reducer, EncoderMethod):
        if visual is not None:
            raise OptionError("visual= is for decoders; this method works inside encoders")
        return EncoderSession(model, reducer)
    encoder = None if visual is not None else find_encoder(model)
    if encoder is not None:
        return PlainSession(model, encoder, reducer)
    return Session(model, reducer, visual=visual)


class Session:
    """One method at work in one model. Made by `apply`; not thread-safe.

    Attributes:
        reducer: the method as bound to this model, a copy of the one that was given.
    """

    def __init__(self, model: nn.Module, reducer: Reducer, *, visual: Tensor | None = None):
        if not (hasattr(reducer, "decide") and hasattr(reducer, "stages")):
            raise OptionError(f"{type(reducer).__name__} is not a Reducer: it needs stages and decide(view)")
        if visual is not None and not (isinstance(visual, Tensor) and visual.dtype == torch.bool and visual.dim() == 2):
            raise OptionError("visual= must be a BoolTensor (B, S)")
        anatomy = resolve(model, text_only=visual is not None)
        if _MARK in anatomy.decoder.__dict__:
            raise UnsupportedError("a session is applied to this model already; remove it first, or use foveate.Chain")
        reducer = bind(reducer, anatomy)
        _check(reducer, anatomy)
        self.anatomy, self.reducer, self.given = anatomy, reducer, visual
        self.trace: Trace | None = None
        self._handles: list[Any] = []
        self._taps: list[AttentionTap] = []
        self._patched: list[tuple[nn.Module, str]] = []
        self._pass: ForwardPass | None = None
        self._placeholders: Tensor | None = None
        self._labels: Tensor | None = None
        self._prompt: int = 0
        self._called: dict[str, Any] = {}
        self._features: dict[str, Any] = {}
        self._encoding = False
        self._vision: VisionReader | None = None
        self._tower: TowerReduction | None = None
        self._installed = False
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Give the model back as it was. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        for tap in self._taps:
            tap.remove()
        for module, name in self._patched:
            module.__dict__.pop(name, None)
        if self._vision is not None:
            self._vision.remove()
        if self._tower is not None:
            self._tower.remove()
            self._tower = None
        self._handles, self._taps, self._patched = [], [], []
        self._pass, self._features, self._called, self._vision = None, {}, {}, None
        if self._installed:
            self.anatomy.decoder.__dict__.pop(_MARK, None)
            self._installed = False

    # ------------------------------------------------------------------------------------------------ installing
    def _install(self) -> None:
        parts, hook = self.anatomy, self._handles.append
        parts.decoder.__dict__[_MARK] = self
        self._installed = True
        hook(parts.model.register_forward_pre_hook(self._model_called, with_kwargs=True))
        hook(parts.model.register_forward_hook(self._model_done, always_call=True))
        if parts.base is not parts.model:
            hook(parts.base.register_forward_pre_hook(self._base_called, with_kwargs=True))
        hook(parts.decoder.register_forward_pre_hook(self._decoder_called, with_kwargs=True))
        hook(parts.decoder.register_forward_hook(self._decoder_done, always_call=True))
        for i, layer in enumerate(parts.layers):
            enter, leave = functools.partial(self._layer_called, i), functools.partial(self._layer_done, i)
            hook(layer.register_forward_pre_hook(enter, with_kwargs=True))
            # First in line, so that every other hook sees the full frame.
            hook(layer.register_forward_hook(leave, prepend=True))
        self._ours = {handle.id for handle in self._handles}
        for i in self.reducer.taps:
            self._taps.append(AttentionTap(parts.attention(i), functools.partial(self._attending, i)))
        if self.reducer.vision_taps:
            self._vision = VisionReader(parts, dict(self.reducer.vision_taps))
            self._vision.install()
        tower = getattr(self.reducer, "tower", None)
        if tower is not None and parts.vision is not None:
            self._tower = TowerReduction(parts.vision, tower, parts.vision_layer).install()
        self._patch(parts.model, "generate", self._watch_generate)
        self._patch(parts.base, "get_placeholder_mask", self._watch_placeholders)
        for name in ("get_image_features", "get_video_features"):
            self._patch(parts.base, name, self._watch_features)

    def _patch(self, module: nn.Module, name: str, watch: Callable[[Callable], Callable]) -> None:
        method = getattr(module, name, None)
        if method is None or name in module.__dict__:
            return
        # functools.wraps keeps the signature, which generate() inspects to find out what to pass.
        module.__dict__[name] = functools.wraps(method)(watch(method))
        self._patched.append((module, name))

    # ---------------------------------------------------------------------------------------- what the model is asked
    def _watch_generate(self, generate: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else next(
                (kwargs[n] for n in ("inputs", "input_ids", "inputs_embeds") if kwargs.get(n) is not None), None
            )  # fmt: skip
            mask = kwargs.get("attention_mask")  # it spans the conversation, even if only a new turn's ids are given
            spanning = mask if isinstance(mask, Tensor) and mask.dim() == 2 else given
            self._prompt = spanning.shape[1] if isinstance(spanning, Tensor) else 0
            if self.anatomy.own_generate and self.given is None and kwargs.get("input_ids") is not None:
                self._placeholders = self.anatomy.find_placeholders(kwargs["input_ids"], None)
            try:
                return generate(*args, **kwargs)
            finally:
                self._prompt, self._features = 0, {}

        return watched

    def _watch_placeholders(self, get_placeholder_mask: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            found = get_placeholder_mask(*args, **kwargs)
            slots = self.anatomy.visual_of(found, kwargs.get("input_ids", args[0] if args else None))
            if slots is not None:
                self._placeholders = slots if self._placeholders is None else self._placeholders | slots
            return found

        return watched

    def _watch_features(self, get_features: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._encoding:  # a video encoder that calls the image encoder
                return get_features(*args, **kwargs)
            if self._vision is not None:
                self._vision.clear()
            if self._tower is not None:
                self._tower.clear()
            self._encoding = True
            try:
                features = get_features(*args, **kwargs)
            finally:
                self._encoding = False
            given = dict(zip(inspect.signature(get_features).parameters, args)) | kwargs
            is_video = get_features.__name__ == "get_video_features"
            self._features.update({name: value for name, value in given.items() if value is not None})
            self._features["video_features" if is_video else "image_features"] = getattr(
                features, "pooler_output", features
            )
            return features

        return watched

    def _model_called(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._labels = kwargs.get("labels")
        if module is self.anatomy.base:
            self._base_called(module, args, kwargs)

    def _model_done(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._labels = None

    def _base_called(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._placeholders, self._pass = None, None
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._called = {**kwargs, "input_ids": ids}
        images = (
            "pixel_values", "pixel_values_videos", "image_pixel_values", "mm_encoder_outputs", "image_hidden_states"
        )  # fmt: skip
        unseen = self.given is None and self.anatomy.placeholders_by_id
        if unseen and any(kwargs.get(name) is not None for name in images):
            self._placeholders = self.anatomy.find_placeholders(ids, kwargs.get("inputs_embeds"))

    # ------------------------------------------------------------------------------------------------- the decoder
    def _decoder_called(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._pass = None
        inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            inputs = kwargs.get("input_ids", args[0] if args else None)
        if inputs is None:
            return
        rows, length = inputs.shape[:2]
        cache = given_cache(args, kwargs)
        past = int(cache.get_seq_length()) if cache is not None else 0
        visual = self._visual_slots(rows, length, past)
        if visual is None:
            reduced = cache is not None and any(
                isinstance(layer, LogicalLayer) for layer in getattr(cache, "layers", ())
            )
            if reduced:
                tokens = torch.ones(rows, length, dtype=torch.bool, device=inputs.device)
                self._pass = ForwardPass(self.anatomy, self.reducer, rows, length, past, tokens, cache=cache)
            return
        if torch.compiler.is_compiling():
            raise UnsupportedError("token reduction depends on the data; call the model without torch.compile")
        check_cache(cache)
        visual = visual.to(inputs.device)
        info = {**self._features, **{name: value for name, value in self._called.items() if value is not None}}
        if self._tower is not None:
            info["tower_groups"] = self._tower.groups(self.anatomy, visual, info)
        self._pass = ForwardPass(
            self.anatomy, self.reducer, rows, length, past, self._tokens(kwargs, rows, length, inputs.device), visual,
            build_layout(self.anatomy, visual, info), info, self._vision, cache, self._exclusive,
            self._required(visual, length),
        )  # fmt: skip

    def _visual_slots(self, rows: int, length: int, past: int) -> Tensor | None:
        """(B, P) bool for a prefill with images, cut to the prompt; else None."""
        if self.given is not None:
            if past:
                return None
            if self.given.shape[1] > length or rows % self.given.shape[0]:
                raise UnsupportedError(
                    f"visual= is {tuple(self.given.shape)}, but the decoder was called with ({rows}, {length}) slots"
                )
            return self.given.repeat_interleave(rows // self.given.shape[0], 0)
        slots = self._placeholders
        if slots is not None and slots.shape[1] == length and rows % slots.shape[0] == 0:
            slots = slots.repeat_interleave(rows // slots.shape[0], 0)  # beams of a generate() that goes round forward
        if slots is None or slots.shape != (rows, length) or not bool(slots.any()):
            return None
        return slots[:, : min(length, self._prompt - past)] if self._prompt > past else slots

    def _tokens(self, kwargs: dict[str, Any], rows: int, length: int, device: torch.device) -> Tensor:
        """(B, S) bool, not padding, from the 2-D attention mask the model or the decoder was called with."""
        for mask in (self._called.get("attention_mask"), kwargs.get("attention_mask")):
            if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == rows and mask.shape[1] >= length:
                return mask[:, -length:].bool().to(device)
        return torch.ones(rows, length, dtype=torch.bool, device=device)

    def _required(self, visual: Tensor, length: int) -> Tensor | None:
        """Slots from which a label is predicted must stay: (B, S) bool, None without labels."""
        labels = self._labels
        if not isinstance(labels, Tensor) or labels.shape[1] != length:
            return None
        learnt = labels.to(visual.device) != -100
        if bool((learnt & visual).any()):
            raise ValueError("labels on image placeholders: set them to -100, the model cannot learn to predict them")
        return nn.functional.pad(learnt[:, 1:], (0, 1))

    def _exclusive(self) -> frozenset[int]:
        """Layers whose output only the next layer will see: their frame may be overwritten by it."""
        collected = _collector.get() if _collector is not None else {"hidden_states": []}
        watched_by_all = nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks
        if torch.is_grad_enabled() or watched_by_all or "hidden_states" in (collected or ()):
            return frozenset()
        layers = self.anatomy.layers
        return frozenset(
            i for i in range(len(layers) - 1) if not (self._watched(layers[i]) or self._watched(layers[i + 1]))
        )

    def _watched(self, layer: nn.Module) -> bool:
        hooks = {**layer._forward_hooks, **layer._forward_pre_hooks}
        # transformers leaves its recorder installed after the first use; whether it listens was asked above.
        return any(
            key not in self._ours and getattr(hook, "__name__", "") != "output_capturing_hook"
            for key, hook in hooks.items()
        )

    def _decoder_done(self, module: nn.Module, args: tuple, output: Any) -> Any:
        done, self._pass, self._placeholders = self._pass, None, None
        if not self._prompt:  # inside generate() the features of the prompt may be needed once more
            self._features = {}
        if done is None or done.trace is None or output is None:
            return None
        self.trace = done.finish()
        if self._tower is not None and self.trace is not None:
            self.trace.tower = list(self._tower.calls)
        states = getattr(output, "hidden_states", None)
        if states and done.first_frame is not None and states[0].shape[1] != done.length:
            # transformers records what layer 0 was given; callers expect the whole prompt there.
            output.hidden_states = (done.first_frame, *states[1:])
        return None

    # --------------------------------------------------------------------------------------------------- the layers
    def _layer_called(self, layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        return None if self._pass is None else self._pass.enter(layer, module, args, kwargs)

    def _layer_done(self, layer: int, module: nn.Module, args: tuple, output: Any) -> Any:
        return None if self._pass is None else self._pass.leave(layer, output)

    def _attending(self, layer: int, *call: Any) -> None:
        if self._pass is not None:
            self._pass.listen(layer, *call)


def _check(reducer: Reducer, anatomy: Anatomy) -> None:
    """Refuse layers that do not exist and positions that cannot be renumbered."""
    for member in getattr(reducer, "members", ()):
        _check(member, anatomy)
    kind, depth = type(reducer).__name__, anatomy.depth
    for stage in reducer.stages:
        if not BEFORE_LAYERS <= stage < depth:
            raise OptionError(
                f"{kind}: stage {stage} does not exist, the decoder has {depth} layers (0 to {depth - 1})"
            )
    for layer in reducer.taps:
        if layer not in reducer.stages or layer < 0:
            raise OptionError(f"{kind}: a tap in layer {layer} needs a stage after that layer")
    if reducer.positions not in ("keep", "renumber"):
        raise OptionError(f"{kind}: positions={reducer.positions!r}; use 'keep' or 'renumber'")
    if reducer.positions == "keep":
        return
    if anatomy.mrope or not hasattr(anatomy.decoder, "rotary_emb"):
        raise UnsupportedError(
            f"{type(anatomy.model).__name__}: positions={reducer.positions!r} needs one-axis RoPE; use positions='keep'"
        )
