"""One worker process of one stage: ``python -m recipes.tiny_vilt.worker STAGE FOLDER SEED WORKER WORKERS STEPS``.

Started by `recipes.tiny_vilt`; not meant to be started by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ..loop import Place
from .reduced import reduced
from .stages import STAGES


def main() -> None:
    """Run the stage that the command line names."""
    stage, folder, *numbers = sys.argv[1:]
    seed, worker, workers, steps = map(int, numbers)
    {**STAGES, "reduced": reduced}[stage](Place(Path(folder), seed, worker, workers), steps)


if __name__ == "__main__":
    main()
