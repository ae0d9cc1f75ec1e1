"""The compatibility page is what was counted, and what was counted is still so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers as hf

from tests import catalogue
from tests.catalogue.__main__ import counted
from tests.catalogue.count import FEATURES, IN_DECODER, IN_TOWER, TOLERANCE
from tests.catalogue.page import page

DOCS = Path(__file__).parents[2] / "docs"
COUNTED = json.loads((DOCS / "compatibility.json").read_text())
EVERYTHING = [*IN_DECODER, *IN_TOWER, *FEATURES]
AGAIN = ["llava", "lfm2_vl", "minicpmv4_6", "mistral3", "smolvlm"]
"""Of different kinds, and quick: counted again by CI. All are by `make compatibility`."""


def test_the_page_is_what_was_counted():
    written = (DOCS / "compatibility.md").read_text()
    assert written == page(COUNTED["classes"], COUNTED["transformers"], TOLERANCE)


def test_nothing_that_was_counted_is_wrong():
    found = {words.split(":")[0] for verdicts in COUNTED["classes"].values() for words in verdicts.values()}
    assert found <= {"exact", "refused", "not tried"}
    assert list(COUNTED["classes"]) == catalogue.NAMES


@pytest.mark.slow
@pytest.mark.parametrize("name", AGAIN)
def test_a_cell_that_was_exact_still_is(name: str):
    if hf.__version__ != COUNTED["transformers"]:
        pytest.skip(f"counted under transformers {COUNTED['transformers']}")
    found = counted(name, "sdpa", 300.0)
    recorded = COUNTED["classes"][name]
    assert {what: found[what] for what in EVERYTHING} == {what: recorded[what] for what in EVERYTHING}


def test_a_cell_names_what_works_and_the_reason_of_the_rest():
    verdicts = dict.fromkeys(EVERYTHING, "exact") | {"sparsevlm": "refused: several copies", "beams": "refused: alone"}
    text = page({"llava": verdicts}, "5", 1e-3)
    assert "| yes | yes | 2 | yes |" not in text
    (row,) = [line for line in text.splitlines() if "(`llava`)" in line]
    assert row.endswith("| random, fastv, vtw, divprune; else 1 | yes | yes | no: 2 | yes |")
    assert "1. refused: several copies" in text
    assert "**0 of 1** classes" in text
