"""Masks and taps that are made without a mask of transformers to gather from, slot by slot."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate.engine.decoder.masks import Reach, reduced_mask
from foveate.engine.decoder.taps import read_rows
from foveate.reduction import TapSpec

KEYS = [[0, 1, 4, 5, 9, 10, 11], [0, 3, 4, 8, 9, 11, -1]]
"""Logical slots of what is stored, -1 for a filler."""


def reach(window: int | None, queries: int) -> Reach:
    """The last `queries` keys of row 0, and one fewer and a filler of row 1, ask."""
    keys = torch.tensor(KEYS)
    asked, length = keys[:, -queries:], 12 if queries == keys.shape[1] else queries
    past = 12 - length
    valid = asked >= 0
    return Reach(keys, asked.clamp_min(0), (asked - past).clamp_min(0), valid, True, past, length, window)


def sees(key: int, query: int, window: int | None) -> bool:
    return 0 <= key <= query and (window is None or key > query - window)


@pytest.mark.parametrize("window", [None, 1, 2, 6, 7, 11, 12])
@pytest.mark.parametrize("queries", [3, 7])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_mask_made_from_nothing(implementation: str, queries: int, window: int | None):
    asked = reach(window, queries)
    made = reduced_mask(None, asked, implementation, torch.float32)
    assert made is not None
    allowed = made == 0 if implementation == "eager" else made
    for row in range(2):
        for q in range(queries):
            if asked.valid is not None and not asked.valid[row, q]:
                assert bool(allowed[row, 0, q].all())  # a filler: whatever it sees, it is never NaN
                continue
            query = int(asked.queries[row, q])
            assert allowed[row, 0, q].tolist() == [sees(key, query, window) for key in KEYS[row]]


def expected_rows(
    query: Tensor, key: Tensor, asked: Reach, window: int | None, scaling: float, softcap: float | None
) -> Tensor:
    """(B, H, n, N), one number after the other."""
    batch, heads, count, dim = query.shape
    groups = heads // key.shape[1]
    rows = torch.zeros(batch, heads, count, key.shape[2])
    for b in range(batch):
        for h in range(heads):
            for q in range(count):
                logits = []
                for n, slot in enumerate(KEYS[b]):
                    dot = scaling * sum(float(query[b, h, q, d] * key[b, h // groups, n, d]) for d in range(dim))
                    dot = dot if softcap is None else softcap * math.tanh(dot / softcap)
                    logits.append(dot if sees(slot, int(asked.queries[b, q]), window) else -math.inf)
                rows[b, h, q] = torch.tensor(logits).softmax(0)
    return rows


@pytest.mark.parametrize(
    "options",
    [{}, {"scaling": 0.7}, {"scaling": 0.1, "softcap": 2.0}, {"softcap": 0.5}, {"sliding_window": 6}],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("heads", ["none", "mean"])
def test_rows_of_a_tap_made_from_nothing(options: dict[str, float], heads: str):
    generator = torch.Generator().manual_seed(0)
    asked = reach(options.get("sliding_window"), 7)
    query, key = (torch.randn(2, h, 7, 5, generator=generator) for h in (4, 2))
    wanted = torch.zeros(2, 12, dtype=torch.bool)
    for row in range(2):
        wanted[row, [slot for slot in KEYS[row] if slot >= 0]] = True
    tap = read_rows(TapSpec(wanted, heads=heads), wanted, asked.queries, asked, query, key, None, options)
    scaling = options.get("scaling", 5**-0.5)
    rows = expected_rows(query, key, asked, options.get("sliding_window"), scaling, options.get("softcap"))
    assert tap.row_valid.sum(1).tolist() == [7, 6]
    assert tap.key_slots.tolist() == KEYS
    for b, count in ((0, 7), (1, 6)):
        found = tap.weights[b, ..., tap.row_valid[b], :]
        same = rows[b, :, :count] if heads == "none" else rows[b, :, :count].mean(0)
        assert torch.allclose(found, same, atol=1e-5)
