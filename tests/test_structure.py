"""The floors of the house: who may import whom, who may print, and what nobody may do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import foveate

ROOT = Path(foveate.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
RECIPES = Path(__file__).parent.parent / "recipes"
"""What trained the zoo: stands on the package, is in no wheel."""

MAY_IMPORT = {
    "files": {"files"},
    "journal": {"journal"},
    "models": {"ops", "reduction", "models"},
    "ops": {"ops"},
    "reduction": {"reduction"},
    "reducers": {"ops", "reduction", "reducers"},
    "engine": {"ops", "reduction", "engine"},
    "zoo": {"ops", "reduction", "zoo"},
    "measure": {"ops", "reduction", "engine", "measure"},
    "recipe": {"files", "reduction", "reducers", "recipe"},
    "tune": {"files", "journal", "ops", "reduction", "recipe", "engine", "measure", "tune"},
    "train": {"files", "ops", "reduction", "recipe", "models", "engine", "measure", "zoo", "evaluate", "train"},
    "evaluate": {
        "files",
        "journal",
        "ops",
        "reduction",
        "reducers",
        "recipe",
        "models",
        "engine",
        "measure",
        "tune",
        "zoo",
        "evaluate",
    },
    "view": {"files", "ops", "reduction", "recipe", "engine", "measure", "tune", "evaluate", "zoo", "view"},
}
"""Floor -> the floors it stands on, itself included; what is not listed is the roof and may import everything."""
ROOF = {"app", "cli", "integrations", "__init__", "__main__"}
MAY_PRINT = {"cli", "view"}
ASKS_THE_HUB = {"evaluate/answer.py"}
"""Looks up a model that the user named by its hub id."""
TYPES_ONLY = {("reduction", "engine"), ("reducers", "engine")}
"""Imports that are allowed under TYPE_CHECKING: names of types, nothing that runs."""
NO_METHODS = {"chain", "similarity"}
"""Public files of `reducers` that compose methods and are none themselves."""


def _floor(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def _home(path: Path) -> Path:
    return ROOT if path.is_relative_to(ROOT) else RECIPES


def _names(path: Path) -> list[str]:
    """Module path below the package, as a list of names."""
    parts = list(path.relative_to(_home(path)).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def _resolve(path: Path, node: ast.ImportFrom) -> str:
    """Absolute name of what `from ... import` names."""
    if node.level == 0:
        return node.module or ""
    package = _names(path) if path.name == "__init__.py" else _names(path)[:-1]
    base = [_home(path).name, *package[: len(package) - (node.level - 1)]]
    return ".".join([*base, *([node.module] if node.module else [])])


def _imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    """(absolute module, only for types, line) of every import, also inside functions."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for child in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in for_types, node.lineno
        elif isinstance(node, ast.ImportFrom):
            module = _resolve(path, node)
            for alias in node.names:
                submodule = f"{module}.{alias.name}"
                is_module = module.startswith("foveate") and _is_module(submodule)
                yield submodule if is_module else module, id(node) in for_types, node.lineno


def _is_module(name: str) -> bool:
    below = ROOT.joinpath(*name.split(".")[1:])
    return below.is_dir() or below.with_suffix(".py").exists()


def _calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT if path.is_relative_to(ROOT) else RECIPES.parent))


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_nothing_imports_upwards(path: Path):
    floor = _floor(path)
    for module, only_types, line in _imports(path):
        assert module.split(".")[0] != "recipes", f"{_id(path)}:{line}: recipes are in no wheel"
        if module.split(".")[0] != "foveate":
            continue
        target = [*module.split("."), "__init__"][1]
        where = f"{_id(path)}:{line} imports {module}"
        if floor in ROOF:
            continue
        assert target != "__init__", f"{where}: only the roof imports the root package"
        if only_types and (floor, target) in TYPES_ONLY:
            continue
        assert floor in MAY_IMPORT, f"{floor} is a new floor: say what it stands on"
        assert target in MAY_IMPORT[floor], f"{where}: {floor} stands on {', '.join(sorted(MAY_IMPORT[floor]))}"


def _circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """What imports itself by way of others: the strongly connected parts with more than one member (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        path.append(name)
        for other in imports.get(name, ()):
            if other not in index:
                visit(other)
            if other in path:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            part = path[path.index(name) :]
            del path[path.index(name) :]
            if len(part) > 1:
                found.append(sorted(part))

    for name in imports:
        if name not in index:
            visit(name)
    return found


def test_circles_are_found():
    assert _circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [["b", "c"]]
    assert _circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert _circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c"]]


def test_nothing_imports_itself_by_way_of_others():
    """Neither modules nor floors, inside functions or not; names of types do not count."""
    modules: dict[str, set[str]] = {}
    floors: dict[str, set[str]] = {}
    names = {".".join(["foveate", *_names(path)]): _floor(path) for path in FILES}
    for path in FILES:
        name = ".".join(["foveate", *_names(path)])
        told = {module for module, only_types, _ in _imports(path) if not only_types and module in names}
        modules[name] = told - {name}
        floors.setdefault(_floor(path), set()).update(names[module] for module in told)
    for name, floor in names.items():
        floors[floor].discard(floor)
        assert name in modules
    assert _circles(modules) == []
    assert _circles(floors) == []


def test_every_floor_is_known():
    floors = {_floor(path) for path in FILES}
    assert floors <= MAY_IMPORT.keys() | ROOF


@pytest.mark.parametrize("path", FILES, ids=_id)
def test_only_the_command_line_and_the_views_print(path: Path):
    if _floor(path) in MAY_PRINT:
        return
    for name, call in _calls(path):
        assert name not in ("print", "pprint", "sys.stdout.write", "sys.stderr.write"), f"{_id(path)}:{call.lineno}"


@pytest.mark.parametrize("path", [*FILES, *sorted(RECIPES.rglob("*.py"))], ids=_id)
def test_nothing_runs_foreign_code_or_calls_home(path: Path):
    forbidden = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "requests", "httpx", "aiohttp", "socket"}
    forbidden |= {"urllib.request", "http.client", "huggingface_hub", "wget"}
    for module, _, line in _imports(path):
        roots = {module, module.split(".")[0], ".".join(module.split(".")[:2])}
        if _id(path) in ASKS_THE_HUB:
            roots -= {"huggingface_hub"}
        assert not roots & forbidden, f"{_id(path)}:{line} imports {module}"
    for name, call in _calls(path):
        where = f"{_id(path)}:{call.lineno} {name}"
        options = {k.arg: ast.unparse(k.value) for k in call.keywords if k.arg}
        assert options.get("trust_remote_code", "False") == "False", where
        assert options.get("allow_pickle", "False") == "False", where
        assert options.get("shell", "False") == "False", where
        assert name not in ("eval", "exec", "os.system", "__import__"), where
        if name == "torch.load":
            assert options.get("weights_only") == "True", where
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            pytest.fail(f"{where}: use yaml.safe_load")


def test_every_method_is_registered_and_public():
    """One file per method: whatever is not private is found by name."""
    files = {path.stem for path in (ROOT / "reducers").glob("*.py") if not path.stem.startswith("_")}
    registered = {}
    for name in foveate.names():
        cls = foveate.reduction.type_of(name)
        registered.setdefault(cls.__module__.rpartition(".")[2], []).append(name)
        assert getattr(foveate, cls.__name__) is cls, f"{cls.__name__} is no public name"
        assert cls.__name__ in foveate.__all__
    assert files - NO_METHODS == registered.keys()
    assert len(foveate.names()) == len(set(foveate.names()))


KNOWS_FAMILIES = ("engine/families/", "engine/cross_modal/parts.py", "train/models.py")
"""The room of the families; where image and text meet in encoders; which of those have a trained head."""


def _branches_on_a_family(source: str) -> list[int]:
    """Lines that compare a model's type or class with a name, or look for it among names in the same file."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if (
            isinstance(node, ast.Compare)
            and ("model_type" in ast.unparse(node) or _is_class_name(node.left))
            and any(
                (isinstance(part, ast.Name) and part.id.startswith("_"))
                or any(isinstance(n, ast.Constant) and n.value not in ("", "model_type", None) for n in ast.walk(part))
                for part in (node.left, *node.comparators)
            )
        )
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_class_name(node.func.value))
    ]


def _is_class_name(node: ast.AST) -> bool:
    """`type(x).__name__`, whatever x is."""
    return isinstance(node, ast.Attribute) and node.attr == "__name__" and isinstance(node.value, ast.Call)


def test_branches_on_a_family_are_found():
    assert _branches_on_a_family('if config.model_type == "llava": pass') == [1]
    assert _branches_on_a_family('x = get(text, "model_type") not in _PLAIN') == [1]
    assert _branches_on_a_family('x = type(processor).__name__.startswith("Llava")') == [1]
    assert _branches_on_a_family('x = type(model).__name__ == "Kosmos2"') == [1]
    assert _branches_on_a_family('raise E(f"{type(model).__name__} cannot")') == []
    assert _branches_on_a_family('x = raw.get("model_type") in CONFIG_MAPPING') == []


def test_only_the_families_room_branches_on_a_family():
    for path in FILES:
        if not any(_id(path).startswith(place) for place in KNOWS_FAMILIES):
            found = _branches_on_a_family(path.read_text())
            assert not found, f"{_id(path)}:{found}: what is known of families is in engine/families/"


def test_every_module_says_what_lives_in_it():
    for path in FILES:
        source = path.read_text()
        assert not source.strip() or ast.get_docstring(ast.parse(source)), _id(path)


def test_all_names_exist():
    for name in foveate.__all__:
        assert hasattr(foveate, name), name


def test_importing_the_package_stays_light():
    """Optional and heavy parts are imported only when asked for."""
    heavy = [
        "gradio",
        "av",
        "matplotlib",
        "peft",
        "pyarrow",
        "tensorboard",
        "ray",
        "vllm",
        "lmms_eval",
        "typer",
        "sklearn",
        "skimage",
        "easy_vqa",
        "torchvision",
    ]
    code = f"import foveate, sys; print(*[name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT.parent)}
    )
    assert result.stdout.split() == []
