"""What Foveate does with one class: exact, refused (with the sentence), wrong, silent, or a crash of another's."""

from __future__ import annotations

import contextlib
import copy
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import foveate
from foveate.reduction import Decision, View
from tests.catalogue.build import alone, build, inputs
from tests.catalogue.handmade import HANDMADE
from tests.reference.masked import MaskedReference
from tests.reference.patches import disagreements
from tests.reference.short import ShortReference, is_recurrent

__all__ = [
    "FEATURES", "IN_DECODER", "IN_TOWER", "OUTSIDE", "Reference", "Wrong", "count", "differ", "generate", "judge",
    "recorded", "verdict",
]  # fmt: skip

IN_DECODER: dict[str, dict[str, Any]] = {
    "random": {"keep": 0.5},
    "fastv": {"keep": 0.5, "layer": 1},
    "sparsevlm": {"keep": 0.5},
    "vtw": {"layer": 3},
    "divprune": {"keep": 0.5},
}
"""Methods that need no vision tower, and their options."""
IN_TOWER: dict[str, dict[str, Any]] = {"visionzip": {"keep": 0.5}, "fopru": {"keep": 0.5}}
"""Methods that choose by what they read in the tower."""
OUTSIDE = frozenset([*(name for name, made in HANDMADE.items() if not made.in_sequence), "mllama"])
"""Classes without visual tokens in a decoder's sequence: to be refused."""
TOLERANCE = 5e-4
_STEPS = 4
_OWN_ERRORS = (foveate.UnsupportedError, foveate.BudgetError, foveate.OptionError)


class Wrong(Exception):
    """Something differs from its reference, named."""


class Untried(Exception):
    """The plain model fails, so there is nothing to compare with."""


@torch.no_grad()
def _plainly(asked: Callable[[], Any]) -> None:
    try:
        asked()
    except Exception as error:
        raise Untried(f"the plain model fails ({type(error).__name__}: {error})") from error


def differ(what: str, found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    if found.shape != expected.shape:
        raise Wrong(f"{what}: {tuple(found.shape)} for {tuple(expected.shape)}")
    difference = (found - expected).abs().nan_to_num(float("inf")).max().item() if found.numel() else 0.0
    if difference > tolerance * max(1.0, expected[expected.abs() < 1e30].abs().max().item()):
        raise Wrong(f"{what}: {difference:.1e}")


def generate(model: Any, prompt: dict[str, Tensor], **options: Any) -> Tensor:
    """Logits (B, steps, V) of a greedy continuation that writes no placeholder."""
    output = model.generate(
        **{name: value.clone() for name, value in prompt.items()}, max_new_tokens=_STEPS, min_new_tokens=_STEPS,
        do_sample=False, pad_token_id=0, suppress_tokens=list(range(145, 200)), return_dict_in_generate=True,
        output_logits=True, **options,
    )  # fmt: skip
    return torch.stack(output.logits, 1)


@contextlib.contextmanager
def recorded(session: Any, merges: list[tuple[int, Tensor, Tensor]]) -> Iterator[None]:
    """Writes down what the method merges, (stage, slots, values), so that a reference can be told the same."""
    decide = session.reducer.decide

    def recording(view: View) -> Decision | None:
        decision = decide(view)
        if decision is not None and decision.slots is not None:
            merges.append((view.stage, decision.slots.clone(), decision.values.detach().clone()))
        return decision

    session.reducer.decide = recording
    try:
        yield
    finally:
        del session.reducer.decide


def _merging(
    merged: list[tuple[Tensor, Tensor]], before: int = 0, streams_first: bool = False
) -> Callable[[Tensor], Tensor]:
    """Writes merged tokens (B, m, D) into their slots (B, m) of hidden states that begin at slot `before`.

    Hidden states are (B, S, D), or several of each token: (streams, B, S, D) with `streams_first`, else the other way.
    """

    def merge(hidden: Tensor) -> Tensor:
        new = (hidden.permute(1, 2, 0, 3) if streams_first else hidden).clone()
        for slots, values in merged:
            if values.shape[-1] < new[0, 0].numel():  # of embeddings, of which every stream is a copy
                values = values.repeat(1, 1, new.shape[2])
            for row, (mine, value) in enumerate(zip(slots, values)):
                new[row, mine[mine >= 0] - before] = value[mine >= 0].to(hidden).view(-1, *new.shape[2:])
        return new.permute(2, 0, 1, 3) if streams_first else new

    return merge


def _gone(trace: foveate.Trace) -> dict[int, Tensor]:
    """{stage: (B, S) bool, removed at that stage}."""
    removed, before = {}, trace.tokens
    for stage in trace.stages:
        after = trace.active(stage)
        removed[stage], before = before & ~after, after
    return removed


class Reference:
    """What a plain model answers that does not look at removed tokens: all rows at once, or, where layers are recurrent
    and have no mask to hide a token behind, each row alone on what is left of it."""

    def __init__(
        self,
        model: Any,
        trace: foveate.Trace,
        merges: list[tuple[int, Tensor, Tensor]],
        alone: Callable[[dict[str, Tensor], int], dict[str, Tensor]] = alone,
    ):
        self._model, self._removed, self._alone = model, _gone(trace), alone
        self._merges: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for stage, slots, values in merges:  # a stage acts after the layer that it was moved to
            self._merges.setdefault(trace.moved.get(stage, stage), []).append((slots, values))
        self._row_by_row = is_recurrent(model)

    def forward(self, prompt: dict[str, Tensor]) -> Tensor:
        """Logits (B, S, V); of padding, anything."""
        return self.asked(prompt, lambda asked: self._model(**asked).logits, pad=True)

    def generate(self, prompt: dict[str, Tensor], **options: Any) -> Tensor:
        return self.asked(prompt, lambda asked: generate(self._model, asked, **options))

    def asked(self, prompt: dict[str, Tensor], ask: Callable[[dict[str, Tensor]], Tensor], pad: bool = False) -> Tensor:
        if not self._row_by_row:
            first = any("altup" in part for part, _ in self._model.named_modules())
            merges = {stage: _merging(merged, 0, first) for stage, merged in self._merges.items()}
            with MaskedReference(self._model, self._removed, merges):
                return ask(prompt)
        (rows, length), answers = prompt["input_ids"].shape, []
        for row in range(rows):
            before = length - int(prompt["attention_mask"][row].sum())
            removed = {
                stage: gone[row * len(gone) // rows, None, before:]  # beams repeat each row
                for stage, gone in self._removed.items()
            }
            merges = {
                stage: _merging([(slots[row : row + 1], values[row : row + 1]) for slots, values in merged], before)
                for stage, merged in self._merges.items()
            }
            with ShortReference(self._model, removed, merges):
                answer = ask(self._alone(prompt, row))
            answers.append(F.pad(answer, (0, 0, before, 0)) if pad else answer)
        return torch.cat(answers)


@torch.no_grad()
def judge(
    name: str, model: Any, method: str, options: dict[str, Any], prompt: dict[str, Tensor], without_cache: str = "same"
) -> None:
    """Hold one method in one model against its references; returns if everything agrees.

    `without_cache`: whether the plain model generates the "same" without a cache, something "else", or "nothing".

    Raises:
        Wrong: what differs, or that nothing was removed.
        UnsupportedError: the model or the method is refused.
    """
    plain, single_prompt = model(**prompt).logits, inputs(name, model, rows=1)
    # Kosmos-2 counts positions and masks of padded rows differently once there is a cache.
    same_alone = torch.allclose(generate(model, single_prompt)[0], generate(model, prompt)[0], atol=1e-3)
    merges: list[tuple[int, Tensor, Tensor]] = []
    with foveate.apply(model, foveate.build(method, **options)) as session:
        own = session.reducer.positions
        session.reducer.positions = "keep"  # what a masked twin can be told
        with recorded(session, merges):
            forward = model(**prompt).logits
        trace = session.trace
        if trace is None or not bool(((trace.visual & trace.tokens & ~trace.active(trace.stages[-1])).any(1)).all()):
            raise Wrong("silent: nothing was removed")
        generated = generate(model, prompt)
        if session.trace is None:
            raise Wrong("silent: generate() removed nothing")
        if without_cache == "else":
            cacheless = generate(model, prompt, use_cache=False)
        session.reducer.positions = own
        renumbered = generate(model, prompt) if own != "keep" else generated
        if without_cache == "same":
            cacheless = generate(model, prompt, use_cache=False)
        single = generate(model, single_prompt)
    kept = trace.active(trace.stages[-1])
    reference = Reference(model, trace, merges)
    expected, continued = reference.forward(prompt), reference.generate(prompt)
    if without_cache == "else":
        continued_cacheless = reference.generate(prompt, use_cache=False)
    kept = kept[:, -forward.shape[1] :]
    if float((expected - plain)[kept].abs().max()) < 1e-3:
        raise Wrong("the reference shows no effect: nothing was checked")
    differ("forward", forward[kept], expected[kept])
    differ("generate", generated, continued)
    if without_cache != "nothing":
        differ("without cache", cacheless, renumbered if without_cache == "same" else continued_cacheless)
    if same_alone:
        differ("a row alone", single[0], renumbered[0])
    if "keep" in options:
        with foveate.apply(model, foveate.build(method, **{**options, "keep": 1.0})):
            whole = model(**prompt).logits
        if not torch.equal(whole, plain):
            raise Wrong("keep=1.0 is not the plain model")
    if not torch.equal(model(**prompt).logits, plain):
        raise Wrong("the model after the session")


def _remember(tower: Any) -> None:
    """Let a convolutional tower that takes seconds, and in which no method reads, run once for equal pixels."""
    known: dict[int, Any] = {}
    run = tower.forward

    def forward(pixel_values: Tensor, **options: Any) -> Any:
        key = hash(pixel_values.numpy().tobytes())
        if key not in known:
            known[key] = run(pixel_values, **options)
        return copy.deepcopy(known[key])

    tower.forward = forward


def _eager(name: str, model: Any, prompt: dict[str, Tensor]) -> None:
    eager = build(name, impl="eager")
    if name == "gemma3n":
        _remember(eager.model.vision_tower)
    _plainly(lambda: generate(eager, prompt))
    judge(name, eager, "fastv", IN_DECODER["fastv"], prompt, "nothing")


def _reduced(model: Any, asked: Callable[[], Any]) -> tuple[Any, Reference]:
    with foveate.apply(model, foveate.Random(keep=0.5)) as session:
        session.reducer.positions = "keep"
        found = asked()
        return found, Reference(model, session.trace, [])


def _beams(name: str, model: Any, prompt: dict[str, Tensor]) -> None:
    _plainly(lambda: generate(model, prompt, num_beams=2))
    with torch.no_grad():
        found, reference = _reduced(model, lambda: generate(model, prompt, num_beams=2))
        differ("beam search", found, reference.generate(prompt, num_beams=2))


def _training(name: str, model: Any, prompt: dict[str, Tensor]) -> None:
    """Gradients of all parameters, from the text behind the image of each row."""

    def gradients(logits: Tensor) -> Tensor:
        model.zero_grad()
        logits[:, -8:].log_softmax(-1)[..., 5].mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    found, reference = _reduced(model, lambda: gradients(model(**prompt).logits))
    expected = gradients(reference.forward(prompt))
    model.zero_grad()
    # Where recurrent layers norm what is nearly nothing, float32 noise of a padded batch grows a hundredfold.
    tolerance = 1e-2 if is_recurrent(model) else 1e-3
    differ("gradients", found / expected.abs().max(), expected / expected.abs().max(), tolerance)


FEATURES: dict[str, Callable[[str, Any, dict[str, Tensor]], None]] = {
    "eager": _eager,
    "beams": _beams,
    "training": _training,
}
"""What else is tried, with one method each: (name, model, prompt), raising `Wrong`."""


def verdict(tried: Callable[[], None]) -> str:
    try:
        tried()
    except Wrong as error:
        return str(error) if str(error).startswith("silent") else f"wrong: {error}"
    except Untried as error:
        return f"not tried: {error}"
    except _OWN_ERRORS as error:
        return f"refused: {error}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"crash: {type(error).__name__}: {str(error)[:200]} ({where.filename.rpartition('/')[2]}:{where.lineno})"
    return "exact"


def count(name: str, impl: str = "sdpa") -> dict[str, str]:
    """The verdict on every method, and on every feature, in one class: {method or feature: words}."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build(name, impl=impl)
        if name == "gemma3n":
            _remember(model.model.vision_tower)
        methods = {**IN_DECODER, **IN_TOWER}
        everything = [*methods, *FEATURES]

        def applied() -> None:
            foveate.apply(model, foveate.Random(keep=0.5)).remove()

        if name in OUTSIDE:
            return dict.fromkeys(everything, verdict(applied))
        prompt = inputs(name, model)
        with torch.no_grad():
            try:
                model(**prompt)  # transformers leaves its recorders in at the first call
                plain_logits = generate(model, prompt)
            except Exception as error:
                refused = verdict(applied)
                plain = f"not tried: the plain model fails ({type(error).__name__}: {error})"
                return dict.fromkeys(everything, plain if refused == "exact" else refused)
            try:
                cacheless = generate(model, prompt, use_cache=False)
                without_cache = "same" if torch.allclose(cacheless, plain_logits, atol=1e-3) else "else"
            except Exception:
                without_cache = "nothing"
        verdicts = {
            method: verdict(lambda: judge(name, model, method, options, prompt, without_cache))  # noqa: B023
            for method, options in methods.items()
        }
        if all(verdicts[method] == "exact" for method in IN_TOWER):

            def traced() -> None:
                wrong, found = disagreements(model, prompt, step=7)
                if wrong or found < 3:
                    raise Wrong(f"slots and their patches: {wrong[0] if wrong else 'no patch is in any slot'}")

            verdicts |= dict.fromkeys(IN_TOWER, verdict(traced))
        for feature, tried in FEATURES.items():
            verdicts[feature] = verdict(lambda: tried(name, model, prompt))  # noqa: B023
        return verdicts
