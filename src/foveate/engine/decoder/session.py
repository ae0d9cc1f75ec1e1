"""A method in a model whose images stand as tokens in the sequence of a decoder.

Forward hooks on the model, the decoder and its layers, instance attributes over methods of the model (`generate`,
`get_placeholder_mask`, `get_*_features`) and attention taps. What a running call knows is a `Call`, one for a thread.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...reduction import BEFORE_LAYERS, OptionError, Reducer, UnsupportedError, bind
from ..compat import check_checkpointing, given_cache
from ..families.parts import Anatomy, resolve
from ..families.tower import check_traceable
from ..layout import build_layout
from ..session import Session
from ..vision.merging import TowerReduction
from ..vision.reader import VisionReader
from .cache import check_cache
from .call import Call, carries_images, chunk_size, prompt_length, refuse_packing, tokens_of
from .ends import Ends
from .forward_pass import ForwardPass
from .hooks import PassingHooks
from .lane import laid_out
from .short_prompt import ShortPrompt, learn
from .slots import checked_visual, required_slots, visual_slots
from .stages import Stages
from .steps import Steps
from .taps import places_of, tap_attention
from .watchers import short_between, show_whole_prompt

__all__ = ["DecoderSession"]

_CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class DecoderSession(Session):
    """One method at work in one decoder, or in the decoder of one vision-language model.

    Attributes:
        anatomy: the parts of the model.
        trace: see `Trace`.
    """

    def __init__(self, model: nn.Module, reducer: Reducer, *, visual: Tensor | None = None):
        if not (hasattr(reducer, "decide") and hasattr(reducer, "stages")):
            raise OptionError(f"{type(reducer).__name__} is not a Reducer: it needs stages and decide(view)")
        self.given = checked_visual(visual)
        numbered = self.given is not None and self.given.dtype == torch.long
        self.anatomy = replace(resolve(model, text_only=visual is not None), numbered=numbered)
        self._facts = self.anatomy.without_weights()  # a kept trace must not keep the model
        super().__init__(self.anatomy.decoder)
        self._local = _OfThread()
        self._vision: VisionReader | None = None
        self._tower: TowerReduction | None = None
        try:
            self.reducer = bind(reducer, self.anatomy)
            _check(self.reducer, self.anatomy)
            self._install()
        except BaseException:
            self.remove()
            raise

    @property
    def _call(self) -> Call:
        """The calling thread's own."""
        return self._local.call

    def _end(self, what: str) -> bool:
        outermost = super()._end(what)
        if outermost:  # nothing of a finished call is kept but its trace
            self._local.call = Call()
            self._layers.take_out()
            for part in (self._vision, self._tower):
                if part is not None:
                    part.clear()
        return outermost

    def _finish(self, what: str, output: Any) -> Any:
        """The model, its base or its decoder is done; the last of them hands out ordinary tensors.

        But for logits beside a loss: they are the largest tensor of a training step, and hardly ever looked at.
        """
        labels, self._call.labels = self._call.labels, None
        self._end(what)
        if self._runs() <= {"generate"}:
            self._ends.take_out()
            return laid_out(output, but=None if labels is None else "logits")
        self._call.labels = labels
        return output

    # ------------------------------------------------------------------------------------------------ installing
    def _install(self) -> None:
        parts, undo, reducer = self.anatomy, self._undo, self.reducer
        self._layers = PassingHooks(undo, parts.layers, self._layer_called, self._layer_done)
        self._steps = Steps(undo, parts, self._layers, lambda: self._call)
        self._ends = Ends(undo, parts, lambda: self._call)
        undo.pre_hook(parts.model, self._model_called, with_kwargs=True)
        undo.hook(parts.model, self._model_done, always_call=True)
        if parts.base is not parts.model:
            undo.pre_hook(parts.base, self._base_called, with_kwargs=True)
            undo.hook(parts.base, self._base_done, always_call=True)
        undo.pre_hook(parts.decoder, self._decoder_called, with_kwargs=True)
        undo.hook(parts.decoder, self._decoder_done, always_call=True)
        self._places = places_of(reducer, parts)
        read = {self._places.get(stage, stage) for stage, spec in reducer.taps.items() if spec.queries is not None}
        for i in sorted(read):
            tap_attention(undo, parts.attention(i), functools.partial(self._attending, i))
        if reducer.vision_taps:
            self._vision = VisionReader(parts, dict(reducer.vision_taps))
            self._vision.install(undo)
        tower = getattr(reducer, "tower", None)
        if tower is not None and parts.vision is not None:
            check_traceable(parts)
            self._tower = TowerReduction(parts.vision, tower, parts.vision_layer)
            self._tower.install(undo)
        self._wrap(parts.model, "generate", self._watch_generate)
        self._wrap(parts.base, "get_placeholder_mask", self._watch_placeholders)
        for name in ("get_image_features", "get_video_features"):
            self._wrap(parts.base, name, self._watch_features)
        for name in _CONTINUOUS_BATCHING:
            self._wrap(parts.model, name, self._refuse_batching)
        for module in {
            id(m): m for m in (parts.model, parts.base, parts.decoder, parts.vision) if m is not None
        }.values():
            undo.copied(module)

    def _wrap(self, module: nn.Module, name: str, watch: Callable[[Callable], Callable]) -> None:
        """Put a watching function over a method of the instance, whoever else has wrapped it before."""
        method = getattr(module, name, None)
        if method is not None:
            # functools.wraps keeps the signature, which generate() inspects to find out what to pass.
            self._undo.set(module, name, functools.wraps(method)(watch(method)))

    # ---------------------------------------------------------------------------------------- what the model is asked
    def _watch_generate(self, generate: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self._begin("generate"):
                return generate(*args, **kwargs)
            try:
                self._record(None)
                call = self._call
                call.generating, call.prompt = True, prompt_length(args, kwargs)
                call.chunk = chunk_size(self.anatomy.model, kwargs)
                if call.chunk and carries_images(kwargs):
                    raise _chunks(call.chunk)
                if self.anatomy.own_generate and self.given is None and kwargs.get("input_ids") is not None:
                    call.round_forward = self.anatomy.placeholders_in(kwargs)
                return generate(*args, **kwargs)
            finally:
                self._end("generate")

        return watched

    def _refuse_batching(self, method: Callable) -> Callable:
        def refused(*args: Any, **kwargs: Any) -> Any:
            if self._closed:
                return method(*args, **kwargs)
            raise UnsupportedError(
                f"{method.__name__}: continuous batching keeps a paged cache of its own, in which nothing can be "
                "removed; call generate() with a batch"
            )

        return refused

    def _watch_placeholders(self, get_placeholder_mask: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            found = get_placeholder_mask(*args, **kwargs)
            if self._closed:
                return found
            call = self._call
            slots = self.anatomy.visual_of(found, kwargs.get("input_ids", args[0] if args else None))
            if slots is not None:
                call.placeholders = slots if call.placeholders is None else call.placeholders | slots
            return found

        return watched

    def _watch_features(self, get_features: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            call = self._call
            if call.encoding or not self._begin("features"):  # a video encoder that calls the image encoder
                return get_features(*args, **kwargs)
            is_video = get_features.__name__ == "get_video_features"
            call.encoding = True
            try:
                for part in (self._vision, self._tower):
                    if part is not None:
                        part.begin(is_video)
                with self._tower.blamed(self.anatomy.model) if self._tower else contextlib.nullcontext():
                    features = get_features(*args, **kwargs)
                given = dict(zip(inspect.signature(get_features).parameters, args)) | kwargs
                call.features.update({name: value for name, value in given.items() if value is not None})
                pooled = getattr(features, "pooler_output", features)
                if pooled is None:  # Llama 4 pools in its tower
                    pooled = features.last_hidden_state
                call.features["video_features" if is_video else "image_features"] = pooled
                return features
            finally:
                call.encoding = False
                self._end("features")

        return watched

    def _model_called(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module is self.anatomy.base:
            self._base_called(module, args, kwargs)
        elif self._begin("model"):
            self._call.labels = kwargs.get("labels")

    def _model_done(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if module is self.anatomy.base:
            return self._base_done(module, args, output)
        if self._closed:
            return None
        return self._finish("model", output)

    def _base_called(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        _refuse_compiling()
        if not self._begin("base"):
            return
        call = self._call
        call.placeholders, call.forward_pass, call.reduced, call.inside = None, None, False, True
        ids = kwargs.get("input_ids", args[0] if args else None)
        call.given = {**kwargs, "input_ids": ids}
        unseen = self.given is None and self.anatomy.placeholders_by_id
        if unseen and carries_images(kwargs):
            call.placeholders = self.anatomy.placeholders_in(call.given)

    def _base_done(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self._closed:
            return None
        call = self._call
        unseen = output is not None and carries_images(call.given) and not call.reduced
        if unseen and call.placeholders is not None:  # Phi-4-multimodal is handed the prompt's pixels at every step
            unseen = bool(call.placeholders.any())
        call.given, call.placeholders, call.inside = {}, None, False
        output = self._finish("base", output)
        if unseen:
            raise UnsupportedError(
                f"{type(self.anatomy.model).__name__} was given images, but its decoder was never shown where they "
                "stand, so nothing was removed (is forward or get_placeholder_mask replaced?); "
                "say it by visual=BoolTensor (B, S)"
            )
        return output

    # ------------------------------------------------------------------------------------------------- the decoder
    def _decoder_called(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        _refuse_compiling()
        if not self._begin("decoder"):
            return None
        call = self._call
        call.forward_pass = None
        inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            inputs = kwargs.get("input_ids", args[0] if args else None)
        if inputs is None:
            return None
        rows, length = inputs.shape[:2]
        cache = given_cache(args, kwargs)
        past = int(cache.get_seq_length()) if cache is not None else 0
        visual, items = visual_slots(self.anatomy, self.given, call, rows, length, past, kwargs)
        if visual is None:
            positions = self._text_called(cache, rows, length, past, inputs.device)
            return None if positions is None else (args, {**kwargs, "position_ids": positions})
        check_cache(cache)
        check_checkpointing(self.anatomy.base.modules())
        if call.chunk:
            raise _chunks(call.chunk)
        given = {**kwargs, **call.given}
        tokens = tokens_of(
            (call.given.get("attention_mask"), kwargs.get("attention_mask")), rows, length, inputs.device
        )
        if not call.generating:
            refuse_packing(given if call.inside else kwargs, tokens)
        visual = visual.to(inputs.device)
        info = {**call.features, **{name: value for name, value in call.given.items() if value is not None}}
        groups = None if self._tower is None else self._tower.groups(self.anatomy, visual, info)
        call.reduced = True
        stages = Stages(
            self.anatomy, self.reducer, visual, tokens[:, : visual.shape[1]],
            build_layout(self._facts, visual, info, items), info, self._vision, groups, self._places,
        )  # fmt: skip
        required = required_slots(call.labels, visual, length)
        now = ForwardPass(
            self.anatomy, rows, length, past, tokens, stages, cache, self._short_between, required,
            kwargs.get("inputs_embeds"), kwargs.get("position_ids") is not None, call.generating,
        )  # fmt: skip
        self._ends.put_in()
        short = ShortPrompt(now, self._undo.hooks)
        shortened = short.shortened(args, kwargs)
        if shortened is not None:
            call.short_prompt = short  # and no forward pass: hooks that another thread puts in are none of ours
            return args, shortened
        call.forward_pass = now
        self._layers.put_in()
        shared = min(self.anatomy.shared_keys, default=self.anatomy.depth)
        if "logits_to_keep" in kwargs and any(self._places.get(s, s) >= shared for s in self.reducer.stages):
            return args, {**kwargs, "logits_to_keep": 0}  # else these stages would be shown the last tokens only
        return None

    def _text_called(self, cache: Any, rows: int, length: int, past: int, device: torch.device) -> Tensor | None:
        call = self._call
        if not call.generating and (not past or length > 1):
            self._record(None)
        return self._steps.begin(cache, rows, length, past, device)

    def _short_between(self) -> frozenset[int]:
        return short_between(self.anatomy, self._undo.hooks)

    def _decoder_done(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self._closed:
            return None
        call = self._call
        done, call.forward_pass = call.forward_pass, None
        short, call.short_prompt = call.short_prompt, None
        if short is not None and output is not None:
            output, done = short.lengthened(output), short.now
        elif done is not None and done.uniform:
            learn(done, output)
        self._steps.end()
        if not call.keep_hooks:
            self._layers.take_out()
        if output is None and done is not None:
            done.give_up()
        trace = done.finish() if done is not None and output is not None else None
        if trace is not None and self._tower is not None:
            trace.tower = list(self._tower.calls)
        if trace is not None:
            self._record(trace)
        if done is not None and done.first_frame is not None:
            show_whole_prompt(output, done.first_frame)
        return self._finish("decoder", output)

    # --------------------------------------------------------------------------------------------------- the layers
    def _layer_called(self, layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> Any:
        now = self._local.call.forward_pass
        return None if now is None or kwargs is None else now.enter(layer, module, args, kwargs)

    def _layer_done(self, layer: int, module: nn.Module, args: tuple, output: Any) -> Any:
        now = self._local.call.forward_pass
        return None if now is None else now.leave(layer, output)

    def _attending(self, layer: int, *call: Any) -> None:
        now = self._call.forward_pass
        if now is not None:
            now.listen(layer, *call)


class _OfThread(threading.local):
    """What belongs to one thread."""

    def __init__(self) -> None:
        self.call = Call()


def _refuse_compiling() -> None:
    if torch.compiler.is_compiling():
        raise UnsupportedError("token reduction depends on the data; call the model without torch.compile")


def _chunks(size: int) -> UnsupportedError:
    return UnsupportedError(
        f"prefill_chunk_size={size} feeds the prompt in chunks, but a method has to see all of it; leave it out"
    )


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
