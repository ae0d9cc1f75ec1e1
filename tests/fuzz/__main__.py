"""`python -m tests.fuzz`: many requests, with progress, gone on with where it was stopped; `make fuzz` runs it.

FUZZ_REQUESTS (20000), FUZZ_SEED (0), FUZZ_SHARD (0/1: this process' part), FUZZ_OUT (build/fuzz). Each finished lot of
requests is one line of `seed-S-shard-I-of-N.jsonl`. Ends with a summary as JSON; the exit code is 1 if a row was wrong.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.cases import Request, requests
from tests.fuzz.judge import Verdict, judge, smallest

LOT = 100
_EVERY = 30.0  # seconds between lines of progress


def lot(number: int, count: int = LOT, judged: Any = judge) -> list[tuple[Request, Verdict]]:
    """The verdicts on `count` requests; the same number gives the same requests."""
    found: list[tuple[Request, Verdict]] = []

    @seed(number)
    @settings(
        max_examples=count, phases=[Phase.generate], deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(requests())
    def each(request: Request) -> None:
        found.append((request, judged(request)))

    each()
    return found


def resident_mb() -> float:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def summary(lots: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of all lots, and how memory grew (MB per 1,000 requests) once every model had been built."""
    counts: Counter[str] = Counter()
    for each in lots:
        counts.update(each["counts"])
    late = lots[len(lots) // 4 :]
    slopes = {}
    for process in {each["process"] for each in late}:
        mine = [each for each in late if each["process"] == process]
        if len(mine) > 2:
            grown = np.polyfit(np.cumsum([sum(each["counts"].values()) for each in mine]), [e["mb"] for e in mine], 1)
            slopes[process] = round(1000 * float(grown[0]), 2)
    return {
        "requests": sum(counts.values()),
        "counts": dict(counts),
        "seconds": round(sum(each["seconds"] for each in lots)),
        "mb_per_1000_requests": slopes,
        "mb": max((each["mb"] for each in lots), default=0.0),
        "wrong": [row for each in lots for row in each["wrong"]],
    }


def main() -> int:
    """Run, write, sum up."""
    torch.set_num_threads(1)
    total, first = int(os.environ.get("FUZZ_REQUESTS", "20000")), int(os.environ.get("FUZZ_SEED", "0"))
    shard, shards = map(int, os.environ.get("FUZZ_SHARD", "0/1").split("/"))
    folder = Path(os.environ.get("FUZZ_OUT", "build/fuzz"))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"seed-{first}-shard-{shard}-of-{shards}.jsonl"
    lots = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {each["lot"] for each in lots}
    mine = [number for number in range((total + LOT - 1) // LOT) if number % shards == shard]
    start, shown, judged = time.monotonic(), 0.0, 0
    for number in mine:
        if number in done:
            continue
        began, counts, wrong, refused = time.monotonic(), Counter[str](), [], Counter[str]()

        def one(request: Request, number: int = number) -> Verdict:
            nonlocal judged, shown
            verdict = judge(request)
            judged += 1
            if time.monotonic() - shown > _EVERY:
                shown = time.monotonic()
                rate = judged / (shown - start)
                left = (len(mine) - len(lots)) * LOT / rate
                print(f"lot {number}: {judged} requests, {rate:.1f}/s, {left / 60:.0f} min left", flush=True)
            return verdict

        for request, verdict in lot(1_000_003 * first + number, judged=one):
            counts[verdict.outcome] += 1
            if verdict.outcome == "refused":
                refused[verdict.why[:100]] += 1
            if verdict.outcome in ("wrong", "tie"):
                row = {"request": repr(request), "why": verdict.why}
                if verdict.outcome == "wrong":
                    row["smallest"] = repr(smallest(request))
                    wrong.append(row)
                print(f"{verdict.outcome.upper()} {row}", flush=True)
        lots.append({
            "lot": number, "counts": counts, "wrong": wrong, "refused": refused, "mb": round(resident_mb(), 1),
            "seconds": round(time.monotonic() - began, 1), "process": os.getpid(),
        })  # fmt: skip
        with file.open("a") as out:
            out.write(json.dumps(lots[-1]) + "\n")
    found = summary(lots)
    print(json.dumps(found, indent=2))
    return 1 if found["counts"].get("wrong") else 0


if __name__ == "__main__":
    sys.exit(main())
