"""PuMer students, and their full teachers: ViLT, METER, BridgeTower."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from ..evaluate.answer import ModelError
from ..evaluate.data import DataError
from ..reduction import Reducer
from .batches import Collator, Held
from .common import Progress, Report, carry_out, finished, processes
from .data import Finite, Mixture, Source, evaluation, open_source, parts
from .models import Student, check_task, known_labels, load_encoder
from .settings import Settings
from .trainer import EncoderTrainer
from .vocabulary import Vocabulary

__all__ = ["train_encoder"]


def train_encoder(
    settings: Settings,
    family: str,
    reducer: Reducer | None,
    progress: Progress | None,
    report: Report | None,
) -> dict[str, Any]:
    """See `run`."""
    for name in (settings.model, settings.teacher):
        if name is not None:
            check_task(name, settings.task)
    weights = parts(settings.data)
    held_out = not settings.eval_data
    sources = [open_source(name, settings.task, settings.seed, held_out) for name in weights]
    mixture = Mixture(sources, list(weights.values()), settings.seed)
    everyone = processes()
    settings = settings.filled(family, mixture.examples, everyone)
    identity = settings.identity(everyone)
    done = finished(settings.out, identity)
    if done is not None:
        return done

    vocabulary = _vocabulary(settings, sources)
    if vocabulary is not None:
        mixture = Mixture(_known(settings, sources, vocabulary), list(weights.values()), settings.seed)
    mixture.length = settings.positions(everyone)
    names = list(parts(settings.eval_data or settings.data))
    held = Held(evaluation(names, settings.task, settings.eval_samples, held_out))
    student = load_encoder(settings.model, settings.task, vocabulary, settings.seed)
    teacher = _teacher(settings, vocabulary)

    def make(**shared: Any) -> EncoderTrainer:
        collate = functools.partial(Collator, settings.task, student, vocabulary, negatives=settings.negatives)
        return EncoderTrainer(
            student.model,
            data_collator=collate(positions=mixture, augment=settings.augment),
            train_dataset=mixture,
            eval_dataset=held,
            teacher=None if teacher is None else teacher.model,
            eval_collator=collate(positions=held),
            **shared,
        )

    def save() -> None:
        student.save(settings.out)

    return carry_out(settings, identity, student.model, reducer, held, make, save, progress, report)


def _vocabulary(settings: Settings, sources: Sequence[Source]) -> Vocabulary | None:
    """Labels of the model, else of the teacher, else new ones; one for both."""
    if settings.task == "retrieval":
        return None
    found = known_labels(settings.model, settings.task)
    theirs = known_labels(settings.teacher, settings.task) if settings.teacher else None
    if found and theirs and found.label2id != theirs.label2id:
        raise ModelError(f"teacher {settings.teacher}: its labels are not those of model {settings.model}")
    found = found or theirs
    if found is not None:
        return found
    answers = {answer for source in sources for answer in source.answers()}
    if len(answers) < 2:
        raise DataError(f"data {', '.join(settings.data)}: fewer than two different answers, there is nothing to learn")
    return Vocabulary.of(answers)


def _known(settings: Settings, sources: Sequence[Source], vocabulary: Vocabulary) -> list[Source]:
    """The sources, without rows that no label fits if the settings say so. Raises `DataError` if they do not."""
    kept: list[Source] = []
    for source in sources:
        if settings.skip_unknown and isinstance(source, Finite):
            rows = [row for row in source.rows if vocabulary.label(row.answer) >= 0]
            if not rows:
                raise DataError(f"data {source.name}: the model has no label for any of its answers")
            source = Finite(source.name, rows)
        else:
            vocabulary.must_know(source.answers(), source.name)
        kept.append(source)
    return kept


def _teacher(settings: Settings, vocabulary: Vocabulary | None) -> Student | None:
    if settings.teacher is None:
        return None
    teacher = load_encoder(settings.teacher, settings.task, vocabulary, settings.seed)
    if teacher.fresh:
        raise ModelError(f"teacher {settings.teacher}: has no trained head for task {settings.task}")
    return teacher
