"""A run from its settings to a trained model."""

from __future__ import annotations

from typing import Any

from ..evaluate.answer import quiet
from ..reduction import Reducer
from .common import Progress, Report, need
from .settings import Settings

__all__ = ["run"]


def run(
    settings: Settings, reducer: Reducer | None, progress: Progress | None = None, report: Report | None = None
) -> dict[str, Any]:
    """Train a model; go on where an earlier call with the same settings was interrupted.

    `settings.out` will hold the model (`from_pretrained`), `result.json`, `run.json` (the settings), checkpoints and
    TensorBoard logs (`runs/`).

    Args:
        reducer: at work in the model during training and evaluation; None for the full model.
        progress: called with (steps done, steps).
        report: called with every record that is logged.

    Returns:
        What `result.json` holds: settings, accuracy by data set before and after training and of the teacher, seconds.

    Raises:
        TrainingError: an optional dependency is missing, or the folder holds another run.
        ModelError, DataError, OptionError, UnsupportedError: whatever is wrong with model, data, options.
    """
    need("accelerate")
    from .models import ENCODERS, family_of

    family = family_of(settings.model)
    if family in ENCODERS:
        from .encoder import train_encoder as train
    else:
        from .decoder import train_decoder as train
    with quiet():
        return train(settings, family, reducer, progress, report)
