"""Methods of other packages: by entry point, as `module:Class`, in every place that takes a method's name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import foveate
from foveate import OptionError, recipe
from foveate.evaluate.answer import load
from foveate.evaluate.grid import FULL
from foveate.evaluate.store import Folder, Plan, SweepError
from foveate.evaluate.sweep import fingerprint, questions, sweep
from foveate.measure import report
from foveate.recipe import Recipe
from foveate.reduction import info, options, registry

METHOD = '''
"""A method."""
from dataclasses import dataclass

import foveate

{decorator}
@dataclass
class LeftHalf(foveate.Reducer):
    """Keeps the first part."""

    keep: float = 0.5

    def __post_init__(self):
        self.stages = (-1,)

    def decide(self, view):
        rank, count = view.active_visual.cumsum(1), view.active_visual.sum(1, keepdim=True)
        return foveate.Decision(keep=~view.visual | (rank <= (count * self.keep).ceil()))


class Plain(foveate.Reducer):
    def __init__(self, keep, *, color="red"):
        self.keep, self.stages = keep, ()


LeftHalf.Inner = type("Inner", (LeftHalf,), {{"__module__": __name__, "__qualname__": "LeftHalf.Inner"}})
'''
REGISTERS = '@foveate.register("{name}", foveate.MethodInfo(paper="Ours", acts="before the LLM"))'


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Each test meets a process that has seen no foreign method."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(registry, "_complained", set())
    modules = set(sys.modules)
    yield
    for name in sys.modules.keys() - modules:
        if name.startswith("outside_"):
            del sys.modules[name]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the Python path, and a function that installs a package there."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(module: str, source: str | None = None, entry_points: str = "", decorator: str = "") -> Path:
        if source is None:
            source = METHOD.format(decorator=decorator)
        (tmp_path / f"{module}.py").write_text(source)
        if entry_points:
            about = tmp_path / f"{module}-1.0.dist-info"
            about.mkdir()
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
            (about / "entry_points.txt").write_text(entry_points)
            registry._installed.cache_clear()
        return tmp_path

    return install


@pytest.mark.parametrize("registers", ["itself", "not", "under another name"])
def test_an_entry_point_is_a_method(site, registers, tmp_path):
    name = {"itself": "lefthalf", "not": "", "under another name": "left"}[registers]
    site(
        "outside_half",
        entry_points="[foveate.methods]\nlefthalf = outside_half:LeftHalf\n",
        decorator=REGISTERS.format(name=name) if name else "",
    )
    assert "outside_half" not in sys.modules  # nothing is imported before it is asked for
    built = foveate.build("lefthalf", keep=0.25)
    assert type(built).__qualname__ == "LeftHalf"
    assert built.keep == 0.25
    assert "lefthalf" in foveate.names()
    assert options("lefthalf") == {"keep": 0.5}
    assert info("lefthalf").paper == ("Ours" if name else "Keeps the first part.")
    recipe.save(tmp_path / "recipe.yaml", built)
    assert foveate.load(tmp_path / "recipe.yaml") == built


def test_one_entry_point_brings_all_that_its_module_registers(site):
    source = METHOD.format(decorator=REGISTERS.format(name="left")) + "\n" + REGISTERS.format(name="plain2")
    source += "\nclass Second(Plain):\n    pass\n"
    site("outside_two", source, "[foveate.methods]\nleft = outside_two:LeftHalf\n")
    assert foveate.build("plain2", keep=1).keep == 1


@pytest.mark.parametrize(
    ("source", "points", "reason"),
    [
        (
            "import outside_nothing\n",
            "broken = outside_broken:LeftHalf",
            "ModuleNotFoundError: No module named 'outside",
        ),
        ("raise SystemExit(3)\n", "broken = outside_broken:LeftHalf", "SystemExit: 3"),
        ("LeftHalf = 3\n", "broken = outside_broken:LeftHalf", "no subclass of foveate.Reducer"),
        ("", "broken = outside_broken:LeftHalf", "AttributeError"),
        (None, "broken = outside_broken", "not of the form module:Class"),
        (None, "fastv = outside_broken:LeftHalf", "the name is taken"),
    ],
)
def test_a_broken_entry_point_stops_nothing(site, caplog, source, points, reason):
    site("outside_broken", source, f"[foveate.methods]\n{points}\n")
    before = foveate.build("fastv", keep=0.5)
    known = foveate.names()
    assert "broken" not in known
    assert "vtw" in known
    (said,) = [each.getMessage() for each in caplog.records]
    assert reason in said
    assert "outside_broken" in said
    assert foveate.names() == known
    assert len(caplog.records) == 1  # said once
    assert type(foveate.build("fastv", keep=0.5)) is type(before) is foveate.FastV
    if points.startswith("broken"):
        with pytest.raises(OptionError, match="outside_broken"):
            foveate.build("broken", keep=0.5)


def test_an_unreadable_list_of_another_package_hides_no_method(site):
    site("outside_half", entry_points="[foveate.methods]\nlefthalf = outside_half:LeftHalf\n")
    site("outside_junk", entry_points="[console_scripts]\nno equals sign\n")
    assert "lefthalf" in foveate.names()


def test_two_packages_with_one_name_are_told_apart(site):
    site("outside_one", entry_points="[foveate.methods]\nhalf = outside_one:LeftHalf\n")
    site("outside_two", entry_points="[foveate.methods]\nhalf = outside_two:LeftHalf\n")
    with pytest.raises(OptionError, match=r"outside_one.*outside_two") as caught:
        foveate.build("half")
    assert "half" not in foveate.names()
    assert "outside_two:LeftHalf" in str(caught.value)
    assert foveate.build("outside_two:LeftHalf").keep == 0.5


def test_a_class_by_its_place(site, tmp_path):
    site("outside_half")
    built = foveate.build("outside_half:LeftHalf", keep=0.25)
    assert built.keep == 0.25
    assert recipe.describe(built) == {"method": "outside_half:LeftHalf", "options": {"keep": 0.25}}
    recipe.save(tmp_path / "recipe.yaml", foveate.Chain(built, foveate.VTW(layer=3)))
    assert foveate.load(tmp_path / "recipe.yaml").members[0] == built
    assert report("llava-1.5-7b", "outside_half:LeftHalf", keep=0.5)["visual_tokens_entering"] == 288
    assert foveate.build("outside_half:LeftHalf.Inner").keep == 0.5
    plain = foveate.build("outside_half:Plain", keep=3, color="blue")
    assert plain.keep == 3
    with pytest.raises(OptionError, match=r"no option 'colour', did you mean color\?"):
        foveate.build("outside_half:Plain", keep=3, colour="blue")
    with pytest.raises(OptionError, match="needs keep="):
        foveate.build("outside_half:Plain")


def test_a_subclass_does_not_go_by_its_parents_name(tmp_path):
    class Mine(foveate.VTW):
        pass

    with pytest.raises(recipe.RecipeError, match="Mine is not known by name"):
        recipe.save(tmp_path / "recipe.yaml", Mine(layer=3))


@pytest.mark.parametrize(
    ("name", "meant"), [("SparseVLM", "sparsevlm"), ("fast-v", "fastv"), ("vison_zip", "visionzip")]
)
def test_a_name_that_is_nearly_right(name, meant):
    with pytest.raises(OptionError, match=rf"unknown method '{name}', did you mean {meant}\?; known: averagepool"):
        foveate.build(name)


@pytest.mark.parametrize("place", ["outside_nowhere:X", "outside_half:Missing", "os:path", ":X", "outside_half:", "::"])
def test_a_place_that_holds_no_method(site, place):
    site("outside_half")
    with pytest.raises(OptionError, match="method '"):
        foveate.build(place)


def test_a_visitor_of_the_page_imports_nothing(site):
    from foveate.app.options import controls, describe, offered

    site("outside_half")
    for ask in (lambda: controls("outside_half:LeftHalf", 6), lambda: describe("outside_half:LeftHalf")):
        with pytest.raises(OptionError, match="unknown method"):
            ask()
    assert "outside_half" not in sys.modules
    info("outside_half:LeftHalf")  # what `foveate app --method` does
    assert offered("outside_half:LeftHalf")
    assert describe("outside_half:LeftHalf")


@pytest.fixture(scope="module")
def vlm():
    return load("zoo:tiny-llava")


def plan(vlm, method: str) -> Plan:
    fixed = {"model": "zoo:tiny-llava", "data": ["scenes"], "samples": 4, "seed": 0, "metric": "auto"}
    chosen = [FULL, Recipe(method, {}, 0.5)]
    return Plan(
        **fixed, max_new_tokens=2, batch_size=2, recipes=chosen, weights=fingerprint(vlm.model)
    )  # fmt: skip


@pytest.mark.slow
def test_workers_of_a_sweep_know_them(site, vlm, tmp_path):
    """Registered by a module that only this process was told of, in a folder that only its path holds."""
    site("outside_half", decorator=REGISTERS.format(name="lefthalf"))
    importlib.import_module("outside_half")
    asked = questions(["scenes"], 4, 0, "auto")
    result = sweep(Folder(tmp_path / "out"), plan(vlm, "lefthalf"), vlm, asked, workers=2, timing_batches=0)
    assert [row["visual_tokens_entering"] for row in result["rows"]] == [196, 98]


def test_workers_cannot_know_a_method_of_a_script(site, vlm, tmp_path, monkeypatch):
    site("outside_half", decorator=REGISTERS.format(name="lefthalf"))
    outside_half = importlib.import_module("outside_half")

    monkeypatch.setattr(outside_half.LeftHalf, "__module__", "__main__")
    asked = questions(["scenes"], 4, 0, "auto")
    with pytest.raises(SweepError, match="lefthalf is defined in a script"):
        sweep(Folder(tmp_path / "out"), plan(vlm, "lefthalf"), vlm, asked, workers=2, timing_batches=0)
