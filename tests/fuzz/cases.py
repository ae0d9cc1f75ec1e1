"""What a request can be: a model, a method, and calls from one or several threads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from tests.families import FAMILIES

__all__ = ["Call", "Request", "Row", "requests"]


@dataclass(frozen=True)
class Row:
    """One prompt: words, images, words after each of them."""

    images: int = 1
    before: int = 3
    after: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Call:
    """One batch, and how the model is called with it.

    Attributes:
        padding: slots of padding more than the longest row needs.
        side: where the padding goes; on the right only in a plain forward pass, as generate() pads on the left.
        options: of `generate`; None for a forward pass.
    """

    rows: tuple[Row, ...] = (Row(),)
    padding: int = 0
    side: str = "left"
    options: dict[str, Any] | None = None


@dataclass(frozen=True)
class Request:
    """A method in a model, called from `threads` threads.

    Attributes:
        elsewhere: the session is entered and left by a thread that makes no call.
    """

    family: str = "llava"
    method: str = "random"
    chosen: dict[str, Any] = field(default_factory=dict)
    calls: tuple[Call, ...] = (Call(),)
    threads: int = 1
    elsewhere: bool = False
    eager: bool = False


_KEEP = st.one_of(st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]), st.integers(1, 20))
_LAYER = st.integers(1, 5)


def _with(**more: st.SearchStrategy) -> st.SearchStrategy:
    return st.fixed_dictionaries({"keep": _KEEP}, optional={"faithful": st.just(True), **more})


_METHODS: dict[str, st.SearchStrategy] = {
    "averagepool": _with(), "cdpruner": _with(), "dart": _with(layer=_LAYER), "divprune": _with(),
    "downsample": _with(), "dycoke": _with(), "evs": _with(), "fastv": _with(layer=_LAYER), "fastvid": _with(),
    "fopru": _with(), "pitome": _with(where=st.just("output")), "prumerge": _with(), "prumerge+": _with(),
    "pumer": st.just({}), "pyramiddrop": _with(), "random": _with(seed=st.integers(0, 3)),
    "recoverable": _with(similarity=st.just("llm")),
    "sparsevlm": _with(variant=st.sampled_from(["1.0", "1.5", "2.0", "paper"])), "tome": _with(where=st.just("output")),
    "vidcom2": _with(),
    "visionzip": _with(), "vispruner": _with(),
    "vtw": st.one_of(st.fixed_dictionaries({"layer": st.integers(0, 5)}), st.fixed_dictionaries({"keep": _KEEP})),
    "chain": _KEEP.map(lambda keep: {"keep": keep}),
}  # fmt: skip

_ROW = st.builds(
    Row, st.sampled_from([1, 1, 1, 2, 0, 3]), st.integers(1, 6), st.integers(1, 6), st.integers(0, 3)
)  # fmt: skip
_GENERATE = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(1, 3)},
    optional={
        "sampling": st.integers(0, 9), "num_beams": st.just(2), "use_cache": st.just(False),
        "prefill_chunk_size": st.integers(4, 20), "prompt_lookup_num_tokens": st.just(2),
        "return_dict_in_generate": st.just(False), "repetition_penalty": st.just(1.3),
    },
)  # fmt: skip


@st.composite
def _calls(draw: st.DrawFn) -> Call:
    rows = tuple(draw(st.lists(_ROW, min_size=1, max_size=4)))
    options = draw(st.one_of(st.none(), _GENERATE))
    if options is not None and "prompt_lookup_num_tokens" in options:
        rows = rows[:1]  # transformers serves one row
        options = {k: v for k, v in options.items() if k not in ("num_beams", "sampling", "use_cache")}
    if options is not None and "sampling" in options:
        options.pop("num_beams", None)
    side = draw(st.sampled_from(["left", "right"])) if options is None else "left"
    return Call(rows, draw(st.sampled_from([0, 0, 1, 4])), side, options)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Any request."""
    method = draw(st.sampled_from(sorted(_METHODS)))
    threads = draw(st.sampled_from([1, 1, 2, 4]))
    calls = draw(st.lists(_calls(), min_size=1 if threads == 1 else 2, max_size=1 if threads == 1 else threads))
    if threads > 1:  # the generator of random numbers is shared by all threads
        calls = [
            Call(c.rows, c.padding, c.side, c.options and {k: v for k, v in c.options.items() if k != "sampling"})
            for c in calls
        ]
    return Request(
        draw(st.sampled_from(FAMILIES)), method, draw(_METHODS[method]), tuple(calls), threads,
        draw(st.booleans()), draw(st.sampled_from([False, False, True])),
    )  # fmt: skip
