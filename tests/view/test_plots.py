"""What is drawn is what was measured: points, intervals, front, names."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image

from foveate.evaluate.store import SweepError
from foveate.view.folder import AXES, read
from foveate.view.kinds import kinds_figure, loss_by_kind, signed_points
from foveate.view.plots import accuracy_figure, available, facet_figures, write_plots
from foveate.view.series import DARK, facets_of, series_of, spread

from .folders import make

MANY = ("random", "averagepool", "fastv", "sparsevlm", "vtw", "visionzip", "fopru", "prumerge", "divprune", "tome")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many") / "sweep"
    make(folder, MANY, samples=30)
    return folder


def artists(figure, gid):
    return [line for axes in figure.axes for line in axes.lines if line.get_gid() == gid]


@pytest.mark.parametrize("name", AXES)
def test_every_point_is_a_row_of_the_result(many, name):
    results, axis = read(many), AXES[name]
    assert axis in available(results)
    figure = accuracy_figure(results, axis)
    drawn = {}
    for series in series_of(results):
        lines = artists(figure, f"series:{series.name}")
        assert lines, series.name
        drawn[series.name] = {(float(x), float(y)) for line in lines for x, y in zip(*line.get_data())}
    for entry in results.entries:
        assert (entry.row[axis.column], entry.row["accuracy"]) in drawn[entry.name]
    assert sum(map(len, drawn.values())) == len({(e.name, e.cost(axis), e.accuracy) for e in results.entries})
    for line in artists(figure, "full-line"):
        assert set(line.get_ydata()) == {results.full.row["accuracy"]}


@pytest.mark.parametrize("name", AXES)
def test_the_front_is_what_nothing_beats(many, name):
    results, axis = read(many), AXES[name]
    everyone = [(each.row[axis.column], each.row["accuracy"]) for each in (results.full, *results.entries)]
    unbeaten = {
        (x, y) for x, y in everyone if not any(x2 <= x and y2 >= y and (x2, y2) != (x, y) for x2, y2 in everyone)
    }
    figure = accuracy_figure(results, axis)
    (front, *_) = artists(figure, "front")
    assert set(zip(*front.get_data())) == unbeaten
    facets = [axes for axes in figure.axes if axes.get_title(loc="left") != "all methods: the Pareto front"]
    ringed = {
        point
        for axes in facets
        for line in axes.lines
        if (line.get_gid() or "").startswith("pareto:")
        for point in zip(*line.get_data())
    }
    methods = {(e.cost(axis), e.accuracy) for s in series_of(results) if not s.baseline for e in s.entries}
    assert ringed == unbeaten & methods


def test_bars_are_the_intervals(many):
    results, axis = read(many), AXES["flops"]
    figure = accuracy_figure(results, axis)
    drawn = {
        (round(float(x), 9), round(float(low), 9), round(float(high), 9))
        for axes in figure.axes
        for collection in axes.collections
        if hasattr(collection, "get_segments")
        for (x, low), (_, high) in collection.get_segments()
    }
    for series in series_of(results):
        for entry in () if series.baseline else series.entries:
            low, high = entry.row["accuracy_ci"]
            assert (round(entry.cost(axis), 9), round(low, 9), round(high, 9)) in drawn


def test_every_method_is_inside_the_picture_and_baselines_may_leave_at_the_bottom(many):
    results, axis = read(many), AXES["flops"]
    bottom, top = accuracy_figure(results, axis).axes[0].get_ylim()
    methods = [entry.accuracy for series in series_of(results) if not series.baseline for entry in series.entries]
    assert bottom < min(*methods, results.full.accuracy)
    assert top > max(entry.accuracy for entry in results.entries)
    assert any(entry.accuracy < bottom for entry in results.entries)


def test_methods_of_a_panel_can_be_told_apart_and_are_named(many):
    results = read(many)
    facets = facets_of(results)
    assert facets[0].overview
    shown = [series.name for facet in facets[1:] for series in facet.series if not series.baseline]
    assert sorted(shown) == sorted(set(MANY) - {"random", "averagepool"})
    for facet in facets[1:]:
        looks = [(s.colour, s.marker, str(s.line)) for s in facet.series]
        assert len(set(looks)) == len(looks)
        colours = [s.colour for s in facet.series if not s.baseline]
        assert len(set(colours)) == len(colours)
    for (title, figure), facet in zip(facet_figures(results, AXES["tokens"], DARK), facets, strict=True):
        assert title == facet.title
        names = [text.get_text().removesuffix(": below") for text in figure.axes[0].texts]
        if not facet.overview:
            assert {series.name for series in facet.series} <= set(names)
        figure.draw_without_rendering()
        # An annotation's own extent takes in its leader line.
        boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]
        assert not any(
            one.shrunk(1, 0.8).overlaps(other.shrunk(1, 0.8)) for one, other in itertools.combinations(boxes, 2)
        )


def test_few_methods_share_one_panel_and_variants_are_named_by_their_option(tmp_path):
    folder = tmp_path / "sweep"
    make(folder, ("random", "fastv", "vtw"), samples=12, options={"fastv": {"layer": 1}})
    (facet,) = facets_of(read(folder))
    assert [series.name for series in facet.series] == ["random", "fastv", "vtw"]
    assert not facet.overview


def test_loss_by_kind_is_full_minus_method(many):
    results = read(many)
    losses = loss_by_kind(results, results.entries)
    for entry, line in zip(results.entries, losses, strict=True):
        ours, full = entry.row["accuracy_by_kind"], results.full.row["accuracy_by_kind"]
        assert {kind: round(loss, 9) for kind, (loss, _) in line.items()} == {
            kind: round(full[kind] - ours[kind], 9) for kind in full
        }
    figure = kinds_figure(results, 0.2)
    cells = {text.get_text() for text in figure.axes[0].texts}
    worst = max(loss for entry, line in zip(results.entries, losses) if entry.keep == 0.2 for loss, _ in line.values())
    assert signed_points(-worst) in cells
    assert np.asarray(figure.axes[0].images[0].get_array()).shape == (len(MANY), 1 + len(line))


def test_signed_points():
    assert [signed_points(x) for x in (0.0, -0.0001, 0.123, -0.5)] == ["0.0", "0.0", "+12.3", "\u221250.0"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=20), st.floats(0.01, 0.04))
def test_labels_keep_their_order_and_their_distance(wanted, gap):
    placed = spread(wanted, gap, 0.02, 0.98)
    order = sorted(range(len(wanted)), key=lambda i: placed[i])
    assert [wanted[i] for i in order] == sorted(wanted)
    assert all(placed[b] - placed[a] >= gap - 1e-9 for a, b in itertools.pairwise(order))
    assert all(0.02 - 1e-9 <= each <= 0.98 + 1e-9 for each in placed)
    if len(wanted) == 1:
        assert placed[0] == min(max(wanted[0], 0.02), 0.98)


def test_files(many, tmp_path):
    written = write_plots(many, tmp_path / "plots")
    names = ["accuracy_flops", "accuracy_ms", "accuracy_tokens", "loss_by_kind"]
    assert sorted(path.name for path in written) == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    for path in written:
        if path.suffix == ".png":
            assert Image.open(path).size[0] >= 800
        else:
            text = path.read_text()
            assert "sparsevlm" in text  # text stays text
            assert len(text) < 250_000
            assert not re.search(r"(?:href|src)=\"http", text)


def test_nothing_to_draw(tmp_path):
    with pytest.raises(SweepError, match=r"sweep\.json"):
        write_plots(tmp_path / "none", tmp_path)
    make(tmp_path / "half", ("random",), samples=6, finished=False)
    with pytest.raises(SweepError, match="not finished"):
        write_plots(tmp_path / "half", tmp_path)
