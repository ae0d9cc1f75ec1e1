"""Runs a request and holds every row against the same row alone, from one thread.

A row is right if its logits and tokens are those of the row alone, and its part of the trace as well. Foveate may
refuse a request with one of its own errors. What the plain model itself does differently in a batch is not Foveate's,
and what agrees in float64 was a tie in float32; both are counted by themselves. After each session the model must be
intact.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import foveate
from tests import families
from tests.fuzz.cases import Call, Request, Row
from tests.reference.checks import TOLERANCE, footprint
from tests.reference.checks import build_once as shared_build

__all__ = ["REFUSALS", "Verdict", "judge", "smallest"]

REFUSALS = (foveate.UnsupportedError, foveate.OptionError, foveate.BudgetError)
_SAME_ALONE = ("prefill_chunk_size", "prompt_lookup_num_tokens", "return_dict_in_generate")
"""Options of `generate` that must not change an answer: the row alone does without them."""
_IMAGES_BY_ROW = ("idefics3", "smolvlm")
_FULL_CHECK = 50  # requests after which configurations are looked at as well, which takes long

build_once = functools.cache(shared_build.__wrapped__)
"""Models of the fuzz's own: some of its requests damage them on purpose."""


@dataclass(frozen=True)
class Verdict:
    """What became of a request: "ok", "refused", "plain" (the full model does it, too), "tie" or "wrong"."""

    outcome: str
    why: str = ""


@dataclass
class Answer:
    """What a call returned: logits (B, n, V), new tokens (B, n) and, of the prefill, visual tokens (B, layers)."""

    logits: Tensor | None
    tokens: Tensor | None
    visual: Tensor | None


# ------------------------------------------------------------------------------------------------------------ inputs
@functools.cache
def _model(name: str, impl: str, double: bool = False) -> Any:
    return copy.deepcopy(build_once(name, impl)).double() if double else build_once(name, impl)


@functools.lru_cache(2000)
def _row(name: str, row: Row) -> dict[str, Tensor]:
    """The inputs of a row alone; its pictures are those of the family, turned by `seed`."""
    found = families.inputs(
        name, _model(name, "sdpa"), batch=1, images=row.images, before=row.before, after=row.after, seed=row.seed
    )
    if "pixel_values" in found:
        found["pixel_values"] = found["pixel_values"].roll(row.seed, -1)
    return found


def _batch(name: str, call: Call) -> tuple[dict[str, Tensor], list[slice]]:
    """The rows in one batch, and where each stands."""
    alone = [_row(name, row) for row in call.rows]
    width = max(each["input_ids"].shape[1] for each in alone) + call.padding
    ids, mask = torch.zeros(2, len(alone), width, dtype=torch.long)
    places = []
    for number, each in enumerate(alone):
        length = each["input_ids"].shape[1]
        places.append(slice(width - length, width) if call.side == "left" else slice(0, length))
        ids[number, places[-1]], mask[number, places[-1]] = each["input_ids"][0], 1
    pixels = [{k: v for k, v in each.items() if k not in ("input_ids", "attention_mask") and "type_ids" not in k}
              for each in alone]  # fmt: skip
    merged: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for each in pixels for key in each):
        found = [each.get(key) for each in pixels]
        if name in _IMAGES_BY_ROW:
            merged[key] = _by_row(found)
        elif key == "batch_num_images":
            merged[key] = torch.tensor([row.images for row in call.rows])
        else:
            merged[key] = torch.cat([value for value in found if value is not None])
    return {"input_ids": ids, "attention_mask": mask, **merged, **families.token_types(name, ids)}, places


def _by_row(found: Sequence[Tensor | None]) -> Tensor:
    known = [value for value in found if value is not None]
    whole = known[0].new_zeros(len(found), max(value.shape[1] for value in known), *known[0].shape[2:])
    for number, value in enumerate(found):
        if value is not None:
            whole[number, : value.shape[1]] = value[0]
    return whole


# ------------------------------------------------------------------------------------------------------------- calls
@torch.no_grad()
def _run(model: Any, name: str, call: Call, session: Any) -> Answer:
    inputs, _ = _batch(name, call)
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v.clone() for k, v in inputs.items()}
    if call.options is None:
        logits, tokens = model(**inputs).logits, None
    else:
        options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, **call.options}
        seed = options.pop("sampling", None)
        if seed is not None:
            torch.manual_seed(seed)
            options["do_sample"] = True
        output = model.generate(**inputs, pad_token_id=0, **options)
        if isinstance(output, Tensor):
            logits, tokens = None, output
        else:
            logits, tokens = torch.stack(output.logits, 1), output.sequences
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
        if "num_beams" in options:
            logits = None  # beams change places
    trace = None if session is None else session.trace
    beams = (call.options or {}).get("num_beams", 1)  # the trace has a row for each
    return Answer(logits, tokens, None if trace is None else trace.visual_tokens[::beams])


def _reducer(request: Request) -> foveate.Reducer:
    if request.method == "chain":
        keep = request.chosen["keep"]
        return foveate.Chain(foveate.DivPrune(keep=keep), foveate.FastV(keep=keep, layer=3))
    return foveate.build(request.method, **request.chosen)


def _together(request: Request, model: Any, reducer: foveate.Reducer | None) -> list[Answer | Exception]:
    """All calls under one session, from as many threads as asked for; `reducer` None: the plain model."""
    gate = threading.Barrier(min(request.threads, len(request.calls)))

    def call(one: Call) -> Answer | Exception:
        try:
            if request.threads > 1:
                gate.wait(60)
            return _run(model, request.family, one, session)
        except Exception as error:
            return error

    with ThreadPoolExecutor(1) as other:
        do = (lambda f, *a: other.submit(f, *a).result()) if request.elsewhere else (lambda f, *a: f(*a))
        session = None if reducer is None else do(foveate.apply, model, reducer)
        try:
            if request.threads == 1:
                return [call(one) for one in request.calls]
            with ThreadPoolExecutor(len(request.calls)) as pool:
                return list(pool.map(call, request.calls))
        finally:
            if session is not None:
                do(session.remove)


def _alone(request: Request, model: Any, reducer: foveate.Reducer | None, call: Call) -> Iterator[Answer]:
    """Each row of a call by itself."""
    options = call.options and {k: v for k, v in call.options.items() if k not in (*_SAME_ALONE, "sampling")}
    for row in call.rows:
        one = Call((row,), options=options)
        if reducer is None:
            yield _run(model, request.family, one, None)
        else:
            with foveate.apply(model, reducer) as session:
                yield _run(model, request.family, one, session)


# ------------------------------------------------------------------------------------------------------------ judging
def _differences(
    request: Request,
    model: Any,
    reducer: foveate.Reducer | None,
    answers: Sequence[Answer | Exception],
    tolerance: float,
) -> str:
    """What is wrong with the answers, "" if nothing is."""
    for number, (call, answer) in enumerate(zip(request.calls, answers)):
        if isinstance(answer, Exception):
            return f"call {number}: {type(answer).__name__}: {' '.join(str(answer).split())[:200]}"
        (inputs, places), sampled = _batch(request.family, call), "sampling" in (call.options or {})
        if sampled:
            again = _together(replace(request, calls=(call,), threads=1), model, reducer)[0]
            if isinstance(again, Exception) or not torch.equal(again.tokens, answer.tokens):
                return f"call {number}: the same seed draws other tokens"
        for b, (alone, place) in enumerate(zip(_alone(request, model, reducer, call), places)):
            said = _row_difference(answer, alone, b, place, inputs, call, sampled, tolerance)
            if said:
                return f"call {number}, row {b}: {said}"
    return ""


def _row_difference(
    answer: Answer,
    alone: Answer,
    b: int,
    place: slice,
    inputs: dict[str, Tensor],
    call: Call,
    sampled: bool,
    tol: float,
) -> str:
    if answer.visual is not None and alone.visual is not None and not torch.equal(answer.visual[b], alone.visual[0]):
        return f"visual tokens by layer {answer.visual[b].tolist()}, alone {alone.visual[0].tolist()}"
    if alone.visual is not None and answer.visual is None:
        return "no trace"
    if call.options is None:
        assert answer.logits is not None
        assert alone.logits is not None
        text = ~families.visual_slots(inputs["input_ids"][b, place])
        gap = (answer.logits[b, place] - alone.logits[0])[text].abs().max().item()
        return "" if gap <= tol else f"logits differ by {gap:.3g}"
    assert answer.tokens is not None
    assert alone.tokens is not None
    for step in range(alone.tokens.shape[1]):
        if answer.logits is not None and alone.logits is not None:
            gap = (answer.logits[b, step] - alone.logits[0, step]).abs().max().item()
            if not gap <= tol:
                return f"logits of step {step} differ by {gap:.3g}"
            if sampled or answer.tokens[b, step] != alone.tokens[0, step]:
                return ""  # a tie, or another draw: what follows does not compare
        elif not sampled and answer.tokens[b, step] != alone.tokens[0, step]:
            return f"token {step} is {int(answer.tokens[b, step])}, alone {int(alone.tokens[0, step])}"
    return ""


_judged = 0


def judge(request: Request) -> Verdict:
    """Run a request and judge it."""
    global _judged
    impl = "eager" if request.eager else "sdpa"
    model = _model(request.family, impl)
    _state(request.family, impl)
    _judged += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdict = _verdict(request, model, impl)
        damage = _damage(request.family, impl, _judged % _FULL_CHECK == 0)
    return Verdict("wrong", f"after the session: {damage}") if damage else verdict


def _verdict(request: Request, model: Any, impl: str) -> Verdict:
    try:
        reducer = _reducer(request)
        answers = _together(request, model, reducer)
        refused = [answer for answer in answers if isinstance(answer, REFUSALS)]
        if refused:
            return Verdict("refused", " ".join(str(refused[0]).split()))
        said = _differences(request, model, reducer, answers, TOLERANCE)
    except REFUSALS as error:
        return Verdict("refused", " ".join(str(error).split()))
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if not said:
        return Verdict("ok")
    for _ in range(3 if request.threads > 1 else 1):
        try:
            plain = _differences(request, model, None, _together(request, model, None), TOLERANCE)
        except Exception as error:
            plain = type(error).__name__
        if plain:
            return Verdict("plain", plain)
    try:
        one = replace(request, threads=1)
        if request.threads > 1 and not _differences(one, model, reducer, _together(one, model, reducer), TOLERANCE):
            return Verdict("wrong", f"only in threads: {said}")
        exact = _model(request.family, impl, double=True)
        if not _differences(request, exact, reducer, _together(request, exact, reducer), 1e-5):
            return Verdict("tie", said)
    except Exception:
        pass
    return Verdict("wrong", said)


# ------------------------------------------------------------------------------------------------------ intact models
def _digest(model: torch.nn.Module) -> str:
    digest = hashlib.blake2b()
    for tensor in [*model.parameters(), *model.buffers()]:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _light(model: torch.nn.Module) -> dict[str, Any]:
    return {
        name: (len(module.__dict__), "forward" in module.__dict__, *(len(getattr(module, kind)) for kind in _HOOKS))
        for name, module in model.named_modules()
    }


@functools.cache
def _state(name: str, impl: str) -> tuple[str, dict[str, Any], dict[str, Any], Tensor, dict[str, Tensor]]:
    """A model that nobody has touched: weights, hooks, attributes, logits."""
    model = _model(name, impl)
    probe = families.inputs(name, model, batch=1)
    with torch.no_grad():
        logits = model(**probe).logits
    return _digest(model), _light(model), footprint(model), logits, probe


def _damage(name: str, impl: str, thorough: bool) -> str:
    """What is not as it was, "" if everything is."""
    model, (digest, hooks, attributes, logits, probe) = _model(name, impl), _state(name, impl)
    if _digest(model) != digest:
        return "the weights changed"
    if _light(model) != hooks or (thorough and footprint(model) != attributes):
        return "hooks or attributes were left in the model"
    with torch.no_grad():
        same = torch.equal(model(**probe).logits, logits)
    return "" if same else "the plain model's logits changed"


# ---------------------------------------------------------------------------------------------------------- reduction
def smallest(request: Request, tries: int = 40) -> Request:
    """A simpler request that is wrong as well."""
    simpler = True
    while simpler and tries > 0:
        simpler = False
        for other in _simpler(request):
            tries -= 1
            if tries < 0:
                break
            if judge(other).outcome == "wrong":
                request, simpler = other, True
                break
    return request


def _simpler(request: Request) -> Iterator[Request]:
    if len(request.calls) > 1:
        for i in range(len(request.calls)):
            yield replace(request, calls=(request.calls[i],), threads=1)
    for changes in ({"threads": 1}, {"elsewhere": False}, {"eager": False}):
        if replace(request, **changes) != request:
            yield replace(request, **changes)
    for name in request.chosen:
        if name not in ("keep", "layer"):
            yield replace(request, chosen={k: v for k, v in request.chosen.items() if k != name})
    for i, call in enumerate(request.calls):
        for other in _simpler_call(call):
            yield replace(request, calls=(*request.calls[:i], other, *request.calls[i + 1 :]))


def _simpler_call(call: Call) -> Iterator[Call]:
    if call.options is not None:
        yield replace(call, options=None)
        for name in call.options:
            if name != "max_new_tokens":
                yield replace(call, options={k: v for k, v in call.options.items() if k != name})
    if len(call.rows) > 1:
        for i in range(len(call.rows)):
            yield replace(call, rows=call.rows[:i] + call.rows[i + 1 :])
    for changes in ({"padding": 0}, {"side": "left"}):
        if replace(call, **changes) != call:
            yield replace(call, **changes)
    for i, row in enumerate(call.rows):
        for other in (replace(row, images=1), replace(row, before=3, after=4), replace(row, seed=0)):
            if other != row:
                yield replace(call, rows=(*call.rows[:i], other, *call.rows[i + 1 :]))
