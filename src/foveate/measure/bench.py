"""Methods against the unreduced model, interleaved in one run: where the time goes, what is computed and stored.

Beside the methods runs a reducer that nobody can beat from inside the decoder: it drops every visual token before the
first layer, at no cost of deciding. Its time is what Amdahl's law leaves; it says how much of a speed-up was to be had.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..engine.apply import apply
from ..engine.families.parts import resolve
from ..engine.trace import Trace
from ..reduction import BEFORE_LAYERS, Decision, Reducer, UnsupportedError, View
from .flops import kv_bytes
from .geometry import Geometry
from .latency import Run, timed
from .memory import Peak, peak_memory
from .vision_flops import PrefillFlops, prefill_flops, untouched

__all__ = ["FULL", "LIMIT", "Measured", "NoVisual", "Spread", "bench", "counted_flops"]

FULL, LIMIT = "full model", "no visual tokens"
"""Names of the two that are always measured: the unreduced model, and the limit of every method in the decoder."""

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


class NoVisual(Reducer):
    """Drops all visual tokens before layer 0: the perfect reducer of Amdahl's law, blind and free."""

    stages = (BEFORE_LAYERS,)

    def decide(self, view: View) -> Decision:
        return Decision(keep=~view.visual)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value; of a single one, that."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
        return cls(median, low, high)

    def to_json(self) -> dict[str, float]:
        """As it is written to files."""
        return {"median": self.median, "q1": self.low, "q3": self.high}


@dataclass
class Measured:
    """One method, or the unreduced model.

    Attributes:
        entering, after: visual tokens per row, means over the decoder layers: what entered them (what the compute is),
            and what was left after them (what SparseVLM's tables print).
        flops: analytic, of the prefill of the batch; None where it cannot be worked out.
        kv_bytes: of the cache after the prefill; None likewise.
        runs: the timed answers, one per repeat, in the order of the repeats.
        peak: memory in one more answer.
        counted: FLOPs of the prefill as torch counts them on eager attention, if asked for.
        error: why nothing else is known of this method.
    """

    name: str
    reducer: Reducer | None
    entering: float = 0.0
    after: float = 0.0
    flops: PrefillFlops | None = None
    kv_bytes: int | None = None
    runs: list[Run] = field(default_factory=list)
    peak: Peak = field(default_factory=Peak)
    counted: int | None = None
    error: str = ""

    def times(self, what: str) -> list[float]:
        """Milliseconds of the field `what` of `Timing`, by repeat."""
        return [getattr(run.timing, what) for run in self.runs]

    def spread(self, what: str) -> Spread:
        """Of the field `what` of `Timing`."""
        return Spread.of(self.times(what))

    def speedup(self, full: Measured, what: str = "prefill") -> Spread:
        """How many times faster than `full`: ratios within the repeats, so that what slows both does not count."""
        return Spread.of([a / b for a, b in zip(full.times(what), self.times(what), strict=True) if b])


def bench(
    model: Any,
    inputs: Mapping[str, Any],
    methods: Mapping[str, Reducer],
    new_tokens: int = 16,
    repeats: int = 5,
    counted: bool = False,
    progress: Progress | None = None,
) -> list[Measured]:
    """Measure every method, the unreduced model and the limit on the same inputs.

    The methods take turns: each repeat runs all of them once, every other repeat backwards, so that whoever shares the
    machine slows all of them alike. A first round is not counted; a last one, also uncounted, reads the peak memory.

    Args:
        model: a vision-language model; given back as it was.
        inputs: of `generate`, with images; all rows in one batch.
        methods: by the name they shall have.
        new_tokens: tokens of each answer.
        repeats: counted rounds.
        counted: also let torch count the FLOPs of a prefill on eager attention (one more prefill each).

    Returns:
        The unreduced model, the methods in their order, the limit. A method whose logits are no numbers has an `error`
        and no times.

    Raises:
        UnsupportedError: whatever `apply` raises, inputs without an image, or a model that answers NaN unreduced.
    """
    everyone = [Measured(FULL, None), *(Measured(name, reducer) for name, reducer in methods.items())]
    everyone.append(Measured(LIMIT, NoVisual()))
    done, rounds = 0, repeats + 2

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, rounds * len(everyone))

    for each in everyone:
        run = timed(model, inputs, each.reducer, new_tokens, check=True)
        _describe(each, model, inputs, run.trace)
        if not run.sound:
            each.error = f"{each.name}: logits are NaN or infinite"
            if each.name in (FULL, LIMIT):
                raise UnsupportedError(each.error)
        advance()
    sound = [each for each in everyone if not each.error]
    for turn in range(repeats):
        for each in sound[:: -1 if turn % 2 else 1]:
            each.runs.append(timed(model, inputs, each.reducer, new_tokens))
            advance()
    device = next(resolve(model).model.parameters()).device
    for each in sound:
        with peak_memory(device) as each.peak:
            timed(model, inputs, each.reducer, new_tokens)
        each.counted = counted_flops(model, inputs, each.reducer) if counted else None
        advance()
    return everyone


def _describe(each: Measured, model: Any, inputs: Mapping[str, Any], trace: Trace | None) -> None:
    """Token counts, FLOPs and cache of a method, from the trace of its warm-up."""
    if trace is None:
        if each.reducer is not None:
            raise UnsupportedError(f"{each.name}: the prompt holds no visual token, so nothing was reduced")
        trace = untouched(resolve(model), inputs)
    each.entering = float(trace.mean_visual_tokens.mean())
    each.after = float(trace.mean_visual_tokens_after.mean())
    try:
        each.flops = prefill_flops(model, trace, inputs)
    except (UnsupportedError, ValueError):  # a tower or a mixture of experts that cannot be followed on paper
        each.flops = None
    try:
        shape = Geometry.from_config(model.config, visual_tokens=0, text_tokens=0)
        each.kv_bytes = kv_bytes(shape, trace, next(model.parameters()).element_size(), fillers=True)
    except ValueError:
        each.kv_bytes = None


@torch.inference_mode()
def counted_flops(model: Any, inputs: Mapping[str, Any], reducer: Reducer | None) -> int:
    """FLOPs of one prefill as `torch.utils.flop_counter` counts them, on eager attention: deciding included.

    FlashAttention and SDPA do the same work or less; their kernels hide it from the counter on a CPU.
    """
    before = {part: part.config._attn_implementation for part in _configured(model)}
    model.set_attn_implementation("eager")
    try:
        session = apply(model, reducer) if reducer is not None else None
        try:
            with FlopCounterMode(display=False) as counter:
                model(**inputs, use_cache=True, logits_to_keep=1)
        finally:
            if session is not None:
                session.remove()
    finally:
        for part, implementation in before.items():
            part.config._attn_implementation = implementation
    return int(counter.get_total_flops())


def _configured(model: Any) -> list[Any]:
    """Modules whose config says how attention is computed; each config once."""
    seen: dict[int, Any] = {}
    for part in model.modules():
        config = getattr(part, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            seen.setdefault(id(config), part)
    return list(seen.values())
