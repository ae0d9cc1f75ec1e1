"""The report of a sweep: one page that needs nothing but itself, with tables, plots and examples.

`write_report` puts the page together; `view.report_tables` has its tables, `view.findings` what it says in words.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..evaluate.answer import VLM
from ..evaluate.data import DataError, Sample
from ..evaluate.sweep import questions
from ..files import write_whole
from ..reduction import UnsupportedError
from . import report_tables as tables
from .examples import Change, Example, changes, show
from .findings import headline
from .folder import Results, read
from .page import Picture, Section, figure_uri, jpeg_uri
from .plots import available, facet_figures
from .series import DARK, LIGHT

__all__ = ["write_report"]

_LARGEST = 3_000_000
"""Characters of example pictures on a page."""
_RETRIES = 4  # changes looked at for each example shown


def write_report(folder: str | Path, vlm: VLM | None, path: str | Path, examples: int = 8) -> None:
    """Write the report of a sweep as one HTML page, whole or not at all.

    An unfinished sweep gets a page that says so, with what was answered until now.

    Args:
        folder: of the sweep.
        vlm: the model of the sweep, to show what was dropped in the examples; None: the examples come without pictures.
        path: of the page.
        examples: questions to show whose answer changed.

    Raises:
        SweepError: no sweep there, or a file of it cannot be read.
        OSError: the page cannot be written.
    """
    results = read(folder)
    templates = Environment(
        loader=PackageLoader("foveate.view"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    assert templates.loader is not None
    script = templates.loader.get_source(templates, "sort.js")[0]
    page = templates.get_template("report.html").render(
        title=f"Foveate sweep: {results.plan.model}",
        subtitle=_subtitle(results),
        warning="" if results.finished else _warning(results),
        sections=_finished(results, vlm, examples) if results.finished else _unfinished(results),
        foot=_foot(),
        script=Markup(script),  # a file of the package
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )
    # ASCII with references: right in any encoding, and lone surrogates in an answer do no harm.
    write_whole(Path(path), page.encode("ascii", "xmlcharrefreplace"))


def _subtitle(results: Results) -> str:
    when = f"{(results.ended or results.started):%Y-%m-%d %H:%M} UTC"
    reduced = results.plan.recipes[1:]
    methods, settings = len({each.method for each in reduced}), len({each.row for each in reduced})
    return f"{methods} methods, {settings} settings, {len(results.samples):,} questions; {when}"


def _foot() -> str:
    try:
        version = metadata.version("foveate")
    except metadata.PackageNotFoundError:
        version = "of a source tree"
    return f"Written by Foveate {version}. This page loads nothing from anywhere."


def _warning(results: Results) -> str:
    planned = len(results.plan.recipes) * len(results.samples)
    done = len(results.records)
    return (
        f"This sweep is not finished: {done:,} of {planned:,} answers ({done / max(planned, 1):.0%}). "
        "Nothing below is a result yet. Run the command again and it goes on where it was stopped."
    )


# -------------------------------------------------------------------------------------------------------- the parts
def _unfinished(results: Results) -> list[Section]:
    return [
        Section("run", "What is being run", [("facts", tables.facts(results)), *_command(results)]),
        Section("progress", "Answers until now", [("table", tables.progress(results))]),
        *_without_numbers(results),
    ]


def _finished(results: Results, vlm: VLM | None, examples: int) -> list[Section]:
    best = [("heading", "The most accurate method at each budget"), ("table", tables.best(results))]
    sections = [
        Section("summary", "Summary", [("summary", headline(results)), *best]),
        Section("run", "What was run", [("facts", tables.facts(results)), *_command(results)]),
        _plots(results),
        Section("rows", "All settings", [("text", tables.ABOUT_ROWS), ("table", tables.rows(results))]),
    ]
    if versus := tables.versus(results):
        title = "Against simple baselines at equal compute"
        sections.append(Section("baselines", title, [("text", tables.ABOUT_VERSUS), ("table", versus)]))
    if len(results.groups("data")) > 1:
        sections.append(Section("data", "By data set", [("table", tables.by_data(results))]))
    if results.groups("kind"):
        parts = [("text", tables.ABOUT_KINDS), ("table", tables.by_kind(results))]
        sections.append(Section("kinds", "By kind of question", parts))
    if examples > 0:
        sections.append(_examples(results, vlm, examples))
    return sections + _without_numbers(results)


def _command(results: Results) -> list[tuple[str, Any]]:
    return [("command", results.plan.command)] if results.plan.command else []


def _without_numbers(results: Results) -> list[Section]:
    found = []
    if results.failed:
        about = "These were asked for, and no numbers can be given for them."
        table = tables.reasons(results.failed, "Settings that failed")
        found.append(Section("failed", "Failed", [("text", about), ("table", table)]))
    if results.plan.refused:
        about = "These were asked for, and this model cannot serve them."
        table = tables.reasons({each["id"]: each["reason"] for each in results.plan.refused}, "Settings left out")
        found.append(Section("refused", "Left out", [("text", about), ("table", table)]))
    return found


def _plots(results: Results) -> Section:
    about = (
        "The same answers against three costs, which rank the methods differently. Bars: 95 % intervals, and for "
        "milliseconds the quartiles of the runs. Rings: on the Pareto front, the broad grey steps. Grey lines: "
        "baselines, which may leave a panel at its bottom. Dashed: the full model, with its interval."
    )
    groups = []
    for axis in available(results):
        light, dark = (facet_figures(results, axis, theme) for theme in (LIGHT, DARK))
        pictures = []
        for (title, bright), (_, dim) in zip(light, dark, strict=True):
            alt = f"Accuracy against {axis.title}: {title}. The numbers are in the table of all settings."
            name = f"{axis.name}-{title}"
            pictures.append(Picture(figure_uri(bright, name), alt, figure_uri(dim, name)))
        groups.append((f"Accuracy against {axis.title}", pictures))
    single = all(len(pictures) == 1 for _, pictures in groups)
    parts = [("text", about), ("plots_in_a_row" if single else "plots", groups)]
    return Section("plots", "Accuracy against cost", parts)


# ------------------------------------------------------------------------------------------------------ the examples
def _examples(results: Results, vlm: VLM | None, count: int) -> Section:
    about = [
        "Questions that the full model and a method answer differently, one of them rightly. Losses and repairs are "
        "both shown, whichever is more frequent."
    ]
    cards: list[dict[str, Any]] = []
    size = 0
    asked = None
    if vlm is None:
        about.append("No pictures: the model was not at hand when this page was written.")
    else:
        asked, problem = _questions(results)
        about += [problem] if problem else ["The scores are in the order of their ranks: bright is high."]
    tried = 0
    for change in changes(results):
        if len(cards) == count or tried == _RETRIES * count or size > _LARGEST:
            break
        tried += 1
        if vlm is None or asked is None:
            cards.append(_card(results, change, None))
            continue
        try:
            example = show(vlm, change, asked[change.sample], results.plan.max_new_tokens)
        except UnsupportedError:
            continue
        if example is not None:
            cards.append(_card(results, change, example))
            size += sum(len(picture.uri) for line in cards[-1]["panels"] for _, picture in line)
    if not cards:
        about = ["No question was answered differently with one of the answers right."]
    parts = [("text", " ".join(about)), *(("example", card) for card in cards)]
    return Section("examples", "Where the answer changed", parts)


def _questions(results: Results) -> tuple[list[Sample] | None, str]:
    """The samples with their images, or None and why not."""
    plan = results.plan
    try:
        asked = questions(plan.data, plan.samples, plan.seed, plan.metric, plan.frames).samples
    except DataError as error:
        return None, f"No pictures: {error}."
    known = [(row["question"], row["image_id"]) for row in results.samples]
    if [(sample.question, sample.image_id) for sample in asked] != known:
        return None, "No pictures: the data have changed since the sweep."
    return asked, ""


def _card(results: Results, change: Change, example: Example | None) -> dict[str, Any]:
    sample, entry = results.samples[change.sample], change.entry
    kind = f", {sample['kind']}" if sample.get("kind") else ""
    answers = [("full model", change.full), (entry.label, change.reduced)]
    return {
        "question": sample["question"],
        "about": f"{entry.label}; {sample['data']}{kind}",
        "right": str(sample["answer"]),
        "answers": [(who, record.predicted, _verdict(record.score)) for who, record in answers],
        "panels": [
            [(panel.title, Picture(jpeg_uri(panel.pixels), f"{panel.title}, {entry.label}")) for panel in line]
            for line in (example.pictures if example else ())
        ],
    }


def _verdict(score: float) -> str:
    return "right" if score == 1 else "wrong" if score == 0 else f"score {score:.2f}"
