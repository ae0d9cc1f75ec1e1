"""`python -m tests.catalogue`: what every image-text-to-text class gets from every method (`make compatibility`).

Each class runs in a fork of its own, so that a crash or a hang costs one line. With `--json FILE`, classes that are in
the file already are not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from foveate.files import write_whole
from tests.catalogue.build import NAMES, class_name, missing
from tests.catalogue.count import FEATURES, IN_DECODER, IN_TOWER, OUTSIDE, TOLERANCE, count
from tests.catalogue.page import page

_EVERY = 20.0  # seconds between lines of progress


def _run(name: str, impl: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    hf.logging.set_verbosity_error()
    try:
        pipe.send(count(name, impl))
    except BaseException as error:
        pipe.send({"all": f"crash: {type(error).__name__}: {error}"})


def counted(name: str, impl: str, limit: float) -> dict[str, str]:
    """`count` in a fork, for at most `limit` seconds."""
    methods = [*IN_DECODER, *IN_TOWER, *FEATURES]
    if missing(name):
        return dict.fromkeys(methods, f"not tried: needs {', '.join(missing(name))}")
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=_run, args=(name, impl, theirs))
    child.start()
    theirs.close()
    try:
        found = ours.recv() if ours.poll(limit) else {"all": f"crash: not done after {limit:g} s"}
    except EOFError:
        found = {"all": "crash: the process ended"}
    child.kill()
    child.join()
    return dict.fromkeys(methods, found["all"]) if "all" in found else found


def table(verdicts: dict[str, dict[str, str]], methods: list[str], title: str) -> str:
    """Classes by their worst verdict, and the sentence of everything that is not exact."""
    inside = {name: found for name, found in verdicts.items() if name not in OUTSIDE}
    exact = [name for name, found in inside.items() if all(found[m] == "exact" for m in methods)]
    lines = [f"{title}: {len(exact)} of {len(inside)} classes exact with {', '.join(methods)}"]
    for name, found in inside.items():
        by_words: dict[str, list[str]] = {}
        for method in methods:
            if found[method] != "exact":
                by_words.setdefault(found[method], []).append(method)
        lines += [f"  {name}: {', '.join(which)}: {words}" for words, which in by_words.items()]
    kinds = Counter(found[m].split(":")[0] for found in inside.values() for m in methods)
    return "\n".join([*lines, "  " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.catalogue")
    parser.add_argument("names", nargs="*", help="model types (default: all)")
    parser.add_argument("--json", type=Path, help="verdicts are kept here, and a later run goes on from them")
    parser.add_argument("--page", type=Path, help="write the verdicts as Markdown")
    parser.add_argument("--impl", default="sdpa", choices=["sdpa", "eager"])
    parser.add_argument("--limit", type=float, default=1500.0, help="seconds for a class")
    options = parser.parse_args()
    verdicts = json.loads(options.json.read_text())["classes"] if options.json and options.json.exists() else {}
    names, said = options.names or NAMES, time.monotonic()
    for number, name in enumerate(names, 1):
        if name not in verdicts or options.names:
            verdicts[name] = counted(name, options.impl, options.limit)
            verdicts = {each: verdicts[each] for each in NAMES if each in verdicts}
            if options.json:
                kept = {"impl": options.impl, "transformers": hf.__version__, "classes": verdicts}
                write_whole(options.json, json.dumps(kept, indent=1) + "\n")
        if time.monotonic() - said > _EVERY:
            print(f"{number}/{len(names)} classes", file=sys.stderr, flush=True)
            said = time.monotonic()
    shown = {name: verdicts[name] for name in names}
    print(table(shown, list(IN_DECODER), "Decoder"))
    print(table(shown, list(IN_TOWER), "Tower"))
    print(table(shown, list(FEATURES), "Features"))
    outside = [name for name in names if name in OUTSIDE]
    print(f"Outside the sequence: {len(outside)} classes")
    for name in outside:
        print(f"  {name} ({class_name(name)}): {shown[name]['random']}")
    if options.page:
        write_whole(options.page, page(verdicts, hf.__version__, TOLERANCE))
    words = [found[m].split(":")[0] for found in shown.values() for m in found]
    return int(any(kind in ("wrong", "silent", "crash") for kind in words))


if __name__ == "__main__":
    sys.exit(main())
