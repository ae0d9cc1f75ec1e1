"""The parts of the page that are plain HTML: answers, bill, tokens by layer, messages. Strings in, strings out."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

from ..engine.trace import Trace
from ..view.patches import stage_name
from .pictures import scoring_stage
from .run import Bill, Progress

__all__ = ["HEADER", "answers", "bill", "layer_note", "layers", "message", "scores_note"]

HEADER = """
<header class="fv-header">
  <h1>Foveate</h1>
  <p>Ask a vision-language model about an image, once with all of its visual tokens and once with only those that
  matter. See whether the answer changes, and what was saved.</p>
</header>
"""
_NOTHING = '<span class="fv-faint">(no answer)</span>'


def message(text: str = "", error: bool = False) -> str:
    """The line below the Ask button; an empty text leaves its place empty."""
    if not text:
        return '<div class="fv-message" role="status"></div>'
    kind, role = ("fv-error", "alert") if error else ("fv-busy", "status")
    return f'<div class="fv-message {kind}" role="{role}">{escape(text)}</div>'


# --------------------------------------------------------------------------------------------------------- answers
def answers(now: Progress | None) -> str:
    """Both answers side by side."""
    if now is None:
        return _pair(_card("Full model", '<span class="fv-faint">Its answer comes here.</span>', ""), _card(
            "With fewer tokens", '<span class="fv-faint">And here the other one.</span>', ""
        ))  # fmt: skip
    finished = not now.writing and now.bill is not None
    full = _card("Full model", _text(now.full_text, now.writing == "full", finished), _tokens(now.full_bill))
    verdict = ""
    if finished:
        same = now.text == now.full_text
        verdict = f'<span class="fv-badge {"fv-same" if same else "fv-differs"}">{"same" if same else "differs"}</span>'
    name = f"{escape(now.question.method)}, {now.question.keep:.0%}"
    return _pair(full, _card(name, _text(now.text, now.writing == "reduced", finished), _tokens(now.bill), verdict))


def _pair(left: str, right: str) -> str:
    return f'<section class="fv-answers" aria-live="polite">{left}{right}</section>'


def _card(title: str, body: str, foot: str, badge: str = "") -> str:
    return (
        f'<article class="fv-card"><h2>{title}</h2><p class="fv-answer">{body}</p>'
        f'<p class="fv-foot">{foot}&nbsp;{badge}</p></article>'
    )


def _text(text: str, writing: bool, finished: bool) -> str:
    cursor = '<span class="fv-cursor"></span>' if writing else ""
    return (escape(text) or (_NOTHING if finished else "")) + cursor


def _tokens(bill: Bill | None) -> str:
    return "" if bill is None else f"{bill.entering:.0f} visual tokens per layer"


# ------------------------------------------------------------------------------------------------------------ bill
def bill(now: Progress | None) -> str:
    """What both runs cost, line by line, with the ratio as a number and as a bar."""
    full, reduced = (None, None) if now is None else (now.full_bill, now.bill)
    name = "Reduced" if now is None else escape(now.question.method)
    rows = "".join(
        _line(label, note, read(full) if full else None, read(reduced) if reduced else None, form)
        for label, note, read, form in _LINES
    )
    return (
        '<section class="fv-bill"><h2>What it costs</h2><table><thead><tr><th scope="col"></th>'
        f'<th scope="col">Full</th><th scope="col">{name}</th><th scope="col" class="fv-ratio">Ratio</th>'
        f"</tr></thead><tbody>{rows}</tbody></table>{_footnote(now)}</section>"
    )


_LINES: tuple[tuple[str, str, Callable[[Bill], float | None], str], ...] = (
    ("Visual tokens", "entering a layer, mean", lambda bill: bill.entering, ".1f"),
    ("Visual tokens", "left after a layer, mean", lambda bill: bill.after, ".1f"),
    ("Decoder", "GFLOPs, prefill", lambda bill: bill.decoder_flops / 1e9, ".2f"),
    ("Vision + decoder", "GFLOPs, prefill", lambda bill: bill.total_flops / 1e9, ".2f"),
    ("KV cache", "MB, after prefill", lambda bill: bill.kv_mb, ".2f"),
    ("Prefill", "ms, vision included", lambda bill: bill.prefill_ms, ".1f"),
    ("Decoding", "ms per token", lambda bill: bill.decode_ms, ".1f"),
)


def _line(label: str, note: str, full: float | None, reduced: float | None, form: str) -> str:
    def cell(value: float | None) -> str:
        return "-" if value is None or math.isnan(value) else format(value, form)

    head = f'<th scope="row">{label} <small>{note}</small></th>'
    ratio = '<td class="fv-ratio">-</td>'
    if full and reduced is not None and not math.isnan(reduced / full):
        share = reduced / full
        kind = " fv-more" if share > 1.05 else ""
        bar = f'<span class="fv-bar{kind}"><i style="width:{min(share, 1):.1%}"></i></span>'
        ratio = f'<td class="fv-ratio">{bar}<b>{share:.0%}</b></td>'
    return f"<tr>{head}<td>{cell(full)}</td><td>{cell(reduced)}</td>{ratio}</tr>"


def _footnote(now: Progress | None) -> str:
    if now is None or now.bill is None:
        return '<p class="fv-foot">Ask a question to fill this in.</p>'
    if not now.rounds:
        return '<p class="fv-foot">Timing …</p>'
    times = "once" if now.rounds == 1 else f"{now.rounds} times"
    return (
        f'<p class="fv-foot">Times: each run {times}, in turns, on this machine; medians. FLOPs: counted on paper.</p>'
    )


# ---------------------------------------------------------------------------------------------------------- layers
def layers(trace: Trace | None, layer: int = 0) -> str:
    """One column per decoder layer, as high as the share of the visual tokens that enter it."""
    if trace is None:
        return '<div class="fv-layers fv-empty">Ask a question to see which tokens enter each layer.</div>'
    total = max(1, int((trace.visual & trace.tokens)[0].sum()))
    columns = "".join(
        f'<div class="fv-column{" fv-here" if number == layer else ""}" title="layer {number}: {count} of {total}">'
        f"<span>{count if trace.n_layers <= 16 or number == layer else ''}</span>"
        f'<i style="height:{100 * count / total:.1f}%"></i></div>'
        for number, count in enumerate(trace.visual_tokens[0].tolist())
    )
    return f'<div class="fv-layers" role="img" aria-label="visual tokens entering each layer">{columns}</div>'


def layer_note(trace: Trace | None, layer: int = 0) -> str:
    """What the left picture shows."""
    if trace is None:
        return _caption("Tokens that stayed", "")
    count, total = int(trace.visual_tokens[0, layer]), int((trace.visual & trace.tokens)[0].sum())
    return _caption(
        f"Tokens entering layer {layer}: {count} of {total}", "Dark: dropped. Tinted: merged into one token."
    )


def scores_note(trace: Trace | None, layer: int = 0) -> str:
    """What the right picture shows, or why there is none."""
    if trace is None:
        return _caption("Scores", "")
    stage = scoring_stage(trace, layer)
    if stage is not None:
        return _caption(f"Scores {stage_name(stage)}, by rank", "Bright: scored high. Dark: gone by then.")
    later = any(trace.scores(stage) is not None for stage in trace.stages)
    return _caption(
        "No scores here", "They are made in a later layer." if later else "This method chooses without scores."
    )


def _caption(title: str, note: str) -> str:
    return f'<div class="fv-caption"><b>{title}</b><span>{note}&nbsp;</span></div>'
