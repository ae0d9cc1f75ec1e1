"""What `gpu.py` measures, and how one run of it is timed: models with random weights, methods, and their ceilings.

Nothing here is of one family: models come from `foveate.measure.random_models`, the ceiling inside a decoder is a loop
over its own layers.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

import foveate
from foveate.engine.compat import CACHE_NAME, returned_cache
from foveate.engine.families.parts import resolve
from foveate.measure.geometry import Geometry
from foveate.measure.launches import Launches, launches_of_choosing
from foveate.measure.random_models import RandomModel, random_model

MODELS = ("llava-1.5-7b", "qwen2.5-vl-7b", "qwen3-vl-8b")
_OPTIONS: dict[str, dict[str, Any]] = {"recoverable": {"similarity": "llm"}}
_ALSO = {f"{name} after the tower": (name, {"where": "output"}) for name in ("tome", "pitome")}
"""A second way to run a method that merges inside the tower, for towers in which it cannot."""

_SMALL_TEXT = {"layers": 4, "hidden_size": 128, "intermediate_size": 256, "heads": 4, "head_dim": 32, "vocab_size": 512}
_SMALL_QWEN = {"depth": 4, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 128}
_SMALL_VISION: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 56,
    },
    "qwen2.5-vl-7b": {**_SMALL_QWEN, "fullatt_block_indexes": [1, 3]},
    "qwen3-vl-8b": {**_SMALL_QWEN, "deepstack_visual_indexes": [0, 1, 2]},
}  # fmt: skip
SMALLER = 16
"""A small model has a 16th of the visual tokens."""


def methods(keep: float) -> dict[str, foveate.Reducer]:
    """Every method for images in a decoder, by name: those for videos, and for encoders such as ViLT, have no case."""
    made = {}
    for name in foveate.names():
        if name != "pumer" and "on videos" not in foveate.reduction.info(name).acts:
            made[name] = foveate.build(name, keep=keep, **_OPTIONS.get(name, {}))
    return made | {title: foveate.build(name, keep=keep, **options) for title, (name, options) in _ALSO.items()}


def draw(name: str, visual_tokens: int, small: bool) -> RandomModel:
    """A model of real geometry with a prompt of so many visual tokens, or its small likeness with fewer of both.

    The likeness has the family, all parts and all code of the model. Its weights are large for their width, so that a
    token that should be gone is seen in the logits.
    """
    drawn = random_model(name, visual_tokens=visual_tokens)
    if not small:
        return drawn
    family, shape = drawn._family, Geometry.preset(name)
    kv_heads = _SMALL_TEXT["heads"] // (1 if shape.kv_heads == shape.heads else 2)
    shape = dataclasses.replace(shape, **_SMALL_TEXT, kv_heads=kv_heads, text_tokens=40)
    vision, text, given, pixels = {**family.vision, **_SMALL_VISION[name]}, dict(family.text_options), {}, family.pixels
    if "image_grid_thw" in family.given:  # a quarter of the height, a quarter of the width
        frames, height, width = family.given["image_grid_thw"][0]
        given = {"image_grid_thw": [[frames, height // 4, width // 4]]}
        pixels = (pixels[0] // SMALLER, pixels[1])
        text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [4, 6, 6]}
    family = dataclasses.replace(family, vision=vision, text_options=text, given=given, pixels=pixels)
    drawn = RandomModel(shape.with_prompt(visual_tokens=visual_tokens // SMALLER), family)
    drawn.config.text_config.initializer_range = 0.15
    return drawn


# ----------------------------------------------------------------------------------------------------- one timed run
def wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _milliseconds(start: Any, end: Any) -> float:
    """Between two `_now`, after a `wait`."""
    return 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


@contextmanager
def _when_encoded(model: Any, seen: list[Any], device: torch.device) -> Iterator[None]:
    """Append the moment at which the images are encoded; inside a session, so that what that adds comes before."""
    base = resolve(model).base
    before, encode = base.__dict__.get("get_image_features"), base.get_image_features

    @functools.wraps(encode)
    def encoded(*args: Any, **kwargs: Any) -> Any:
        features = encode(*args, **kwargs)
        seen.append(_now(device))
        return features

    base.__dict__["get_image_features"] = encoded
    try:
        yield
    finally:
        base.__dict__.pop("get_image_features")
        if before is not None:
            base.__dict__["get_image_features"] = before


def _timed(
    model: Any, batch: int, steps: int, device: torch.device, prefill: Callable[[list[Any]], Any]
) -> dict[str, float]:
    """Milliseconds of a prefill, which appends the moment at which its images are encoded, and of `steps` tokens."""
    token, encoded = torch.full((batch, 1), 7, device=device), []
    gc.collect()
    gc.disable()
    try:
        wait(device)
        start = _now(device)
        logits, cache = prefill(encoded)
        first = _now(device)
        for _ in range(steps):
            model(input_ids=token, use_cache=True, **{CACHE_NAME: cache})
        end = _now(device)
        wait(device)
    finally:
        gc.enable()
    if not torch.isfinite(logits).all():
        raise ArithmeticError("logits are NaN or infinite")
    return {
        "ttft": _milliseconds(start, first),
        "prefill": _milliseconds(encoded[-1], first),
        "decode": _milliseconds(first, end) / steps,
    }


@torch.inference_mode()
def answer(
    model: Any, prompt: dict[str, Tensor], steps: int, reducer: foveate.Reducer | None = None
) -> tuple[dict[str, float], list[int] | None]:
    """One answer of a batch, in a session of its own if there is a method; opening it is not timed.

    Returns:
        Milliseconds: "ttft" from pixels to the first logits, "prefill" what of it comes after the encoder, "decode" per
        further step. And, of a method, the visual tokens that entered each layer (of the fullest row).
    """
    device = prompt["input_ids"].device

    def prefill(encoded: list[Any]) -> tuple[Tensor, Any]:
        with _when_encoded(model, encoded, device):
            output = model(**prompt, use_cache=True, logits_to_keep=1)
        return output.logits, returned_cache(output)

    with nullcontext() if reducer is None else foveate.apply(model, reducer) as session:
        times = _timed(model, len(prompt["input_ids"]), steps, device, prefill)
    return times, None if session is None else session.trace.visual_tokens.amax(0).tolist()


@torch.inference_mode()
def shorter(
    model: Any, prompt: dict[str, Tensor], embeds: Tensor, lengths: Sequence[int], steps: int
) -> dict[str, float]:
    """The plain model on prompts of `lengths` tokens, one number a layer: nothing can come out faster with its layers.

    The images are encoded as ever, and not used. All lengths equal: the model itself on a shorter prompt. Otherwise a
    loop over its layers, without what else its forward does.

    Args:
        embeds: (B, S, D), any prompt that is long enough.
    """
    images = {name: value for name, value in prompt.items() if name in ("pixel_values", "image_grid_thw")}

    def prefill(encoded: list[Any]) -> tuple[Tensor, Any]:
        with _when_encoded(model, encoded, embeds.device):
            resolve(model).base.get_image_features(**images)
        if len(set(lengths)) > 1:
            return _layer_by_layer(model, embeds, lengths)
        output = model(inputs_embeds=embeds[:, : lengths[0]], use_cache=True, logits_to_keep=1)
        return output.logits, returned_cache(output)

    return _timed(model, len(embeds), steps, embeds.device, prefill)


def _layer_by_layer(model: Any, embeds: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Any]:
    """What a fork written for one method would do at best."""
    anatomy = resolve(model)
    decoder, cache = anatomy.decoder, DynamicCache(config=anatomy.text_config)
    hidden = embeds[:, : lengths[0]]
    positions = torch.arange(lengths[0], device=embeds.device).expand(len(embeds), -1)
    rope = decoder.rotary_emb(hidden, positions.expand(3, -1, -1) if anatomy.mrope else positions)
    for layer, length in zip(decoder.layers, lengths):
        if length != hidden.shape[1]:
            index = torch.arange(length, device=embeds.device)  # a gather, as any selection needs
            hidden, rope = hidden.index_select(1, index), tuple(part.index_select(1, index) for part in rope)
        hidden = layer(hidden, position_embeddings=rope, use_cache=True, **{CACHE_NAME: cache})
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return model.lm_head(decoder.norm(hidden)[:, -1:]), cache


# ------------------------------------------------------------------------------------------------- kernels and waits
@torch.inference_mode()
def launches(model: Any, prompt: dict[str, Tensor], reducer: foveate.Reducer | None) -> dict[str, Any]:
    """What a prefill, a token, and a method's choice alone ask of the device."""
    device, found = prompt["input_ids"].device, {}
    kind = "cuda" if device.type == "cuda" else None
    token = torch.full((len(prompt["input_ids"]), 1), 7, device=device)
    prefill = functools.partial(model, **prompt, use_cache=True, logits_to_keep=1)
    with nullcontext() if reducer is None else foveate.apply(model, reducer):
        cache = returned_cache(prefill())
        step = functools.partial(model, input_ids=token, use_cache=True, **{CACHE_NAME: cache})
        step()  # what is found out once in a session does not count, here and in the prefill before
        for part, run in (("prefill", prefill), ("token", step)):
            with Launches(kind) as counted:
                run()
            found[part] = {"kernels": counted.kernels.total(), "waits": counted.waits.total(), **_profiled(run, device)}
    if reducer is not None:
        choice = launches_of_choosing(model, reducer, prefill, device=kind)
        found["choice"] = {"kernels": choice.kernels.total(), "waits": choice.waits.total()}
    return found


def _profiled(run: Callable[[], Any], device: torch.device) -> dict[str, int | None]:
    """Kernels, copies to the host and waits that torch.profiler saw on CUDA; None where it saw no kernel."""
    names = ("profiler_kernels", "profiler_copies_to_host", "profiler_waits")
    if device.type != "cuda":
        return dict.fromkeys(names)
    wait(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run()
        wait(device)  # cudaDeviceSynchronize, which is not counted below
    events = seen.events() or []
    on_device = [event.name for event in events if event.device_type == DeviceType.CUDA]
    kernels = sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)
    copies = sum(name.startswith("Memcpy DtoH") for name in on_device)
    waits = sum(event.name in ("cudaStreamSynchronize", "cudaEventSynchronize") for event in events)
    return dict(zip(names, (kernels, copies, waits))) if kernels else dict.fromkeys(names)
