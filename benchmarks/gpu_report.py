"""The results of `gpu.py` as Markdown: tables, and by name what is not in them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

FULL = "unreduced"
_GIGA = 2**30


def _table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def _median(row: dict[str, Any], what: str) -> float | None:
    values = [run[what] for run in row["runs"].values()]
    return statistics.median(values) if values else None


def ratio(above: dict[str, Any] | None, below: dict[str, Any], what: str) -> float | None:
    """Median of above / below over the rounds that both have; None if there is none."""
    if above is None:
        return None
    both = above["runs"].keys() & below["runs"].keys()
    return statistics.median(above["runs"][turn][what] / below["runs"][turn][what] for turn in both) if both else None


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _bytes(value: int | None) -> str:
    return "-" if value is None else f"{value / _GIGA:.2f}"


def _speed(case: dict[str, Any]) -> list[str]:
    full = case["rows"].get(FULL, {"runs": {}})
    lines = [f"### {case['model']}, {case['impl']}, {case['visual_tokens']} visual tokens, batch {case['batch']}", ""]
    rows = []
    for name, row in case["rows"].items():
        if not row["runs"]:
            continue
        below = case["ceilings"].get(row.get("ceiling"))
        reach = [_number(ratio(below, row, what)) for what in ("ttft", "prefill")]
        token = None if below is None else ratio(row, below, "decode")
        faster = [_number(ratio(full, row, what)) for what in ("ttft", "prefill")]
        rows.append([
            name, _number(row.get("visual_tokens_entering"), 0),
            _number(_median(row, "ttft")), faster[0], reach[0], _number(_median(row, "prefill")), faster[1], reach[1],
            _number(_median(row, "decode")), _number(token), _bytes(row["added_bytes"]), _bytes(row["peak_bytes"]),
            str(len(row["runs"])),
        ])  # fmt: skip
    header = ["method", "tokens", "TTFT ms", "faster", "reach", "prefill ms", "faster", "reach", "ms a token"]
    return [*lines, *_table([*header, "/ shorter prompt", "GB added", "GB peak", "rounds"], rows)]


def _asked(row: dict[str, Any], full: dict[str, Any], part: str, what: str) -> str:
    value = row.get(part, {}).get(what)
    base = full.get(part, {}).get(what)
    return "-" if value is None or base is None else str(value) if row is full else f"{value - base:+d}"


def _launches(name: str, rows: list[dict[str, Any]]) -> list[str]:
    full = next((row for row in rows if row["method"] == FULL), {})
    counts = ["kernels", "waits", "profiler_kernels", "profiler_copies_to_host", "profiler_waits"]
    table = [
        [row["method"], *(_asked(row, full, part, what) for part in ("prefill", "token") for what in counts)]
        + [str(row.get("choice", {}).get(what, "-")) for what in ("kernels", "waits")]
        for row in rows if row["outcome"] == "measured"
    ]  # fmt: skip
    titles = ["kernels", "waits", "profiler: kernels", "copies to host", "waits"]
    header = ["method", *(f"{part}: {title}" for part in ("prefill", "token") for title in titles)]
    return [f"### {name}", "", *_table([*header, "choice: kernels", "choice: waits"], table)]


def _missing(result: dict[str, Any]) -> list[str]:
    """One line for everything that was asked for and is not in the tables."""
    found: dict[tuple[str, str, str], list[str]] = {}

    def note(place: str, row: dict[str, Any], name: str) -> None:
        if row["outcome"] == "does not fit":
            place = place.split(",")[0]  # wherever it was tried
        names = found.setdefault((place, row["outcome"], row["why"]), [])
        names += [name] if row["outcome"] not in ("measured", "exact") and name not in names else []

    if "ended" in result:
        note("everything from there on", {"outcome": "ended early", "why": result["ended"]}, "the run")
    for name, said in result["not_built"].items():
        note(name, said, "all of it")
    for row in result["exactness"]:
        note(f"{row['model']}, {row['impl']}, exactness", row, row["method"])
    for row in result["launches"]:
        note(f"{row['model']}, kernels", row, row["method"])
    for case in result["cases"]:
        place = f"{case['model']}, {case['impl']}, {case['visual_tokens']} visual tokens, batch {case['batch']}"
        if "outcome" in case:
            note(place, case, "all of it")
        for name, row in [*case["rows"].items(), *case["ceilings"].items()]:
            note(place, row, name)
            if row["outcome"] == "measured" and not row["runs"]:
                note(place, {"outcome": "left out", "why": "no time for a counted round"}, name)
    return [
        f"* {place}: {', '.join(names)}: {' - '.join(filter(None, said))}"
        for (place, *said), names in found.items()
        if names
    ]


_SPEED = """\
* TTFT: from pixels to the first logits. Prefill: what of it comes after the encoder, deciding there included.
* A token: decoded back to back after the prefill; "/ shorter prompt": the same of the plain model after one.
* Faster: times the unreduced model's speed. Reach: time of the plain model on the physically shorter prompt / this one.
* GB added: peak, on top of weights and prompt. Medians of the ratios within rounds.
"""
_COUNTS = """\
Batch 1, fewest visual tokens, SDPA. The unreduced model in full; methods as what they add to it (on fewer tokens a
library may choose other kernels). Kernels and waits: dispatched operations, as `foveate.measure.launches` counts them
(on a CPU host arithmetic is among them); "profiler": what torch.profiler saw. Choice: what of it is there to choose.
"""


def _exactness(rows: list[dict[str, Any]]) -> list[str]:
    """Cells of one model and attention."""
    differences = [row["difference"] for row in rows if "difference" in row]
    return [
        rows[0]["model"],
        rows[0]["impl"],
        str(sum(row["outcome"] == "exact" for row in rows)),
        ", ".join(row["method"] for row in rows if row["outcome"] == "NOT EXACT") or "none",
        f"{max(differences):.1e}" if differences else "-",
        next((f"{row['tolerance']:.0e}" for row in rows if "tolerance" in row), "-"),
    ]


def markdown(result: dict[str, Any]) -> str:
    """Everything, for people."""
    about, pairs = result["about"], dict[tuple[str, str], list[dict[str, Any]]]()
    for row in result["exactness"]:
        pairs.setdefault((row["model"], row["impl"]), []).append(row)
    title = "Foveate on a GPU" if about["cuda"] else "benchmarks/gpu.py on a CPU: a trial of the script, no result"
    lines = [f"# {title}", "", ", ".join(f"{name} {value}" for name, value in about.items() if value is not None), ""]
    lines += [f"* `{run['command']}`, {run['date']}, {run['seconds']} s" for run in result["runs"]]
    lines += [f"* FlashAttention: {result['flash_attention']}", "", "## Exactness at small widths", ""]
    header = ["model", "attention", "methods exact", "not exact", "largest difference / largest logit", "allowed"]
    lines += _table(header, [_exactness(rows) for rows in pairs.values()])
    lines += ["## Speed and memory", "", _SPEED]
    for case in result["cases"]:
        lines += _speed(case)
    lines += ["## Kernels and waits", "", _COUNTS]
    for name in dict.fromkeys(row["model"] for row in result["launches"]):
        lines += _launches(name, [row for row in result["launches"] if row["model"] == name])
    return "\n".join([*lines, "## Not in the tables", "", *(_missing(result) or ["* nothing"])])
