"""A further process of a sweep, started by `sweep`: `python -m foveate.evaluate.worker FOLDER NUMBER WORKERS`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import threading
import warnings
from pathlib import Path

from .answer import load
from .store import Folder
from .sweep import questions, run_shard, runner_of, shared_threads

__all__ = ["main"]


def main() -> None:
    """Answer one share of the batches of the plan in a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("number", type=int)
    parser.add_argument("workers", type=int)
    parser.add_argument("--no-share-vision", action="store_true")
    parser.add_argument("--import", dest="modules", action="append", default=[], help="module that registers a method")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for module in arguments.modules:
        importlib.import_module(module)
    folder = Folder(arguments.folder)
    plan = folder.plan()
    vlm = load(plan.model, plan.dtype, plan.device)  # type: ignore[arg-type]
    runner = runner_of(
        plan,
        vlm,
        questions(plan.data, plan.samples, plan.seed, plan.metric, plan.frames),
        not arguments.no_share_vision,
    )
    with shared_threads(arguments.workers):
        run_shard(folder, runner, arguments.number, arguments.workers)


def _end_with_parent() -> None:
    # Returns when the parent is gone, however it went. sys.stdin would hold a lock that the interpreter needs to end.
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    main()
