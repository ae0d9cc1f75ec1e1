"""`docs/compatibility.md`, written from the verdicts of `python -m tests.catalogue --json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.catalogue.build import class_name
from tests.catalogue.count import FEATURES, IN_DECODER, IN_TOWER, OUTSIDE

__all__ = ["COLUMNS", "page"]

COLUMNS: dict[str, Sequence[str]] = {
    "before and inside the LLM": list(IN_DECODER),
    "reading the tower": list(IN_TOWER),
    **{name: [name] for name in FEATURES},
}
"""Heading of each column, and what must be exact for a yes in it."""
_HEADINGS = {"eager": "eager attention", "beams": "beam search", "training": "training"}
_INTRODUCTION = """# Compatibility

Made by `make compatibility`, not by hand: each cell is the outcome of a run. A random model of each image-text-to-text
class of transformers {transformers} (float32, CPU, {depth}) answers a padded batch of two prompts with one image each.

**yes** means exact within {tolerance:g} of the reference: the full model that never looks at a removed token, and for
recurrent layers the physically shorter sequence. Compared are a forward pass, four greedy tokens with and without
cache, and each row alone; `keep=1.0` and the model after the session are bitwise the plain model. A number is the
reason why not, and the error that you will see.

| column | methods |
|---|---|
| before and inside the LLM | {decoder} |
| reading the tower | {tower}; which patches a visual token is made of is checked by changing them |
| eager attention | FastV under `attn_implementation="eager"` |
| beam search | Random, two beams |
| training | Random: gradients of all parameters, within 1e-3 of the largest (1e-2 with recurrent layers) |

**{exact} of {inside}** classes with visual tokens in the decoder's sequence are exact with all methods of the first
column, {tower_exact} with those that read the tower too.
"""


def _cell(found: Mapping[str, str], wanted: Sequence[str], reasons: dict[str, int]) -> str:
    words = list(dict.fromkeys(found[method] for method in wanted if found[method] != "exact"))
    numbers = [str(reasons.setdefault(reason, len(reasons) + 1)) for reason in words]
    if not words:
        return "yes"
    some = "" if any(found[method] == "exact" for method in wanted) else "no: "
    if not some:
        some = ", ".join(method for method in wanted if found[method] == "exact") + "; else "
    return some + ", ".join(numbers)


def page(verdicts: Mapping[str, Mapping[str, str]], transformers: str, tolerance: float) -> str:
    """Markdown: the table, then the reasons.

    Args:
        verdicts: {model type: {method or feature: words}}.
        transformers: version that was tried.
        tolerance: of logits.
    """
    reasons: dict[str, int] = {}
    inside = {name: found for name, found in verdicts.items() if name not in OUTSIDE}
    first = list(COLUMNS["before and inside the LLM"])
    exact = [name for name, found in inside.items() if all(found[method] == "exact" for method in first)]
    both = [name for name in exact if all(inside[name][method] == "exact" for method in IN_TOWER)]
    lines = [
        _INTRODUCTION.format(
            transformers=transformers,
            depth="six decoder layers",
            tolerance=tolerance,
            decoder=", ".join(IN_DECODER),
            tower=", ".join(IN_TOWER),
            exact=len(exact),
            inside=len(inside),
            tower_exact=len(both),
        ),
        "| class | " + " | ".join(_HEADINGS.get(name, name) for name in COLUMNS) + " |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for name in sorted(inside, key=lambda name: class_name(name).lower()):
        cells = [_cell(inside[name], wanted, reasons) for wanted in COLUMNS.values()]
        lines.append(f"| {class_name(name)} (`{name}`) | " + " | ".join(cells) + " |")
    lines += ["", "## Reasons", ""]
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    lines += ["", "## Without visual tokens in a decoder's sequence", "", "Refused by `foveate.apply`:", ""]
    for name in sorted(set(verdicts) & OUTSIDE):
        lines.append(f"* {class_name(name)} (`{name}`): {verdicts[name]['random'].removeprefix('refused: ')}")
    return "\n".join(lines) + "\n"
