"""What the full model says to a batch, and how far a reduced one is from it, computed from what the two share.

Lives here: `Reference`, one batch under the full model, and `Outcome`, one method on it. A reduced model is led along
the full model's answer token by token, so that "would it have answered the same?" becomes a number: by how many logits
it prefers that answer to the runner-up. The sign says whether its own greedy answer is the same; the size says how
close a call it was, which is what makes small shares of changed answers measurable on few questions (`estimate`).

Shared are, within the batch: the full model's answer, the features of the vision tower (unless the method reads the
tower or works in it), and the hidden states, keys and values of the decoder layers before the method acts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from ..engine.apply import apply
from ..engine.compat import given_cache, returned_cache
from ..engine.families.parts import resolve
from ..engine.trace import Trace
from ..engine.vision.shared import SharedVision, shareable
from ..ops.logits import has_softmax
from ..reduction import BEFORE_LAYERS, Reducer, UnsupportedError
from ._patching import evaluating, replaced
from .cost import bill
from .divergence import next_token_divergence

__all__ = ["Outcome", "Reference", "skippable_layers"]

Inputs = Mapping[str, Any]


@dataclass
class Outcome:
    """One method on one batch of `B` rows.

    Attributes:
        gaps: (B,) float32, logits by which the reduced model prefers the full model's answer to its closest rival, the
            least over the tokens of the answer, each given the tokens before it. Negative: its greedy answer differs.
        kl: (B,) float32, KL(reduced || full) of the first answer token, in nats.
        trace: of the prefill.
        skipped: decoder layers that were not computed again.
        tower_ran: whether the vision tower ran again.
    """

    gaps: Tensor
    kl: Tensor
    trace: Trace
    skipped: int
    tower_ran: bool


class Reference:
    """One batch under the full model.

    Args:
        model: any Hugging Face vision-language model that generates.
        inputs: what to call it with, as a processor returns it, on the model's device; padded on the left if at all.
        max_new_tokens: longest answer.
        prefix: decoder layers whose output is remembered for the methods that act after them; each holds B x S x D
            numbers, and keys and values, while this object lives.

    Attributes:
        tokens: (B, T) long, the greedy answers; -1 after the end of one.
        margins: (B,) float32, `Outcome.gaps` of the full model itself: at least 0.
        bill: of the full model's prefill.

    Raises:
        UnsupportedError: a model without language-model head, a prompt without visual token, or an answer of NaN.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, max_new_tokens: int = 16, prefix: int = 0):
        self.anatomy = resolve(model)
        if self.anatomy.base is self.anatomy.model:
            raise UnsupportedError(f"{type(self.anatomy.model).__name__} has no language-model head and cannot answer")
        self.inputs = dict(inputs)
        self.length = int(self.inputs["input_ids"].shape[1])
        self._new = max_new_tokens
        self._vision = SharedVision(model)
        self._layers: list[Any] = []
        with contextlib.ExitStack() as stack:
            for handle in self._listen(prefix):
                stack.callback(handle.remove)
            reader = _Scores(self.length)
            stack.enter_context(self._vision.serving())
            output = self._generate(reader)
        answers = output.sequences[:, self.length :]
        self.tokens = torch.where(_until_end(answers, self._ends()), answers, -1)
        _check(reader.scores, self.tokens, "the full model's")
        self._scores = reader.scores
        self._cache = self._prompt_cache(returned_cache(output))
        self._layers = self._layers[: len(self._cache)]
        self.margins = _gaps(self._scores, self.tokens)
        self.bill = bill(self.anatomy.model, self._unreduced(), self.inputs)

    def measure(self, reducer: Reducer, share: bool = True) -> Outcome:
        """Lead the reduced model along the full model's answers.

        Args:
            reducer: the method.
            share: False computes everything anew; the outcome is the same.

        Raises:
            OptionError, UnsupportedError: the method cannot work in this model, there is no visual token, or the
                reduced model answers NaN.
        """
        reader = _Scores(self.length, self.tokens)
        with contextlib.ExitStack() as stack:
            session = stack.enter_context(apply(self.anatomy.model, reducer))
            reducer = session.reducer
            share = share and shareable(reducer)
            if share:
                stack.enter_context(self._vision.serving())
            served = self._vision.served
            skipped = min(skippable_layers(reducer), len(self._layers)) if share else 0
            for i in range(skipped):
                layer = self.anatomy.layers[i]
                stack.enter_context(replaced(layer, "forward", self._remembered(i, layer.forward)))
            self._generate(reader)
            trace = session.trace
        if trace is None:
            raise UnsupportedError("the prompt holds no visual token, so there is nothing to reduce")
        _check(reader.scores, self.tokens, "the reduced model's")
        kl = next_token_divergence(reader.scores[0], self._scores[0])
        return Outcome(_gaps(reader.scores, self.tokens), kl.cpu(), trace, skipped, self._vision.served == served)

    # ------------------------------------------------------------------------------------------------ the full model
    def _listen(self, prefix: int) -> Iterator[Any]:
        """Hooks that remember what the first `prefix` decoder layers put out in the prefill."""
        for i in range(prefix):
            yield self.anatomy.layers[i].register_forward_hook(
                lambda *call, i=i: self._layers.append(call[-1]) if len(self._layers) == i else None
            )

    def _unreduced(self) -> Trace:
        """Trace of a prefill from which nothing is removed. Raises `UnsupportedError` without a visual token."""
        visual = self.anatomy.find_placeholders(self.inputs["input_ids"], None)
        if visual is None or not bool(visual.any()):
            raise UnsupportedError("the prompt holds no visual token, so there is nothing to reduce")
        mask = self.inputs.get("attention_mask")
        return Trace(self.anatomy.depth, visual, torch.ones_like(visual) if mask is None else mask.bool())

    def _generate(self, reader: _Scores) -> Any:
        with torch.inference_mode(), evaluating(self.anatomy.model):
            return self.anatomy.model.generate(
                **self.inputs,
                max_new_tokens=self._new,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                pad_token_id=self._pad(),
                logits_processor=LogitsProcessorList([reader]),
                return_dict_in_generate=True,
            )

    def _ends(self) -> list[int]:
        ends = self.anatomy.model.generation_config.eos_token_id
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    def _pad(self) -> int:
        pad = self.anatomy.model.generation_config.pad_token_id
        return pad if pad is not None else next(iter(self._ends()), 0)

    def _prompt_cache(self, cache: Any) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the prompt in the remembered layers, up to the first layer that does not hold them all."""
        found = []
        for layer in getattr(cache, "layers", ())[: len(self._layers)]:
            if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
                break
            found.append((layer.keys[:, :, : self.length], layer.values[:, :, : self.length]))
        return found

    def _remembered(self, number: int, compute: Callable[..., Any]) -> Callable[..., Any]:
        """A decoder layer that hands out what it computed for the full model in the prefill."""

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            cache = given_cache(args, kwargs)
            if cache is None or hidden_states.shape[1] != self.length or cache.get_seq_length(number):
                return compute(hidden_states, *args, **kwargs)
            cache.update(*self._cache[number], number)
            return self._layers[number]

        return forward


def skippable_layers(reducer: Reducer) -> int:
    """Decoder layers that run exactly as in the full model under a reducer that is bound to a model.

    Those before its first stage, and that of the stage itself unless the method reads its attention.
    """
    first = min(reducer.stages, default=BEFORE_LAYERS)
    read = first in reducer.taps and reducer.taps[first].queries is not None
    return first + (not read) if first >= 0 else 0


class _Scores(LogitsProcessor):
    """Remembers the scores of every step; with `tokens` (B, T), it also leads the generation along them."""

    def __init__(self, length: int, tokens: Tensor | None = None):
        self.length, self.tokens = length, tokens
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores.append(scores.float())
        if self.tokens is None:
            return scores
        wanted = self.tokens[:, input_ids.shape[1] - self.length].clamp_min(0)
        return torch.full_like(scores, -torch.inf).scatter(1, wanted[:, None], 0.0)


def _check(scores: Sequence[Tensor], tokens: Tensor, whose: str) -> None:
    """Raise `UnsupportedError` if the scores of a token of an answer are NaN or infinite."""
    sound = torch.stack([has_softmax(each) for each in scores], 1)
    broken = (~sound & (tokens >= 0)[:, : sound.shape[1]]).any(1)
    if bool(broken.any()):
        raise UnsupportedError(f"{whose} logits are NaN or infinite in {int(broken.sum())} of {len(broken)} answers")


def _gaps(scores: Sequence[Tensor], tokens: Tensor) -> Tensor:
    """(B,) on the CPU: how far each token of an answer is ahead of its closest rival, at its weakest."""
    gaps = []
    for step, each in zip(tokens.T, scores):
        wanted = step.clamp_min(0)[:, None]
        rival = each.scatter(1, wanted, -torch.inf).amax(1)
        gaps.append(torch.where(step >= 0, each.gather(1, wanted)[:, 0] - rival, torch.inf))
    return torch.stack(gaps).amin(0).cpu()


def _until_end(answers: Tensor, ends: Sequence[int]) -> Tensor:
    """(B, T) bool: tokens up to the first that ends the answer, this one included."""
    over = torch.isin(answers, torch.tensor(list(ends), dtype=answers.dtype, device=answers.device))
    return over.long().cumsum(1) - over.long() == 0
