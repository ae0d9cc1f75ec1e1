"""The mask of a reduced layer, gathered out of that of transformers or left out, slot by slot."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.engine.test_from_nothing import KEYS, reach

import foveate
from foveate.engine.decoder.frame import ActiveSet
from foveate.engine.decoder.masks import Reach, reduced_mask
from foveate.engine.decoder.shared import SharedKeys


def all_real(window: int | None, past: int, length: int) -> Reach:
    """A row of which slots 2 and 3 are gone, no filler; the last `length` slots ask."""
    keys = torch.tensor([[slot for slot in range(past + length) if slot not in (2, 3)]])
    asked = keys[:, keys[0] >= past]
    return Reach(keys, asked, asked - past, None, False, past, length, window)


@pytest.mark.parametrize("columns", [12, 9, 5])
@pytest.mark.parametrize("queries", [3, 7])
@pytest.mark.parametrize("kind", ["bool", "least", "infinite"])
def test_a_mask_is_gathered(kind: str, queries: int, columns: int):
    """Columns that a mask of a sliding cache leaves out are seen by nobody; a filler sees something, else it is NaN."""
    asked = reach(None, queries)
    seen = torch.rand(2, 1, asked.length, columns, generator=torch.Generator().manual_seed(0)) < 0.5
    hidden = {"least": torch.finfo(torch.float32).min, "infinite": -torch.inf}.get(kind, 0.0)
    made = reduced_mask(seen if kind == "bool" else torch.where(seen, 0.0, hidden), asked, "sdpa", torch.float32)
    allowed = made if kind == "bool" else made == 0
    for row in range(2):
        for q in range(queries):
            if not asked.valid[row, q]:
                assert bool(allowed[row, 0, q].all())
                continue
            places = [slot - (12 - columns) for slot in KEYS[row]]
            line = seen[row, 0, asked.rows[row, q]]
            expected = [slot >= 0 and at >= 0 and bool(line[at]) for slot, at in zip(KEYS[row], places)]
            assert allowed[row, 0, q].tolist() == expected


@pytest.mark.parametrize("columns", [12, 9, 5])
def test_a_padding_mask_is_gathered(columns: int):
    asked = reach(None, 7)
    there = torch.arange(columns) % 4 != 1
    made = reduced_mask(there.long()[None], asked, "flash_attention_2", torch.float32)
    for row in range(2):
        places = [slot - (12 - columns) for slot in KEYS[row]]
        assert made[row].tolist() == [slot >= 0 and at >= 0 and bool(there[at]) for slot, at in zip(KEYS[row], places)]


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("window", [9, 10, 11, None])
def test_no_mask_is_made_as_long_as_the_window_holds(implementation: str, window: int | None):
    asked = all_real(window, 0, 10)
    if window != 9:
        assert reduced_mask(None, asked, implementation, torch.float32) is None
    elif implementation == "sdpa":
        made = reduced_mask(None, asked, implementation, torch.float32)
        assert made[0, 0, -1].tolist() == [False] + [True] * 7
    else:
        with pytest.raises(foveate.UnsupportedError, match="sdpa"):
            reduced_mask(None, asked, implementation, torch.float32)


def test_shared_keys_keep_the_window_of_their_layer_and_flash_attention_cannot_hide_among_them():
    """A single token after them can be served: what it must not see is masked as padding."""
    before, after = (ActiveSet.of(np.arange(10)[None] % n > 0, torch.device("cpu")) for n in (5, 2))
    for queries, implementation, served in (
        (5, "sdpa", True),
        (5, "flash_attention_2", False),
        (1, "flash_attention_2", True),
    ):
        shared = SharedKeys({4: 2}, 0, 10)
        shared.ran(2, replace(all_real(7, 0, 10), keys=before.index), before, None)
        rows = (after.index[:, -queries:], None, 0)
        if not served:
            with pytest.raises(foveate.UnsupportedError, match="sdpa"):
                shared.reach(4, 2, None, after, rows, queries, False, implementation)
            continue
        found = shared.reach(4, 2, None, after, rows, queries, False, implementation)
        assert found.window == 7
        assert found.keys.tolist() == [[slot if slot % 2 else -1 for slot in before.index[0].tolist()]]


@pytest.mark.parametrize(("past", "length", "needed"), [(9, 1, False), (6, 4, True), (0, 10, False)])
def test_several_tokens_over_a_cache_need_a_mask(past: int, length: int, needed: bool):
    made = reduced_mask(None, all_real(None, past, length), "sdpa", torch.float32)
    assert (made is not None) == needed


def test_flash_attention_is_told_of_fillers_alone():
    asked = reach(None, 7)
    made = reduced_mask(None, asked, "flash_attention_2", torch.float32)
    assert made.tolist() == [[slot >= 0 for slot in row] for row in KEYS]
    assert reduced_mask(None, replace(asked, filled=False), "flash_attention_2", torch.float32) is None
