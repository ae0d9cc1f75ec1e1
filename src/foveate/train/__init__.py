"""Training with visual tokens reduced: PuMer students of full teachers, and decoder VLMs by LoRA.

* `run(Settings(...), reducer)`: what `foveate train` does.
* `settings`: the choices of a run and the paper's presets.  `data`, `rows`: data sets, seeded mixtures, local files.
* `vocabulary`, `batches`: rows into batches.  `models`: which class learns which task.
* `losses`, `trainer`: the losses, and transformers' Trainer with them.  `encoder`, `decoder`: the two kinds of model,
  which share `common`.

Importing this package imports neither transformers' Trainer nor an optional dependency.
"""

from .common import TrainingError
from .run import run
from .settings import TASKS, Settings

__all__ = ["TASKS", "Settings", "TrainingError", "run"]
