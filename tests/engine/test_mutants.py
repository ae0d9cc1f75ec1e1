"""Deliberate faults: the checks of this suite must notice every one of them, in every kind of family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.engine import test_exact, test_lane, test_outputs, test_taps
from tests.families import inputs
from tests.reference.checks import assert_exact, build_once
from tests.reference.plans import draw_removed
from torch import Tensor

import foveate
from foveate.engine.decoder import cache, forward_pass, frame, lane, layer_inputs, masks, session, taps
from foveate.engine.decoder.session import DecoderSession
from foveate.reduction import TapSpec

Patch = Callable[[pytest.MonkeyPatch], None]

PLANS = [{1: [4]}, {1: [4, 7]}, {-1: [5, 6]}, {-1: [8, 9], 1: [4, 7], 3: [2, 0]}]
"""One row, ragged rows, before layer 0, several stages."""
NAMES = ["llava", "qwen3_vl", "gemma3_window"]
"""A plain decoder, one with several position axes and DeepStack, one with windows and bidirectional blocks."""


# ------------------------------------------------------------------------------------------------------- the faults
def compact_rope(patch: pytest.MonkeyPatch) -> None:
    """Positions as if the removed tokens had never been."""

    def first_positions(rope: Any, index: Tensor, length: int) -> Any:
        return frame.take_rope(rope, torch.arange(index.shape[1]).expand_as(index), length)

    patch.setattr(layer_inputs, "take_rope", first_positions)


def no_mask(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layer_inputs, "reduced_mask", lambda *args: None)


def wrong_columns(patch: pytest.MonkeyPatch) -> None:
    """The mask's first columns instead of those of the kept tokens."""

    def first_columns(mask: Any, reach: masks.Reach, *rest: Any) -> Any:
        keys = torch.where(reach.keys < 0, -1, torch.arange(reach.keys.shape[1]).expand_as(reach.keys))
        return masks.reduced_mask(mask, replace(reach, keys=keys), *rest)

    patch.setattr(layer_inputs, "reduced_mask", first_columns)


def wrong_rows(patch: pytest.MonkeyPatch) -> None:
    """The mask's last rows instead of those of the queries that are left."""

    def last_rows(mask: Any, reach: masks.Reach, *rest: Any) -> Any:
        if reach.rows is not None:
            n = reach.rows.shape[1]
            reach = replace(reach, rows=torch.arange(reach.length - n, reach.length).expand_as(reach.rows))
        return masks.reduced_mask(mask, reach, *rest)

    patch.setattr(layer_inputs, "reduced_mask", last_rows)


def wrong_scatter(patch: pytest.MonkeyPatch) -> None:
    """Rows written to the end of the frame instead of to their slots."""

    def to_the_end(states: Tensor, active: frame.ActiveSet, rows: Tensor) -> Tensor:
        return torch.cat([states[:, : -rows.shape[1]], rows], 1)

    for module in (forward_pass, lane):
        patch.setattr(module, "put_rows", to_the_end)


def wrong_gather(patch: pytest.MonkeyPatch) -> None:
    """The last rows of the frame run instead of the active ones."""
    patch.setattr(forward_pass, "take_rows", lambda states, active: states[:, -active.size :])


def physical_length(patch: pytest.MonkeyPatch) -> None:
    """The cache admits how few tokens it stores."""
    patch.setattr(cache.LogicalLayer, "get_seq_length", lambda self: self.physical_length())
    patch.setattr(cache.LogicalLayer, "get_mask_sizes", lambda self, length: (self.physical_length() + length, 0))


def visible_fillers(patch: pytest.MonkeyPatch) -> None:
    """Fillers of ragged rows count as keys: the masked slot they point at becomes a token."""

    def all_real(mask: Any, reach: masks.Reach, *rest: Any) -> Any:
        rows = reach.keys.clamp_min(0)
        first = rows.masked_fill(reach.keys < 0, reach.total - 1).amin(1, keepdim=True)
        return masks.reduced_mask(mask, replace(reach, keys=torch.where(reach.keys < 0, first, rows)), *rest)

    patch.setattr(layer_inputs, "reduced_mask", all_real)


MUTANTS = [
    compact_rope, no_mask, wrong_columns, wrong_rows, wrong_scatter, wrong_gather, physical_length, visible_fillers,
]  # fmt: skip


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Patch], None]]:
    """Apply a fault; a session that it breaks half-way is taken out of the model all the same."""
    yield lambda mutant: mutant(monkeypatch)
    monkeypatch.undo()


def _caught(check: Callable[[], Any]) -> bool:
    try:
        check()
    except (AssertionError, RuntimeError, ValueError, IndexError):
        return True
    return False


def _exactness(name: str) -> list[Callable[[], Any]]:
    model = build_once(name)
    checks = []
    for counts in PLANS:
        prompt = inputs(name, model, batch=len(next(iter(counts.values()))))
        removed = draw_removed(prompt["input_ids"], counts)
        checks.append(lambda prompt=prompt, removed=removed: assert_exact(model, prompt, removed))
    return checks


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in NAMES])
def test_without_a_fault_all_is_well(name: str):
    assert not any(_caught(check) for check in _exactness(name))


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in NAMES])
def test_a_fault_is_caught(name: str, mutant: Patch, mutate: Callable[[Patch], None]):
    checks = _exactness(name)
    mutate(mutant)
    assert any(_caught(check) for check in checks)


# --------------------------------------------------------------------------- faults that other checks are there for
def test_a_change_of_the_frame_that_is_not_seen_is_caught(monkeypatch: pytest.MonkeyPatch):
    """The next layer takes the rows as they were, whoever has looked at the frame and changed it in place."""
    real = lane.short_rows
    blind = lambda value, active=None: value.rows if isinstance(value, lane.LazyFrame) else real(value, active)  # noqa: E731
    monkeypatch.setattr(forward_pass, "short_rows", blind)
    assert _caught(lambda: test_outputs.test_hooks_that_change_states_take_effect("llava", True, "after"))


def test_logits_of_the_wrong_rows_are_caught(monkeypatch: pytest.MonkeyPatch):
    """The end of a frame is taken to be the end of its rows, although the last slots of some rows are padding."""
    monkeypatch.setattr(lane, "_end_of", lambda frame, index: frame.rows[:, index[1].start :])
    assert _caught(test_lane.test_the_end_of_a_frame_comes_from_its_rows_where_all_of_it_ran)


def test_a_forgotten_label_rule_is_caught(monkeypatch: pytest.MonkeyPatch):
    """The image token that predicts the first word of the answer is removed."""
    monkeypatch.setattr(session, "required_slots", lambda *args: None)
    assert _caught(lambda: test_exact.test_training(("llava", build_once("llava"))))


def test_a_softmax_over_visual_keys_only_is_caught(monkeypatch: pytest.MonkeyPatch):
    """The classical shortcut: attention re-normalised over what is ranked."""
    whole = taps.attention_rows

    def shortcut(query: Tensor, key: Tensor, *rest: Any) -> Tensor:
        weights = whole(query, key, *rest)
        weights[..., -9:] = 0
        return weights / weights.sum(-1, keepdim=True)

    monkeypatch.setattr(taps, "attention_rows", shortcut)
    assert _caught(lambda: test_taps.test_rows_are_those_of_eager_attention("llava", "sdpa"))


def test_a_tap_without_the_mask_is_caught(monkeypatch: pytest.MonkeyPatch):
    whole = taps.attention_rows

    def unmasked(query: Tensor, key: Tensor, rows: Tensor, allowed: Any, bias: Any, *rest: Any) -> Tensor:
        return whole(query, key, rows, None, None, *rest)

    monkeypatch.setattr(taps, "attention_rows", unmasked)
    assert _caught(lambda: test_taps.test_rows_are_those_of_eager_attention("llava", "sdpa"))


@torch.no_grad()
def test_candidates_shown_to_a_method_are_caught(monkeypatch: pytest.MonkeyPatch):
    """In prompt-lookup decoding the first pass holds more than the prompt."""
    monkeypatch.setattr(
        DecoderSession, "_watch_generate", lambda self, generate: lambda *args, **kwargs: generate(*args, **kwargs)
    )
    assert _caught(lambda: test_exact.test_prompt_lookup_decoding(("llava", build_once("llava"))))


def test_the_mutants_left_nothing_behind():
    model = build_once("llava")
    prompt = inputs("llava", model)
    reducer = test_taps.Watch(draw_removed(prompt["input_ids"], PLANS[1]), {1: TapSpec("last")})
    with torch.no_grad(), foveate.apply(model, reducer):
        model(**prompt)
    assert_exact(model, prompt, draw_removed(prompt["input_ids"], PLANS[-1]))
