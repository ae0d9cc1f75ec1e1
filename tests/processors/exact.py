"""A conversation held against the references of the catalogue: exact, or said what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import foveate
from tests.catalogue.count import Reference, differ, generate, recorded
from tests.processors.media import Message, encoded

__all__ = ["DECODER", "TOWER", "judged"]

DECODER: dict[str, dict[str, Any]] = {
    "random": {"keep": 0.5},
    "divprune": {"keep": 0.5},
    "fastv": {"keep": 0.5, "layer": 1},
    "sparsevlm": {"keep": 0.5},
    "vtw": {"layer": 2},
}
TOWER: dict[str, dict[str, Any]] = {"visionzip": {"keep": 0.5}}


@torch.no_grad()
def judged(
    vlm: tuple[Any, Any],
    conversations: Sequence[list[Message]],
    method: str,
    alone: bool = False,
    **options: Any,
) -> foveate.Trace:
    """Four greedy steps of a batch equal those of the reference.

    Args:
        vlm: model and processor.
        conversations: one per row.
        method: and its `options`, as for `foveate.build`.
        alone: hold the batch against each row alone, too.

    Returns:
        The trace of the batch.

    Raises:
        Wrong: what differs.
        UnsupportedError: the model or the method is refused.
    """
    model, processor = vlm
    prompt = encoded(processor, conversations)
    rows = [encoded(processor, [conversation]) for conversation in conversations]
    plain = generate(model, prompt)
    merges: list[tuple[int, Tensor, Tensor]] = []
    with foveate.apply(model, foveate.build(method, **options)) as session:
        own = session.reducer.positions
        session.reducer.positions = "keep"  # what a masked twin can be told
        with recorded(session, merges):
            found = generate(model, prompt)
        trace = session.trace
        session.reducer.positions = own
        together = generate(model, prompt) if alone else found
        answers = [generate(model, row) for row in rows] if alone else []
    assert trace is not None, "nothing was seen"
    removed = (trace.visual & trace.tokens & ~trace.active(trace.stages[-1])).any(1)
    assert torch.equal(removed, trace.visual.any(1)), "every row with an image loses some of it"
    expected = Reference(model, trace, merges, lambda _, row: rows[row]).generate(prompt)
    differ(f"{method}: generate", found, expected)
    effect, error = (expected - plain)[removed].abs().max(), (found - expected).abs().max()
    assert effect > max(10 * error, 1e-4), "the reference shows no effect: nothing was checked"
    for row, answer in enumerate(answers):
        if torch.allclose(generate(model, rows[row])[0], plain[row], atol=1e-3):
            differ(f"{method}: row {row} alone", answer[0], together[row])
    return trace
