"""A model that answers NaN is not as good as the full one: every measurement says so, and goes on with the others."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
from dataclasses import dataclass

import pytest
import torch

import foveate
from foveate.evaluate import answer as answering
from foveate.evaluate import grid, runner
from foveate.evaluate.compare import compare
from foveate.evaluate.data import Sample, load
from foveate.evaluate.grid import FULL
from foveate.evaluate.metrics import METRICS
from foveate.evaluate.results import verdicts
from foveate.evaluate.stats import Clusters
from foveate.evaluate.store import Folder, Plan
from foveate.evaluate.sweep import Questions, fingerprint, sweep
from foveate.measure.bench import FULL as UNREDUCED
from foveate.measure.bench import bench
from foveate.ops.logits import has_softmax
from foveate.recipe import Recipe
from foveate.tune import (
    Bounds,
    Family,
    Reference,
    choose_layer,
    estimate,
    next_token_divergence,
    search,
    withdrawal_curve,
)
from foveate.view.folder import read
from foveate.view.report import write_report
from tests import families
from tests.reference.checks import build_once
from tests.test_cli import ZOO, complaint, invoke

NAN, INF = math.nan, math.inf


pytestmark = pytest.mark.slow  # whole commands


@dataclass
class Poison(foveate.Reducer):
    """Drops half of the visual tokens and writes NaN over one that stays."""

    keep: float = 0.5
    seed: int = 0
    value: float = NAN

    stages = (0,)

    def decide(self, view: foveate.View) -> foveate.Decision:
        slots = view.visual.int().argmax(1, keepdim=True)
        values = view.hidden.new_full((len(slots), 1, view.hidden.shape[2]), self.value)
        keep = ~view.visual | (view.visual.cumsum(1) % 2 == 1)
        return foveate.Decision(keep=keep, slots=slots, values=values)


class Never(foveate.Reducer):
    """Serves nothing as soon as a batch has a second row."""

    stages = (0,)

    def decide(self, view: foveate.View) -> foveate.Decision:
        if len(view.visual) > 1:
            raise foveate.UnsupportedError("one row\nonly")
        return foveate.Decision(keep=view.active)


@pytest.fixture(scope="module")
def vlm():
    return answering.load("zoo:tiny-llava")


@contextlib.contextmanager
def broken_head(model, step: int = 0):
    """NaN logits from the `step`-th forward pass of a model on, as an overflow in half precision gives them."""
    calls = iter(range(10**6))
    hook = model.lm_head.register_forward_hook(lambda *call: call[-1] * (NAN if next(calls) >= step else 1.0))
    try:
        yield
    finally:
        hook.remove()


# ---------------------------------------------------------------------------------------------------- divergences
@pytest.mark.parametrize(
    ("row", "exists"),
    [([0.0, 1.0], True), ([-INF, 1.0], True), ([NAN, 1.0], False), ([INF, 1.0], False), ([-INF, -INF], False)],
)
def test_a_softmax_exists_or_not(row, exists):
    logits = torch.tensor([row, [1.0, 2.0]])
    assert has_softmax(logits).tolist() == [exists, True]
    for reduced, full in ((logits, logits[[1, 1]]), (logits[[1, 1]], logits)):
        divergence = next_token_divergence(reduced, full)
        assert divergence.isnan().tolist() == [not exists, False]
        assert divergence[1] == 0


def test_tokens_ruled_out_by_both_count_nothing():
    assert next_token_divergence(torch.tensor([-INF, 0.0]), torch.tensor([-INF, 0.0])) == 0
    assert next_token_divergence(torch.tensor([0.0, 0.0]), torch.tensor([-INF, 0.0])) == INF


def test_a_layer_whose_answers_are_nan_is_never_chosen():
    model = build_once("llava")
    batch = families.inputs("llava", model)
    length = batch["input_ids"].shape[1]
    # Withdrawn at 2 or before, layer 2 runs on text alone: then it overflows.
    layer = model.get_decoder().layers[2].mlp
    hook = layer.register_forward_hook(lambda *call: call[-1] * (NAN if call[-1].shape[1] < length else 1.0))
    try:
        curve = withdrawal_curve(model, [batch], first_layer=1)
    finally:
        hook.remove()
    assert curve.isnan().tolist() == [[True, True, False, False, False]] * 2
    assert choose_layer(curve, 100.0, first_layer=1) == 3
    assert choose_layer(torch.full((2, 3), NAN), 100.0) is None
    with broken_head(model), pytest.raises(foveate.UnsupportedError, match="batch 0: the full model's logits are NaN"):
        withdrawal_curve(model, [batch])


# ------------------------------------------------------------------------------------------------------------- tune
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_reduced_model_of_nan_is_refused(vlm, value):
    batch = vlm.inputs(load("scenes", 2, 0))
    reference = Reference(vlm.model, batch, 3)
    with pytest.raises(foveate.UnsupportedError, match="reduced model's logits are NaN or infinite in 2 of 2 answers"):
        reference.measure(Poison(value=value))
    with broken_head(vlm.model, step=1), pytest.raises(foveate.UnsupportedError, match="the full model's logits"):
        Reference(vlm.model, batch, 3)


def test_a_search_goes_on_without_it(vlm, monkeypatch):
    monkeypatch.setattr(Recipe, "build", lambda self: Poison() if self.method == "poison" else foveate.Random(0.9))
    grid = [Family(name, (Recipe(name, {"keep": 0.5}),)) for name in ("poison", "random")]
    questions = load("scenes", 4, 0)
    result = search(vlm.model, [[(range(4), vlm.inputs(questions))]], grid, Bounds(0.9, None, 0.5), 2)
    poison, random = result.trials
    assert (poison.state, random.state) == ("refused", "passed")
    assert "NaN" in poison.reason


def test_bounds_are_never_kept_by_nan():
    either = (Bounds(0.5), Bounds(None, 1.0), Bounds(0.5, 1.0))
    for bounds in either:
        assert estimate.refuted([1.0] * 4, [1.0, NAN, 1.0, 1.0], [0.0] * 4, bounds)
        assert estimate.refuted([1.0] * 4, [1.0] * 4, [0.0, NAN, 0.0, 0.0], bounds)
        assert not estimate.refuted([1.0] * 9, [1.0] * 9, [0.0] * 9, bounds)
    infinite = [0.0] * 9 + [INF]
    assert estimate.refuted([1.0] * 10, [1.0] * 10, infinite, Bounds(None, 1.0))
    assert not estimate.refuted([1.0] * 10, [1.0] * 10, infinite, Bounds(0.5))
    for kl in (infinite, [0.0] * 9 + [NAN]):
        found = estimate.estimate([1.0] * 10, [1.0] * 10, kl, Bounds(0.5, 1.0))
        assert found.excess == found.upper_excess == INF


# --------------------------------------------------------------------------------------------------- sweep, compare
@pytest.fixture
def poisoned(monkeypatch):
    """The names `poison` and `never` in comparisons."""
    known = {"poison": Poison, "never": Never}

    def build(recipe, vlm):
        made = known.get(recipe.method)
        return grid.build_reducer(recipe, vlm) if made is None else made()

    monkeypatch.setattr(runner, "build_reducer", build)


OTHERS = [Recipe("random", {}, 0.2, 0), Recipe("poison", {}, 0.5, 0), Recipe("never"),
          Recipe("fastv", {}, 0.5)]  # fmt: skip


def test_a_sweep_says_so_in_the_row_and_goes_on(vlm, poisoned, tmp_path):
    asked = Questions({"scenes": load("scenes", 6, 0)}, "auto")
    plan = Plan("zoo:tiny-llava", ["scenes"], 6, 0, "auto", 2, 2, [FULL, *OTHERS], weights=fingerprint(vlm.model))
    result = sweep(Folder(tmp_path), plan, vlm, asked, timing_batches=1, timing_repeats=1)
    full, random, poison, never, fastv = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)[
        "rows"
    ]
    assert poison["error"] == "6 of 6 answers: its logits are NaN or infinite"
    assert never["error"] == "4 of 6 answers: one row only"
    assert set(full) - set(poison) <= {"yes_no"}
    numbers = ("accuracy", "relative", "agreement", "kl", "flops_ratio", "kv_ratio", "visual_tokens_entering")
    for row in (poison, never):
        assert [row[name] for name in numbers] == [None] * len(numbers)
        assert row["p_full"] is row["prefill_ms"] is None
        assert not any(row["pareto"].values())
    for row in (full, random, fastv):
        assert row["error"] is None
        assert None not in [row[name] for name in numbers]
        assert row["prefill_ms"] > 0
    assert sum(len(ids) for ids in result["verdicts"]["random"].values()) == 1  # fastv alone
    assert json.loads(json.dumps(sweep(Folder(tmp_path), plan, vlm, asked, timing_batches=0))) == result
    results = read(tmp_path)
    assert [entry.method for entry in results.entries] == ["random", "fastv"]
    write_report(tmp_path, None, tmp_path / "report.html", examples=0)
    page = (tmp_path / "report.html").read_text()
    assert "6 of 6 answers: its logits are NaN or infinite" in page
    assert "one row only" in page


def test_a_baseline_that_failed_is_none():
    row = {"id": "random@0.1", "method": "random", "versus": {}, "error": "1 of 1 answers: x"}
    other = {"id": "fastv", "method": "fastv", "versus": {}, "error": None}
    assert verdicts([row, other]) == {}


def test_comparing_goes_on_and_the_full_model_must_be_sound(vlm, poisoned):
    questions = {"scenes": load("scenes", 2, 0)}
    rows = compare(vlm, questions, OTHERS[:2], timing_batches=1, timing_repeats=1)
    assert [row["error"] is None for row in rows] == [True, True, False]
    with (
        broken_head(vlm.model, step=2),
        pytest.raises(foveate.UnsupportedError, match="the full model's logits are NaN"),
    ):
        compare(vlm, questions, OTHERS[:1], timing_batches=0, max_new_tokens=8)


def test_statistics_refuse_what_is_no_number():
    clusters = Clusters([0, 1, 2])
    with pytest.raises(ValueError, match="no numbers"):
        clusters.paired(torch.tensor([1.0, NAN, 0.0]).numpy(), torch.zeros(3).numpy())


@pytest.mark.parametrize(("said", "answer", "score"), [("5", "infinity", 0), ("infinity", "5", 0), ("nan", "NaN", 1),
                                                      ("1e999", "7", 0), ("7.1", "7", 1)])  # fmt: skip
def test_infinity_and_nan_are_words_in_an_answer(said, answer, score):
    assert METRICS["relaxed"].score(said, Sample(None, "?", answer, "", "")) == score


# ------------------------------------------------------------------------------------------------------------ bench
def test_bench_goes_on_without_it():
    model = build_once("llava")
    given = families.inputs("llava", model)
    full, poison, random, limit = bench(model, given, {"poison": Poison(), "random": foveate.Random(keep=0.5)}, 2, 1)
    assert poison.error == "poison: logits are NaN or infinite"
    assert not poison.runs
    assert [len(each.runs) for each in (full, random, limit)] == [1, 1, 1]
    with broken_head(model), pytest.raises(foveate.UnsupportedError, match=f"{UNREDUCED}: logits are NaN"):
        bench(model, given, {}, 2, 1)


# ------------------------------------------------------------------------------------------------------ command line
def test_commands_name_the_method(monkeypatch, tmp_path):
    file = tmp_path / "bench.json"
    for command in ("bench", "run"):
        module = importlib.import_module(f"foveate.cli.{command}")
        monkeypatch.setattr(module, "method_and_options", lambda *_: (Poison(), {}))
    result = invoke("bench", ZOO, "--method", "fastv", "--repeats", 1, "--new-tokens", 1, "--json", file)
    assert result.exit_code == 0, result.output
    assert "Failed: fastv: logits are NaN or infinite." in result.output
    rows = json.loads(file.read_text(), parse_constant=pytest.fail)["rows"]
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    load("scenes", 1, 0)[0].image.save(tmp_path / "photo.png")
    said = complaint("run", ZOO, "--image", tmp_path / "photo.png", "--prompt", "what?", "--method", "fastv")
    assert "method fastv: the reduced model's logits are NaN or infinite" in said
