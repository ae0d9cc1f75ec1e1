"""What the README and CONTRIBUTING say is true: their code runs, their lists are complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import foveate
from foveate.reduction.registry import _METHODS
from tests.families import build, inputs

ROOT = Path(__file__).parents[1]


def code_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


def test_the_readme_example_runs() -> None:
    model = build("llava")
    scope = {"model": model, "inputs": inputs("llava", model, batch=1)}
    exec(code_blocks("README.md")[0], scope)
    assert scope["session"].trace.visual_tokens.shape[0] == 1


def test_the_method_of_the_contributing_guide_works() -> None:
    scope: dict = {"__name__": "lastlook"}
    source = (
        code_blocks("CONTRIBUTING.md")[0]
        .replace("from ..", "from foveate.")
        .replace("foveate. import", "foveate import")
    )
    try:
        exec(compile(source, "lastlook.py", "exec", dont_inherit=True), scope)
        model = build("llava")
        with torch.no_grad(), foveate.apply(model, foveate.build("lastlook", keep=4)) as session:
            model(**inputs("llava", model, batch=2))
        assert session.trace.visual_tokens.tolist() == [[16, 16, 4, 4, 4, 4]] * 2
        with pytest.raises(foveate.BudgetError):
            foveate.build("lastlook", keep=0)
    finally:
        _METHODS.pop("lastlook", None)


def test_the_readme_lists_every_method() -> None:
    readme = (ROOT / "README.md").read_text()
    classes = [cls.__name__ for cls, _ in _METHODS.values()]
    assert [name for name in classes if f"`{name}`" not in readme and f"`{name}" not in readme] == []


def test_the_makefile_has_the_commands_of_the_readme() -> None:
    makefile, readme = (ROOT / "Makefile").read_text(), (ROOT / "README.md").read_text()
    for target in re.findall(r"^make (\w+)", readme, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_no_placeholder_is_left_in_the_readme() -> None:
    assert not re.search(r"@[A-Z]+@", (ROOT / "README.md").read_text())
