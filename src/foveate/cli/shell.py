"""What all commands share: one-line errors, tables, progress, files written whole."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

import foveate

from ..files import YamlError, check_writable, parse_yaml, write_whole

__all__ = [
    "CommandError",
    "JsonOption",
    "KeepOption",
    "MethodOption",
    "OptionsOption",
    "RecipeOption",
    "app",
    "method_and_options",
    "note",
    "option_value",
    "plain",
    "progress",
    "say",
    "table",
    "writable",
    "write_json",
    "writing",
]

_ClickException: Any = typer.BadParameter.__mro__[2]  # typer carries its own copy of click in newer versions
_INTERRUPTED = 130
_BRIEF, _PATIENCE = 5.0, 30.0
"""Seconds between two lines of progress: at least, and at most."""
_LONGEST = 900
"""Characters of a complaint: a file may hold names of any length."""


class CommandError(ValueError):
    """Bad input of a command; the message names the culprit."""


class OneLineGroup(TyperGroup):
    """Commands whose every complaint is one line on stderr and exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        from ..evaluate.answer import ModelError
        from ..evaluate.data import DataError

        bad_input = (
            CommandError, DataError, ModelError, foveate.BudgetError, foveate.OptionError, foveate.UnsupportedError,
        )  # fmt: skip
        try:
            with warnings.catch_warnings():
                _hush()
                code = super().main(*args, **{**kwargs, "standalone_mode": False})
                sys.stdout.flush()
        except _ClickException as error:
            _fail(error.format_message())
        except bad_input as error:
            _fail(str(error))
        except typer.Abort:
            sys.exit(_INTERRUPTED)
        except OSError as error:  # a full disk, a pipe that nobody reads any more
            if error.errno is None:
                raise
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
            _fail(f"{error.filename or 'output'}: {error.strerror}")
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    line = "".join(sign if sign.isprintable() else "\ufffd" for sign in " ".join(message.split()))
    if len(line) > _LONGEST:  # what is wrong stands in front, what is known at the end
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    print("foveate:", line, file=sys.stderr)  # noqa: T201
    sys.exit(2)


def _hush() -> None:
    """Libraries keep their advice to themselves: what a command has to say, it says itself."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("huggingface_hub", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


app = typer.Typer(
    cls=OneLineGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"foveate {foveate.__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make any Hugging Face vision-language model keep only the visual tokens that matter."""
    if context.invoked_subcommand is None:
        say(context.get_help())


# --------------------------------------------------------------------------------------------------- common options
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")]
MethodOption = Annotated[str, typer.Option("--method", "-m", help="A name from `foveate methods`, or module:Class.")]
KeepOption = Annotated[
    str | None,
    typer.Option("--keep", "-k", metavar="N|F", help="Visual tokens per image (192) or their fraction (0.33)."),
]
OptionsOption = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="NAME=VALUE", help="Option of the method; repeatable.")
]

RecipeOption = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE", help="Method, budget and options of a recipe (`foveate tune --out`)."),
]


def method_and_options(
    method: str | None, keep: str | None, options: Sequence[str] | None, recipe: Path | None = None
) -> tuple[Any, dict[str, Any]]:
    """The reducer a command line asks for, by name or by recipe, and its options without `keep`.

    Raises:
        CommandError, BudgetError, OptionError: whatever is wrong with them.
    """
    if recipe is not None:
        if method is not None or keep is not None or options:
            raise CommandError(f"recipe {recipe}: says method and options itself; leave --method, --keep, --option out")
        reducer = foveate.load(recipe)
        told = foveate.recipe.describe(reducer)
        given = told.get("options", {}) if "method" in told else told
        return reducer, {name: value for name, value in given.items() if name != "keep"}
    if method is None:
        raise CommandError("give --method or --recipe")
    chosen: dict[str, Any] = {}
    for option in options or ():
        name, equals, value = option.partition("=")
        if not (name and equals):
            raise CommandError(f"option {option!r}: write it as name=value")
        chosen[name.strip().replace("-", "_")] = option_value(value.strip())
    if keep is None:
        return foveate.build(method, **chosen), chosen
    if "keep" in chosen:
        raise CommandError("keep is given twice, by --keep and by --option")
    return foveate.build(method, keep=foveate.Budget.parse(keep).keep, **chosen), chosen


def option_value(text: str) -> Any:
    """true, false, none, a number, a mapping `{name: value, ...}`, or the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    if text.startswith("{"):
        try:
            return parse_yaml(text)
        except YamlError as error:
            raise CommandError(f"option value {text!r}: {error}") from error
    return text


# ----------------------------------------------------------------------------------------------------------- output
def plain() -> bool:
    """Whether stdout is not a terminal: no boxes, no colour, nothing cut."""
    return not sys.stdout.isatty()


def _console() -> Console:
    # Made anew each time, since test runners and pagers exchange sys.stdout.
    return Console(highlight=False)


def say(text: str = "") -> None:
    """A line on stdout, as it is."""
    print(text)  # noqa: T201


def note(text: str) -> None:
    """A line on stderr: about the work, not its result."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None, left: int = 1) -> None:
    """A table on stdout, the first `left` columns flush left. Away from a terminal each row is one whole line."""
    if title:
        say(title)
    if plain():
        widths = [max(map(len, column)) for column in zip(headers, *rows)]
        for row in (headers, *rows):
            cells = (text.ljust(w) if i < left else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths)))
            say("  ".join(cells).rstrip())
        return
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, header in enumerate(headers):
        shown.add_column(header, justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row))
    _console().print(shown)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Progress on stderr: a bar on a terminal, else a line every 10 % or 30 s. Yields a function of (done, total)."""
    if not sys.stderr.isatty():
        lines = _Lines(what)
        with lines.beating():
            yield lines
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """Plain lines of progress, also while the work itself says nothing; none for what takes a moment."""

    def __init__(self, what: str):
        self.what, self.start = what, time.monotonic()
        self.done, self.total, self.tenth, self.last = 0, 0, 0, self.start
        self.lock = threading.Lock()

    def __call__(self, done: int, total: int) -> None:
        with self.lock:
            if done < self.done or total != self.total:  # another kind of work has begun
                self.tenth = 0
            self.done, self.total = done, total
            tenth = 10 * done // total if total else 0
            if tenth > self.tenth and time.monotonic() - self.last >= _BRIEF:
                self.tenth = tenth
                self._say()

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Say where things stand at least every 30 s, as long as this is open."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(max(0.0, self.last + _PATIENCE - time.monotonic())):
                with self.lock:
                    if time.monotonic() - self.last >= _PATIENCE:
                        self._say()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _say(self) -> None:
        self.last = time.monotonic()
        share = f"{100 * self.done // self.total} % ({self.done} of {self.total}), " if self.total else ""
        note(f"{self.what}: {share}{self.last - self.start:.0f} s")


def writable(path: Path | None) -> Path | None:
    """`path`, once it is sure that a file can be put there: before the work, not after it. Raises `CommandError`."""
    if path is not None:
        with writing(path):
            check_writable(path)
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tells in one line why a file cannot be written. Raises `CommandError`."""
    try:
        yield
    except OSError as error:
        raise CommandError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_json(path: Path | None, result: Any) -> None:
    """Write `result` whole or not at all; None writes nothing. Raises `CommandError`."""
    if path is None:
        return
    with writing(path):
        write_whole(path, json.dumps(result, indent=2) + "\n")
