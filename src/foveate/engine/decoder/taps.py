"""Reading attention as it passes, with whatever implementation the model runs (SDPA, FlashAttention, eager).

One attention module at a time is routed through a registered wrapper of its own implementation: only `module.config`
is replaced, by a shallow copy, so the mask builders keep seeing the real implementation's name.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...ops.attention import attention_rows
from ...ops.select import true_indices
from ...reduction import Reducer, Tap, TapSpec, UnsupportedError
from ..families.parts import Anatomy
from ..undo import Undo
from .masks import Reach

__all__ = ["choose_rows", "counted_from_first", "in_backward", "places_of", "read_rows", "tap_attention"]

_PREFIX = "foveate_tap:"
_LISTENERS = "_foveate_taps"


class _Routed(str):
    """The name of a registered wrapper; to a module that asks which implementation it runs, the real one.

    Sparse attention makes another mask for each (GLM-5), or none where a kernel takes indices.
    """

    def __new__(cls, real: str) -> _Routed:
        name = super().__new__(cls, _PREFIX + real)
        name.real = real
        return name

    real: str

    def __eq__(self, other: object) -> bool:
        return self.real == other or str.__eq__(self, other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _wrapper(
    real: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not in_backward():  # a checkpointed layer that runs again was read before
        with torch.no_grad():
            for listener in module.__dict__.get(_LISTENERS, ()):
                listener(module, query.detach(), key.detach(), attention_mask, kwargs)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(real, None)  # type: ignore[arg-type]
    if attention is None:  # eager attention lives in each modelling file
        attention = sys.modules[type(module).__module__].eager_attention_forward
    return attention(module, query, key, value, attention_mask, *args, **kwargs)


def tap_attention(undo: Undo, module: Any, listener: Callable[..., None]) -> None:
    """Call `listener(module, query, key, mask, kwargs)` whenever `module` attends, until `undo` is closed.

    What is read has no graph: reading and scoring are not trained, and a checkpointed layer must save the same tensors
    whether it is read or not. Several listeners are called in the order in which they came.
    """
    listeners = module.__dict__.get(_LISTENERS, ())
    if not listeners:
        real = module.config._attn_implementation or "eager"
        name = _Routed(real)
        if name not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(str(name), functools.partial(_wrapper, real))
        routed = copy.copy(module.config)
        routed._attn_implementation_internal = name
        undo.set(module, "config", routed)
    undo.set(module, _LISTENERS, (*listeners, listener))


def places_of(reducer: Reducer, anatomy: Anatomy) -> dict[int, int]:
    """{stage: layer after which it is carried out} where that is another layer than its own.

    A stage that reads attention in a layer without any goes to the nearest layer that has some, rather an earlier one,
    but never before the place of the previous stage; the next ones follow in order. So does a stage between a layer and
    the next one that takes over what its index chose, by places that a removal would change.

    Raises:
        UnsupportedError: there is no such layer.
    """
    free = [i for i in range(anatomy.depth) if i + 1 not in anatomy.shared_index]
    places, last = {}, -1
    for stage in sorted(reducer.stages):
        spec, place = reducer.taps.get(stage), max(stage, last)
        reads = spec is not None and spec.queries is not None
        if reads or place + 1 in anatomy.shared_index:
            near = [i for i in free if i >= last and not (reads and i in anatomy.keyless)]
            if not near:
                raise UnsupportedError(
                    f"{type(reducer).__name__} reads attention in decoder layer {stage} of "
                    f"{type(anatomy.model).__name__}, which has none, nor has any later layer"
                )
            place = min(near, key=lambda i: (abs(i - stage), i))
        if place != stage:
            places[stage] = place
        last = place
    return places


def in_backward() -> bool:
    """Whether this thread runs a backward pass, where gradient checkpointing runs layers again."""
    return torch._C._current_graph_task_id() != -1


def choose_rows(spec: TapSpec, active: Tensor, visual: Tensor, state: dict[str, Any]) -> Tensor:
    """Which slots a tap reads: (B, S) bool among the active ones.

    Args:
        spec: what was asked for.
        active: (B, S) bool.
        visual: (B, S) bool.
        state: of the view, for `queries` given as a function.
    """
    queries = spec.queries(state) if callable(spec.queries) else spec.queries
    if isinstance(queries, Tensor):
        return queries.to(active.device) & active
    text = active & ~visual
    if queries == "text":
        return text
    slots = torch.arange(active.shape[1], device=active.device)
    if queries == "last":
        return slots == (active * slots).amax(1, keepdim=True)
    if queries == "text_after":
        return text & (slots > (visual * slots).amax(1, keepdim=True))
    raise UnsupportedError(
        f"TapSpec(queries={queries!r}): use 'last', 'text', 'text_after', a BoolTensor or a function"
    )


def read_rows(
    spec: TapSpec,
    wanted: Tensor,
    index: Tensor,
    reach: Reach,
    query: Tensor,
    key: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
) -> Tap:
    """The attention rows of the wanted slots.

    Args:
        spec: what was asked for.
        wanted: (B, S) bool, slots of the rows.
        index: (B, n) slot of each query of this layer.
        reach: who may look at whom.
        query: (B, H, n, d) after RoPE.
        key: (B, Hkv, N, d).
        mask: the layer's own mask, as handed to its attention.
        kwargs: of the attention call (scaling, softcap, sliding_window, position_bias, sinks).

    Returns:
        The tap, on the device of `wanted`, wherever the layer is.
    """
    home, here = wanted.device, query.device
    wanted, index, reach = wanted.to(here), index.to(here), reach.to(here)
    chosen = wanted.gather(1, index)
    if reach.valid is not None:
        chosen = chosen & reach.valid
    count = 1 if spec.queries == "last" else int(chosen.sum(1).max())
    rows, row_valid = true_indices(chosen, count)
    # Padding points at slot 0: what fills up a short list may lie beyond the prompt, where a method has nothing.
    slots = index.gather(1, rows).masked_fill(~row_valid, 0)
    allowed, bias = _visibility(mask, rows, slots + reach.past, reach, kwargs.get("sliding_window"))
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    positional, sinks = kwargs.get("position_bias"), kwargs.get("sinks", kwargs.get("s_aux"))
    if positional is not None:
        positional = _at_rows(positional, rows)
        bias = positional if bias is None else bias + positional
    if sinks is not None:
        sinks = sinks.view(1, -1, 1, 1) if sinks.dim() == 1 else _at_rows(sinks, rows)
    weights = attention_rows(query, key, rows, allowed, bias, scaling, kwargs.get("softcap"), sinks)
    if spec.heads == "mean":
        weights = weights.mean(1)
    picked = None
    if spec.keep_qk:
        picked = query.gather(2, rows[:, None, :, None].expand(*query.shape[:2], count, query.shape[-1]))
    keys = torch.where(reach.keys < 0, -1, reach.keys - reach.past)
    tap = Tap(weights, row_valid, slots, keys, picked, key if spec.keep_qk else None)
    if home == here:
        return tap
    moved: dict[str, Any] = {name: None if value is None else value.to(home) for name, value in vars(tap).items()}
    return Tap(**moved)


def _at_rows(value: Tensor, rows: Tensor) -> Tensor:
    """(B, H, Q, N) at the rows (B, R) of each sample: (B, H, R, N)."""
    batch, heads, _, n_keys = value.shape
    return value.gather(2, rows[:, None, :, None].expand(batch, heads, rows.shape[1], n_keys))


def counted_from_first(module: nn.Module, tap: Tap, rope: Any, first: Tensor) -> None:
    """Turn queries and keys back, as if positions were counted from the first token of each row.

    A plain forward numbers the padding on the left, too. Attention does not notice, but a norm that depends on the
    rotation would (DART's).

    Args:
        module: the attention module that rotated them.
        tap: with query and key; changed in place.
        rope: cos and sin that the layer was handed, (B or 1, n, d), or complex numbers (B or 1, n, d / 2) (Llama 4);
            anything else is left alone.
        first: (B,) which of the n is the first token.
    """
    if tap.query is None or tap.key is None:
        return
    if isinstance(rope, Tensor) and rope.is_complex() and rope.dim() == 3:
        rows = torch.arange(len(first), device=rope.device)
        back = rope.expand(len(first), -1, -1)[rows, first.to(rope.device)].conj()[:, None, None]
        back = (back / back.abs()).to(tap.key.device)
        tap.query, tap.key = (
            torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous()) * back).flatten(-2)
            for x in (tap.query, tap.key)
        )
        return
    rotate = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    pair = isinstance(rope, tuple | list) and len(rope) == 2 and all(part.dim() == 3 for part in rope)
    if rotate is None or not pair:
        return
    first = first.to(rope[0].device)
    rows = torch.arange(len(first), device=first.device)
    cos, sin = (part.expand(len(first), -1, -1)[rows, first, None].float().to(tap.key.device) for part in rope)
    scale = (cos.square() + sin.square()).sqrt()
    turn = functools.partial(_turned, module, rotate, cos / scale, -sin / scale)
    tap.query, tap.key = turn(tap.query.float()), turn(tap.key.float())


def _turned(module: nn.Module, rotate: Callable[..., Any], cos: Tensor, sin: Tensor, x: Tensor) -> Tensor:
    """Queries or keys (B, H, n, d), of which `rotate` turns the part that is as wide as cos and sin.

    Raises:
        UnsupportedError: it cannot be done with what the module's own file offers.
    """
    width = cos.shape[-1]
    first = x.shape[-1] - width if hasattr(module, "qk_rope_head_dim") else 0  # latent attention: behind the others
    try:
        part = x[..., first : first + width]
        alone = next(iter(inspect.signature(rotate).parameters)) == "x"
        part = rotate(part, cos, sin) if alone else rotate(part, part, cos, sin)[0]
        return torch.cat([x[..., :first], part, x[..., first + width :]], -1)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedError(
            f"how {type(module).__name__} rotates its keys is not known, so that they cannot be compared without their "
            f"positions ({error}); use a method that compares something else"
        ) from error


def _visibility(
    mask: Any, rows: Tensor, row_slots: Tensor, reach: Reach, window: int | None
) -> tuple[Tensor | None, Tensor | None]:
    if isinstance(mask, Tensor) and mask.dim() == 4:
        batch, n_keys = reach.keys.shape
        mask = mask.expand(batch, mask.shape[1], mask.shape[2], n_keys)
        mask = _at_rows(mask, rows)
        return (mask, None) if mask.dtype == torch.bool else (None, mask)
    allowed = (reach.keys >= 0)[:, None] & (reach.keys[:, None] <= row_slots[..., None])
    if window is not None:
        allowed = allowed & (row_slots[..., None] - reach.keys[:, None] < window)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        allowed = allowed & mask[:, None].bool()
    return allowed, None
