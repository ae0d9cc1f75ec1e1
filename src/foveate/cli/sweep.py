"""`foveate sweep`: accuracy against cost, for every method and budget."""

from __future__ import annotations

import csv
import io
import shlex
import sys
import time
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import foveate

from .grid import listed_recipes
from .shell import CommandError, JsonOption, plain, progress, say, table, writable, write_json, writing

__all__ = ["sweep"]

_SHOWN = 6  # ids named in a verdict before "and N more"


def sweep(
    model: Annotated[str, typer.Argument(help="A Hub id, a local folder, or zoo:NAME (shipped in the package).")],
    data: Annotated[
        str,
        typer.Option(
            "--data", "-d", metavar="A,B", help="easy-vqa, scenes, moving-shapes (videos), or JSONL/Parquet files."
        ),
    ] = "easy-vqa,scenes",
    methods: Annotated[
        str | None,
        typer.Option("--methods", "-m", metavar="A,B", help="Names, also NAME[option=value;...]; all (the default)."),
    ] = None,
    keep: Annotated[
        str, typer.Option("--keep", "-k", metavar="A,B", help="Budgets: visual tokens per image or their fraction.")
    ] = "0.33,0.22,0.11,0.05",
    samples: Annotated[
        int | None, typer.Option("--samples", "-n", min=1, help="Questions per data set; default: all.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Of methods that draw at random.")] = "0,1,2",
    seed: Annotated[int, typer.Option(help="Of the draw of questions.")] = 0,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="METHOD.NAME=VALUE", help="Option of a method; repeatable."),
    ] = None,
    grid: Annotated[
        Path | None,
        typer.Option(
            "--grid", metavar="FILE", help="YAML list of {method, options, keep}, besides or instead of --methods."
        ),
    ] = None,
    contestants: Annotated[Path | None, typer.Option(hidden=True, help="Old name of --grid.")] = None,
    metric: Annotated[
        str, typer.Option(help="auto, exact, vqa, anls, relaxed, yes-no or choice; auto: by the columns of the data.")
    ] = "auto",
    frames: Annotated[int, typer.Option(min=1, help="Frames that the model is shown of a video.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 8,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the questions.")] = 1,
    repeats: Annotated[int, typer.Option(min=0, help="Timed prefills of each of two batches; 0 for no times.")] = 3,
    share_vision: Annotated[
        bool, typer.Option(help="Run the vision tower once for all methods that leave it alone.")
    ] = True,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Folder of the sweep, gone on with if there; default runs/sweep-MODEL."
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Report on one page.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="The table as CSV.")] = None,
    plots: Annotated[Path | None, typer.Option("--plots", metavar="DIR", help="Folder of plots.")] = None,
    json: JsonOption = None,
) -> None:
    """Accuracy against cost for methods x budgets x seeds; goes on where it was stopped.

    Example: foveate sweep zoo:tiny-llava --data easy-vqa,scenes --methods random,fastv,sparsevlm --keep 0.33,0.11
    --samples 100 --option fastv.layer=1 --json sweep.json --html sweep.html
    """
    from ..evaluate import answer as answering
    from ..evaluate import sweep as sweeping
    from ..evaluate.grid import FULL, expand
    from ..evaluate.store import Folder, Plan, SweepError

    start = time.perf_counter()
    for path in (html, csv_file, json):
        writable(path)
    out = out or Path("runs") / f"sweep-{Path(model.replace(':', '-')).name}"
    for folder in (out, plots):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise CommandError(f"{folder}: a file; give a folder")
        writable(folder / "x" if folder is not None else None)
    budgets, drawn = _budgets(keep), _numbers("seeds", seeds)
    if grid and contestants:
        raise CommandError(f"contestants {contestants}: the old name of --grid; give one of them")
    listed, named = listed_recipes(methods, option or (), grid or contestants, model)
    everyone = expand(listed, budgets, drawn)
    names = [name.strip() for name in data.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise CommandError(f"data {data!r}: name each data set once, separated by commas")
    asked = sweeping.questions(names, samples, seed, metric, frames)
    vlm = answering.load(model, dtype, device)  # type: ignore[arg-type]
    with answering.quiet(always=True), progress("trying the methods") as advance:  # companions are loaded
        accepted, refused = _tried(everyone, named, vlm, asked.samples[0], advance)
    plan = Plan(
        model=model, data=names, samples=samples, seed=seed, metric=metric, max_new_tokens=max_new_tokens,
        batch_size=batch_size, recipes=[FULL, *accepted], refused=refused, metrics=asked.metrics, dtype=dtype,
        device=device, frames=frames, weights=sweeping.fingerprint(vlm.model), machine=sweeping.machine(),
        command=shlex.join(["foveate", *sys.argv[1:]]),
    )  # fmt: skip
    try:
        with answering.quiet(always=True), progress("answers, then times") as advance:
            result = sweeping.sweep(
                Folder(out), plan, vlm, asked, workers=workers, timing_batches=2 if repeats else 0,
                timing_repeats=repeats, share_vision=share_vision, progress=advance, timing_progress=advance,
            )  # fmt: skip
    except SweepError as error:
        raise CommandError(str(error)) from error
    _show(result)
    write_json(json, result)
    _write_csv(csv_file, result["rows"])
    _draw(out, vlm, html, plots)
    say(f"{time.perf_counter() - start:.0f} s. Everything is in {out}.")


# ------------------------------------------------------------------------------------------------ what is asked for
def _budgets(text: str) -> list[int | float]:
    return [foveate.Budget.parse(part.strip()).keep for part in text.split(",") if part.strip()]


def _numbers(name: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise CommandError(f"{name} {text!r}: whole numbers separated by commas are expected") from None
    if len(set(found)) < len(found):
        raise CommandError(f"{name} {text!r}: one is listed twice")
    return found


def _tried(
    everyone: Sequence[Any], named: Container[str], vlm: Any, sample: Any, advance: Any
) -> tuple[list[Any], list[dict[str, str]]]:
    """Those that work in this model, and why the others do not.

    Raises:
        OptionError, BudgetError: what is wrong with a method that was asked for by name.
        CommandError: none works.
    """
    from ..evaluate.grid import refusal

    accepted, refused = [], []
    for number, each in enumerate(everyone, 1):
        error = refusal(each, vlm, sample)
        if error is None:
            accepted.append(each)
        elif each.method in named and not isinstance(error, foveate.UnsupportedError):
            raise error
        else:
            refused.append({"id": each.id, "reason": " ".join(str(error).split())})
        advance(number, len(everyone))
    if not accepted:
        raise CommandError(f"model {vlm.name} serves none of them; {refused[0]['id']}: {refused[0]['reason']}")
    return accepted, refused


# ------------------------------------------------------------------------------------------------------ what is shown
def _show(result: dict[str, Any]) -> None:
    headers = [
        "method", "budget", "accuracy", "95 % interval", "same as full", "KL", "tokens entering", "after", "FLOPs",
        "KV", "prefill ms", "p Random", "p full",
    ]  # fmt: skip
    rows = [
        [
            row["id"].rpartition("@")[0] or row["id"],
            "-" if row["keep"] is None else f"{row['keep']:g}",
            _form(row["accuracy"], ".3f"),
            "failed" if row["error"] else "{:.3f}-{:.3f}".format(*row["accuracy_ci"]),
            *(_form(row[name], ".3f") for name in ("agreement", "kl")),
            *(_form(row[name], ".1f") for name in ("visual_tokens_entering", "visual_tokens_after")),
            *(_form(row[name], ".0%") for name in ("flops_total_ratio", "kv_ratio")),
            _form(row["prefill_ms"], ".1f"),
            *(_form(row[name], ".3f") for name in ("p_random", "p_full")),
        ]
        for row in result["rows"]
    ]  # fmt: skip
    if not plain():
        say(f"{result['model']}, {result['samples']} questions from {' and '.join(result['data'])}")
    table(headers, rows)
    say()
    say("FLOPs: whole prefill on paper, vision tower included (what deciding costs is not), against the full model.")
    say("Tokens: visual ones, mean over the layers: those that enter a layer, and those left after it.")
    say("p: paired tests, questions of one image together; p Random against Random with the nearest tokens entering.")
    for baseline, verdict in result["verdicts"].items():
        say(
            f"Against {baseline} at equal FLOPs (5 %, Holm): better {_list(verdict['better'])}; "
            f"worse {_list(verdict['worse'])}; no difference shown {_list(verdict['open'])}"
            + (f"; cheaper than it ever was {_list(verdict['uncompared'])}." if verdict["uncompared"] else ".")
        )
    for each in result["notes"]:
        say(each)
    for row in result["rows"]:
        if row["error"]:
            say(f"Failed: {row['id']}: {row['error']}")
    for each in result["refused"]:
        say(f"Refused: {each['id']}: {each['reason']}")


def _form(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _list(ids: Sequence[str]) -> str:
    if not ids:
        return "none"
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return f"{len(ids)} ({', '.join(ids[:_SHOWN])}{more})"


def _write_csv(path: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    if path is None:
        return
    from ..files import write_whole

    flat = [dict(_flat(row)) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    with writing(path):
        write_whole(path, text.getvalue())


def _flat(row: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """One column per leaf: accuracy_ci.low, accuracy_by_data.scenes, options as name=value."""
    for name, value in row.items():
        if name == "options":
            yield name, " ".join(f"{key}={each}" for key, each in sorted(value.items()))
        elif isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and name.endswith("_ci"):
            yield from zip((f"{prefix}{name}.low", f"{prefix}{name}.high"), value, strict=True)
        else:
            yield prefix + name, " ".join(map(str, value)) if isinstance(value, list) else value


def _draw(folder: Path, vlm: Any, html: Path | None, plots: Path | None) -> None:
    try:
        if plots is not None:
            from ..view.plots import write_plots

            say(f"Plots: {', '.join(path.name for path in write_plots(folder, plots))} in {plots}")
        if html is not None:
            from ..view.report import write_report

            write_report(folder, vlm, html)
            say(f"Report: {html}")
    except OSError as error:
        raise CommandError(f"{error.filename or html or plots}: cannot be written ({error.strerror})") from error
