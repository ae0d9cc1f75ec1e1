"""The report of a sweep: one page that needs nothing but itself, with tables, plots and examples.

`write_report` puts the page together; `view.report_tables` has its tables, `view.findings` what it says in words.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape
from importlib import metadata, resources
from pathlib import Path
from string import Template

from ..evaluate.answer import VLM
from ..evaluate.data import DataError, Sample
from ..evaluate.sweep import questions
from ..files import write_whole
from ..reduction import UnsupportedError
from . import report_tables as tables
from .examples import Change, Example, changes, show
from .findings import headline
from .folder import Results, read
from .page import figure_uri, image, jpeg_uri, paragraph
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
    sections = _finished(results, vlm, examples) if results.finished else _unfinished(results)
    title = f"Foveate sweep: {results.plan.model}"
    here = resources.files(__package__)
    script = here.joinpath("report_sort.js").read_text(encoding="utf-8")
    page = Template(here.joinpath("report_template.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        body="\n".join([_head(results, title), *sections, _foot()]),
    )
    # ASCII with references: right in any encoding, and lone surrogates in an answer do no harm.
    write_whole(Path(path), page.encode("ascii", "xmlcharrefreplace"))


def _head(results: Results, title: str) -> str:
    when = f"{(results.ended or results.started):%Y-%m-%d %H:%M} UTC"
    rivals = results.plan.recipes[1:]
    methods, settings = len({each.method for each in rivals}), len({each.row for each in rivals})
    line = f"{methods} methods, {settings} settings, {len(results.samples):,} questions; {when}"
    return f"<header><h1>{escape(title)}</h1>{paragraph(line, 'soft')}</header>"


def _foot() -> str:
    try:
        version = metadata.version("foveate")
    except metadata.PackageNotFoundError:
        version = "of a source tree"
    return f"<footer>{paragraph(f'Written by Foveate {version}. This page loads nothing from anywhere.')}</footer>"


def _section(anchor: str, title: str, *parts: str) -> str:
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


# -------------------------------------------------------------------------------------------------------- the parts
def _unfinished(results: Results) -> list[str]:
    planned = len(results.plan.recipes) * len(results.samples)
    done = len(results.records)
    warning = (
        f"This sweep is not finished: {done:,} of {planned:,} answers ({done / max(planned, 1):.0%}). "
        "Nothing below is a result yet. Run the command again and it goes on where it was stopped."
    )
    return [
        f'<div class="warning" role="alert">{paragraph(warning)}</div>',
        _section("run", "What is being run", tables.facts(results), _command(results)),
        _section("progress", "Answers until now", tables.progress(results)),
        *_refused(results),
    ]


def _finished(results: Results, vlm: VLM | None, examples: int) -> list[str]:
    summary = "".join(f"<li>{escape(sentence)}</li>" for sentence in headline(results))
    sections = [
        _section(
            "summary",
            "Summary",
            f'<ul class="summary">{summary}</ul>',
            "<h3>The most accurate method at each budget</h3>",
            tables.best(results),
        ),
        _section("run", "What was run", tables.facts(results), _command(results)),
        _plots(results),
        _section("rows", "All settings", paragraph(tables.ABOUT_ROWS, "soft"), tables.rows(results)),
    ]
    if versus := tables.versus(results):
        about = paragraph(tables.ABOUT_VERSUS, "soft")
        sections.append(_section("baselines", "Against simple baselines at equal compute", about, versus))
    if len(results.groups("data")) > 1:
        sections.append(_section("data", "By data set", tables.by_data(results)))
    if results.groups("kind"):
        about = paragraph(tables.ABOUT_KINDS, "soft")
        sections.append(_section("kinds", "By kind of question", about, tables.by_kind(results)))
    if examples > 0:
        sections.append(_examples(results, vlm, examples))
    sections += _refused(results)
    return [_contents(sections), *sections]


def _contents(sections: list[str]) -> str:
    links = []
    for section in sections:
        anchor, title = section.split('"')[1], section.split("<h2>")[1].split("</h2>")[0]
        links.append(f'<a href="#{anchor}">{title}</a>')
    return f'<nav aria-label="Contents">{"".join(links)}</nav>'


def _command(results: Results) -> str:
    if not results.plan.command:
        return ""
    return f"<h3>To do it again</h3><pre><code>{escape(results.plan.command)}</code></pre>"


def _refused(results: Results) -> list[str]:
    found = []
    if results.failed:
        about = paragraph("These were asked for, and no numbers can be given for them.", "soft")
        found.append(_section("failed", "Failed", about, tables.reasons(results.failed, "Settings that failed")))
    if results.plan.refused:
        about = paragraph("These were asked for, and this model cannot serve them.", "soft")
        left_out = {each["id"]: each["reason"] for each in results.plan.refused}
        found.append(_section("refused", "Left out", about, tables.reasons(left_out, "Settings left out")))
    return found


def _plots(results: Results) -> str:
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
            pictures.append(image(figure_uri(bright, name), alt, figure_uri(dim, name)))
        groups.append((f"<h3>Accuracy against {escape(axis.title)}</h3>", pictures))
    if all(len(pictures) == 1 for _, pictures in groups):
        cells = "".join(f"<div>{head}{pictures[0]}</div>" for head, pictures in groups)
        parts = [f'<div class="plots three">{cells}</div>']
    else:
        parts = [f'{head}<div class="plots">{"".join(pictures)}</div>' for head, pictures in groups]
    return _section("plots", "Accuracy against cost", paragraph(about, "soft"), *parts)


# ------------------------------------------------------------------------------------------------------ the examples
def _examples(results: Results, vlm: VLM | None, count: int) -> str:
    about = [
        "Questions that the full model and a method answer differently, one of them rightly. Losses and repairs are "
        "both shown, whichever is more frequent."
    ]
    cards: list[str] = []
    asked = None
    if vlm is None:
        about.append("No pictures: the model was not at hand when this page was written.")
    else:
        asked, problem = _questions(results)
        about += [problem] if problem else ["The scores are in the order of their ranks: bright is high."]
    tried = 0
    for change in changes(results):
        if len(cards) == count or tried == _RETRIES * count or sum(map(len, cards)) > _LARGEST:
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
    if not cards:
        about = ["No question was answered differently with one of the answers right."]
    return _section("examples", "Where the answer changed", paragraph(" ".join(about), "soft"), *cards)


def _questions(results: Results) -> tuple[list[Sample] | None, str]:
    """The samples with their images, or None and why not."""
    plan = results.plan
    try:
        asked = questions(plan.data, plan.samples, plan.seed, plan.metric).samples
    except DataError as error:
        return None, f"No pictures: {error}."
    known = [(row["question"], row["image_id"]) for row in results.samples]
    if [(sample.question, sample.image_id) for sample in asked] != known:
        return None, "No pictures: the data have changed since the sweep."
    return asked, ""


def _card(results: Results, change: Change, example: Example | None) -> str:
    sample, entry = results.samples[change.sample], change.entry
    kind = f", {sample['kind']}" if sample.get("kind") else ""
    parts = [
        f"<h3>{escape(sample['question'])}</h3>",
        paragraph(f"{entry.label}; {sample['data']}{kind}", "soft"),
        '<div class="answers">',
        f"<span>right answer: <b>{escape(str(sample['answer']))}</b></span>",
        _answer("full model", change.full.predicted, change.full.score),
        _answer(entry.label, change.reduced.predicted, change.reduced.score),
        "</div>",
    ]
    for line in example.pictures if example else ():
        parts.append('<div class="panels">')
        for panel in line:
            alt = f"{panel.title}, {entry.label}"
            parts.append(
                f"<figure>{image(jpeg_uri(panel.pixels), alt)}<figcaption>{escape(panel.title)}</figcaption></figure>"
            )
        parts.append("</div>")
    return f'<article class="example">{"".join(parts)}</article>'


def _answer(who: str, said: str, score: float) -> str:
    verdict = "right" if score == 1 else "wrong" if score == 0 else f"score {score:.2f}"
    shown = escape(said) if said else "(nothing)"
    return f'<span>{escape(who)}: <span class="{verdict.split()[0]}">{shown} ({verdict})</span></span>'
