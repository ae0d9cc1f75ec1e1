"""VTW's search: from which decoder layer on can a model do without its visual tokens?

* `withdrawal_curve`: the divergence from the full model for every layer. LLaVA-1.5-7B with 50 text tokens after the
  image: the layer-token products of 2.5 full passes per sample, against 17.7 for the official search.
* `choose_layer`: the first layer whose mean divergence is small enough.

Paper: arXiv 2405.05803; official code: lzhxmu/VTW @ a3d8cfc3, which runs one whole prefill per layer and sample.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.apply import apply
from ..engine.families.parts import Anatomy, resolve
from ..ops.logits import has_softmax
from ..reduction import Decision, OptionError, Reducer, UnsupportedError, View
from ._patching import evaluating, replaced
from .divergence import next_token_divergence

__all__ = ["DEFAULT_ETA", "ETA_PRESETS", "choose_layer", "withdrawal_curve"]

DEFAULT_ETA = 0.003
ETA_PRESETS: Mapping[str, float] = {"llava-1.5-7b": 0.003, "llava-1.5-13b": 0.0005, "llava-1.6-vicuna-7b": 0.0001}
"""Largest mean divergence that the official code accepts, by model; `DEFAULT_ETA` for all others."""

Batch = Mapping[str, Any]


def withdrawal_curve(
    model: nn.Module,
    batches: Sequence[Batch],
    first_layer: int = 5,
    visual: Tensor | Sequence[Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Divergence KL(p_K || p_full) of the first generated token when all visual tokens are withdrawn at layer K.

    Every sample goes through the full model once. What its text tokens are at the input of each layer K is remembered,
    and only layers K.. are run again, on the text alone: the first K layers do not depend on what happens at K.

    Args:
        model: any Hugging Face vision-language model; with `visual`, any Hugging Face decoder.
        batches: what to call the model with, as a processor returns it; each may hold several rows, padded on either
            side.
        first_layer: smallest K; the official search starts at 5.
        visual: (B, S) bool, the visual slots, for `inputs_embeds` of your own: one for all batches, or one per batch.
        progress: called with the number of finished passes and of all passes.

    Returns:
        float32 (n_samples, n_layers - first_layer) in nats, on the CPU; column j is K = first_layer + j, and n_samples
        counts the rows of all batches. Rows without an image are zero; NaN where the model without its visual tokens
        answers NaN.

    Raises:
        OptionError: `first_layer` is no layer of this model, there is no batch, or a batch has no visual token.
        UnsupportedError: the model cannot be reduced, has no language-model head, or answers NaN by itself.
    """
    anatomy = resolve(model, text_only=visual is not None)
    if isinstance(first_layer, bool) or not isinstance(first_layer, int) or not 0 <= first_layer < anatomy.depth:
        raise OptionError(
            f"first_layer={first_layer!r}: choose 0 to {anatomy.depth - 1} of {anatomy.depth} decoder layers"
        )
    if isinstance(batches, Mapping) or len(batches) == 0:
        raise OptionError("batches: give a list with at least one dict of model arguments")
    if anatomy.base is anatomy.model:
        raise UnsupportedError(
            f"{type(anatomy.model).__name__} has no language-model head; pass the model that generates"
        )
    masks = visual if isinstance(visual, list | tuple) else [visual] * len(batches)
    if len(masks) != len(batches):
        raise OptionError(f"visual: {len(masks)} masks for {len(batches)} batches")
    layers = range(first_layer, anatomy.depth)
    total, done, rows = len(batches) * (1 + len(layers)), 0, []
    with torch.no_grad(), evaluating(anatomy.model):
        for number, (batch, mask) in enumerate(zip(batches, masks)):
            columns: list[Tensor] = []
            for logits in _first_token_logits(anatomy, batch, mask, layers, number):
                columns.append(logits)
                done += 1
                if progress is not None:
                    progress(done, total)
            full, *reduced = columns
            if not bool(has_softmax(full).all()):
                raise UnsupportedError(f"batch {number}: the full model's logits are NaN or infinite")
            rows.append(next_token_divergence(torch.stack(reduced, 1), full[:, None]).cpu())
    return torch.cat(rows)


def choose_layer(curve: Tensor, eta: float = DEFAULT_ETA, first_layer: int = 5) -> int | None:
    """The first layer K whose mean divergence is at most `eta`.

    Args:
        curve: (n_samples, n) as returned by `withdrawal_curve`, or its mean (n,). It need not fall monotonically.
        eta: largest mean divergence, in nats; see `ETA_PRESETS`.
        first_layer: K of the first column.

    Returns:
        K counted from 0, or None: withdraw nothing, no layer qualifies. A layer whose mean is NaN never does.
    """
    mean = curve.mean(0) if curve.dim() == 2 else curve
    good = (mean <= eta).nonzero()
    return first_layer + int(good[0]) if len(good) else None


# ------------------------------------------------------------------------------------------------------ the passes
class _Listen(Reducer):
    """Removes nothing; keeps the hidden states of the text at the input of each layer."""

    def __init__(self, layers: range):
        self.stages = tuple(layer - 1 for layer in layers)
        self.inputs: dict[int, Tensor] = {}
        self.text: tuple[Tensor, ...] = ()

    def decide(self, view: View) -> None:
        if not self.text:
            self.text = (view.tokens & ~view.visual).nonzero(as_tuple=True)
        device = view.hidden.device  # layers may be spread over several
        self.inputs[view.stage + 1] = view.hidden[tuple(index.to(device) for index in self.text)]


class _Withdraw(Reducer):
    """Removes all visual tokens at the input of one layer."""

    def __init__(self, layer: int):
        self.stages = (layer - 1,)

    def decide(self, view: View) -> Decision:
        return Decision(keep=view.active & ~view.visual)


def _first_token_logits(
    anatomy: Anatomy, batch: Batch, visual: Tensor | None, layers: range, number: int
) -> Iterator[Tensor]:
    """Logits (B, V) after the last token of every row: of the full model, then for every K in `layers`."""
    model, base, decoder = anatomy.model, anatomy.base, anatomy.decoder
    call = {name: value for name, value in batch.items() if name not in ("labels", "return_dict", "use_cache")}
    call["use_cache"] = False
    last = _last_tokens(call)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        call["logits_to_keep"] = 1 if last is None else last.unique()
    calls, results, of_layer = [], [], []
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(apply(model, _Listen(layers), visual=visual))
        listener = session.reducer
        for hook in (
            decoder.register_forward_pre_hook(
                lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
            ),
            base.register_forward_hook(lambda module, args, output: results.append(output)),
            anatomy.layers[-1].register_forward_hook(lambda module, args, output: of_layer.append(output)),
        ):
            stack.callback(hook.remove)
        full = _pick(model(**call).logits, last)
        trace = session.trace
    if trace is None:
        raise OptionError(f"batch {number} has no visual token, so there is nothing to withdraw")
    (args, kwargs), result = calls[-1], results[-1]
    extra = (None,) * (len(of_layer[-1]) - 1) if isinstance(of_layer[-1], tuple) else None
    yield full

    def resume(*_: Any, **__: Any) -> Any:
        # The vision tower and the scatter of its features have run already; what they handed the decoder is known.
        output = copy.copy(result)
        output.last_hidden_state = decoder(*args, **kwargs).last_hidden_state
        return output

    for layer in layers:
        with contextlib.ExitStack() as stack:
            stack.enter_context(apply(model, _Withdraw(layer), visual=trace.visual))
            if base is not decoder:
                stack.enter_context(replaced(base, "forward", resume))
            for i in range(layer):
                states = listener.inputs.pop(layer) if i == layer - 1 else None
                stack.enter_context(replaced(anatomy.layers[i], "forward", _skip(listener.text, states, extra)))
            logits = _pick(model(**call).logits, last)
        yield logits


def _skip(text: tuple[Tensor, ...], states: Tensor | None, extra: tuple[None, ...] | None) -> Callable[..., Any]:
    """A decoder layer that computes nothing, or that hands on the remembered states of the text slots.

    Args:
        text: row and slot of each text token.
        states: (tokens, D), or None.
        extra: what the layer returns besides the hidden states, None if it returns a bare tensor.
    """

    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        if states is not None:
            # What stands in the other slots does not matter: they are withdrawn before anybody reads them.
            index = tuple(part.to(states.device) for part in text)
            hidden_states = states.new_zeros(hidden_states.shape).index_put_(index, states)
        return hidden_states if extra is None else (hidden_states, *extra)

    return forward


def _last_tokens(call: Batch) -> Tensor | None:
    """(B,) slot of the last token of every row; None where that is the last slot of all."""
    mask = call.get("attention_mask")
    if not (isinstance(mask, Tensor) and mask.dim() == 2):
        return None
    last = (mask.bool() * torch.arange(mask.shape[1], device=mask.device)).amax(1)
    return None if bool((last == mask.shape[1] - 1).all()) else last


def _pick(logits: Tensor, last: Tensor | None) -> Tensor:
    """(B, n, V) -> (B, V), n being all slots or those of `last.unique()`."""
    if last is None:
        return logits[:, -1]
    slots, column = last.unique(return_inverse=True)
    column = column if logits.shape[1] == len(slots) else last
    return logits[torch.arange(len(logits), device=logits.device), column.to(logits.device)]
