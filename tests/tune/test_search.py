"""The search: what it chooses, what it shares, and that it goes on where it was stopped."""

from __future__ import annotations

import dataclasses

import pytest

import foveate
from foveate.evaluate import answer as answering
from foveate.evaluate import data as datasets
from foveate.recipe import Recipe
from foveate.reduction import options
from foveate.tune import Bounds, Family, Journal, families, round_sizes, search


@pytest.fixture(scope="module")
def vlm():
    return answering.load("zoo:tiny-llava")


@pytest.fixture(scope="module")
def rounds(vlm):
    questions = datasets.load("easy-vqa", 8, 3)
    return [[(range(0, 4), vlm.inputs(questions[:4]))], [(range(4, 8), vlm.inputs(questions[4:]))]]


GRID = [
    Family("random", tuple(Recipe("random", {"keep": keep}) for keep in (0.01, 0.5, 0.9))),
    Family("vtw", tuple(Recipe("vtw", {"layer": layer}) for layer in (0, 5))),
]


def verdict(result):
    return [(s.recipe.id, s.state, s.gaps, s.kl, s.flops, s.estimate) for s in result.trials]


def test_the_cheapest_that_is_good_enough(vlm, rounds):
    result = search(vlm.model, rounds, GRID, Bounds(0.3), 4)
    assert result.chosen is not None
    assert result.chosen.recipe.id in ("random@0.5", "random@0.9", "vtw[layer=5]")
    assert result.chosen.estimate.changed_upper <= 0.3
    finished = [s for s in result.trials if len(s.gaps) == 8 and s.state == "active"]
    assert all(s.cost >= result.chosen.cost for s in finished)
    assert result.evaluations < 5 * 8
    assert result.prefills < result.prefills_exhaustive
    blind = next(s for s in result.trials if s.recipe.id == "vtw[layer=0]")  # sees no image at all
    assert blind.state != "passed"


def test_nothing_is_good_enough_for_a_bound_of_nothing(vlm, rounds):
    result = search(vlm.model, rounds, GRID, Bounds(0.0, 0.0), 4)
    assert result.chosen is None
    assert all(trial.state == "refuted" for trial in result.trials)


def test_a_stopped_search_goes_on_to_the_same_result(vlm, rounds, tmp_path):
    class Stopped(Exception):
        pass

    class Breaking(Journal):
        def add(self, measurement):
            if len(self) == 3:
                raise Stopped
            return super().add(measurement)

    path = tmp_path / "recipe.yaml.journal"
    with pytest.raises(Stopped):
        search(vlm.model, rounds, GRID, Bounds(0.3), 4, Breaking(path, {"seed": 3}))
    with path.open("a") as file:
        file.write('{"candidate": "ran')  # cut off in the middle of a line
    journal = Journal(path, {"seed": 3})
    assert len(journal) == 3
    again, whole = (search(vlm.model, rounds, GRID, Bounds(0.3), 4, j) for j in (journal, Journal(None)))
    assert verdict(again) == verdict(whole)
    assert (again.prefills, again.evaluations) == (whole.prefills, whole.evaluations)
    with pytest.raises(foveate.OptionError, match="belongs to another search"):
        Journal(path, {"seed": 4})
    path.write_text("hello\n")
    with pytest.raises(foveate.OptionError, match="no journal"):
        Journal(path, {"seed": 3})


def test_methods_that_cannot_work_are_refused_not_fatal(vlm, rounds):
    grid = [
        Family("fastv", (Recipe("fastv", {"keep": 0.5, "layer": 17}),)),
        Family("random", GRID[0].candidates[1:]),
    ]
    result = search(vlm.model, rounds[:1], grid, Bounds(0.5), 2)
    assert result.trials[0].state == "refused"
    assert "17" in result.trials[0].reason
    assert result.chosen is not None


def test_every_method_with_a_budget_is_in_the_grid():
    grid = families(6)
    searched = {candidate.method for family in grid for candidate in family.candidates}
    assert searched == {name for name in foveate.names() if "keep" in options(name)}
    for family in grid:
        for candidate in family.candidates:
            assert candidate.build().name == candidate.method
    assert len({candidate.id for family in grid for candidate in family.candidates}) == sum(
        len(family.candidates) for family in grid
    )
    with pytest.raises(foveate.OptionError, match="fastw"):
        families(6, ["fastw"])
    with pytest.raises(foveate.OptionError, match="pumer"):
        families(6, ["pumer"])
    with pytest.raises(foveate.OptionError, match="twice"):
        families(6, ["vtw", "vtw"])


def test_rounds_double():
    assert round_sizes(64) == [8, 8, 16, 32]
    assert [sum(round_sizes(n)) for n in (1, 2, 3, 7, 20)] == [1, 2, 3, 7, 20]


def test_measurements_are_plain(tmp_path):
    from foveate.tune.journal import Measurement

    journal = Journal(tmp_path / "j", None)
    kept = journal.add(Measurement("vtw layer=2", [0, 1], [0.1, float("-inf")], [0.0, 1e-9], 12.5))
    assert Journal(tmp_path / "j", None).find("vtw layer=2", (0, 1)) == dataclasses.replace(kept)
    journal.remove()
    assert not (tmp_path / "j").exists()
