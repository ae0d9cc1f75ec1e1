"""Recipes, lists and options that are no mistake but a trap: bombs, depths, lengths. One short line each."""

from __future__ import annotations

import re

import pytest
import yaml
from typer.testing import CliRunner

import foveate
from foveate import recipe
from foveate.app.options import parse_options
from foveate.cli import app
from foveate.files import YamlError, parse_yaml

BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)
HOSTILE = {
    "aliases": (BOMB, "alias"),
    "a list in itself": ("&a [*a]", "alias"),
    "merged": ("x: &x {a: 1}\ny: {<<: *x}", "alias"),
    "brackets": ("[" * 20_000, "too deeply"),
    "closed brackets": ("[" * 500 + "]" * 500, "too deeply"),
    "mappings": ("".join(" " * i + "a:\n" for i in range(300)), "too deeply"),
    "dashes": ("- " * 5000, "too deeply"),
    "long": ("a: " + "x" * (2 << 20), "too large"),
    "digits": ("version: " + "9" * 5000, "not YAML"),
    "no such day": ("version: 2020-13-45", "not YAML"),
    "tag": ("!!python/object/apply:os.system [ls]", "not YAML"),
    "list as key": ("{[1]: 2}", "not YAML"),
    "NUL": ("version: 1\0", "not YAML"),
    "open quote": ("a: '" + "x" * 5000, "not YAML"),
    "a word": ("version", "expected the keys"),
    "a long key": ("x" * 900 + ": 1", "unknown key"),
    "a long version": ("version: " + "x" * 50_000, "version is"),
    "a long method": ("version: 1\nmethod: " + "x" * 50_000, "unknown method"),
    "numbers as keys": ("1: 2", "unknown key 1"),
    "a list of options": ("version: 1\nmethod: fastv\noptions: {keep: [[[[1]]]]}", "fastv"),
    "a date as budget": ("version: 1\nmethod: fastv\noptions: {keep: 2020-01-01}", "options.keep"),
    "infinite": ("version: 1\nmethod: fastv\noptions: {keep: .inf}", "keep=inf"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_is_one_short_line(name, tmp_path):
    text, said = HOSTILE[name]
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(recipe.RecipeError, match=said):
        foveate.load(path)
    arguments = ["bench", "--geometry", "llava-1.5-7b", "--recipe", str(path)]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert len(result.stderr) < 1000
    assert f"recipe {path}" in result.stderr


@pytest.mark.parametrize(
    "name", [name for name, (_, said) in HOSTILE.items() if said in ("alias", "too deeply", "not YAML")]
)
def test_so_is_a_hostile_grid_and_a_hostile_option_of_the_page(name, tmp_path):
    text, said = HOSTILE[name]
    path = tmp_path / "c.yaml"
    path.write_text(text)
    result = CliRunner().invoke(app, ["sweep", "zoo:tiny-llava", "--grid", str(path), "--out", str(tmp_path / "o")])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert said in result.stderr
    with pytest.raises(foveate.OptionError, match=r"cannot be read|name=value|too long"):
        parse_options(f"layers={text}")


def test_what_people_write_is_read():
    assert parse_yaml("\ufeffa: [1, {b: [c]}]") == {"a": [1, {"b": ["c"]}]}
    assert parse_yaml("x" * 1000) == "x" * 1000
    with pytest.raises(YamlError, match="too large"):
        parse_yaml("x" * (1 << 20) + "y")


def test_recipes_are_written_without_aliases(tmp_path):
    twice = [1, 2]
    recipe.save(tmp_path / "r.yaml", foveate.FastV(keep=0.5), first=twice, second=twice)
    assert recipe.provenance(tmp_path / "r.yaml")["second"] == twice
    assert "&" not in yaml.safe_dump(recipe.provenance(tmp_path / "r.yaml"))
    twice.append(twice)
    with pytest.raises(recipe.RecipeError, match="provenance"):
        recipe.save(tmp_path / "s.yaml", foveate.FastV(keep=0.5), first=twice)


def test_complaints_carry_no_control_characters(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text('"\\e[2J\\a": 1')
    result = CliRunner().invoke(app, ["bench", "--geometry", "llava-1.5-7b", "--recipe", str(path)])
    assert result.exit_code == 2
    assert result.stderr.rstrip("\n").isprintable()


def _commands(command=None, path=()):
    from typer.main import get_command

    command = command or get_command(app)
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from _commands(below, (*path, name))


@pytest.mark.parametrize(
    ("path", "command"), _commands(), ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_help_shows_every_bracket(path, command):
    """Rich took [app] for markup."""
    shown = "".join(CliRunner().invoke(app, [*path, "--help"]).stdout.split())
    texts = [command.help, *(getattr(option, "help", None) for option in command.params)]
    brackets = {bracket for text in texts if text for bracket in re.findall(r"[\w.]*\[[^\]]*\]", text)}
    for bracket in brackets:
        assert "".join(bracket.split()) in shown
    assert "\\[" not in shown


def test_some_help_has_brackets():
    assert any("[" in (command.help or "") for _, command in _commands())
