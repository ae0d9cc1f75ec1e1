"""PuMer students, and their full teachers: ViLT, METER, BridgeTower."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ..engine.session import apply
from ..evaluate.answer import ModelError
from ..evaluate.data import DataError
from ..reduction import Reducer
from .batches import Collator, Held
from .data import Finite, Mixture, Source, evaluation, open_source, parts
from .models import Student, known_labels, load_encoder
from .run import (
    IDENTITY,
    RESULT,
    START,
    Progress,
    Report,
    arguments,
    finished,
    main_process,
    measured_once,
    processes,
    resume_from,
    write,
)
from .settings import Settings
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
    assert settings.batch is not None
    assert settings.steps is not None
    mixture.length = settings.steps * settings.batch * settings.accumulate * everyone
    names = [parts((text,)) for text in settings.eval_data or settings.data]
    held = Held(evaluation([name for one in names for name in one], settings.task, settings.eval_samples, held_out))
    student = load_encoder(settings.model, settings.task, vocabulary, settings.seed)
    teacher = _teacher(settings, vocabulary)
    return _train(settings, identity, student, teacher, reducer, vocabulary, mixture, held, progress, report)


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


def _train(
    settings: Settings,
    identity: dict[str, Any],
    student: Student,
    teacher: Student | None,
    reducer: Reducer | None,
    vocabulary: Vocabulary | None,
    mixture: Mixture,
    held: Held,
    progress: Progress | None,
    report: Report | None,
) -> dict[str, Any]:
    from transformers import PrinterCallback

    from .trainer import EncoderTrainer, Watcher

    def collator(positions: Mixture | Held, augment: bool) -> Collator:
        return Collator(settings.task, student, vocabulary, positions, settings.negatives, augment)

    checkpoint = resume_from(settings)
    session = None if reducer is None else apply(student.model, reducer)
    try:
        trainer = EncoderTrainer(
            student.model,
            arguments(settings),
            data_collator=collator(mixture, settings.augment),
            train_dataset=mixture,
            eval_dataset=held,
            settings=settings,
            names=[source.name for source in held.sources],
            teacher=None if teacher is None else teacher.model,
            eval_collator=collator(held, False),
            callbacks=[Watcher(progress, report)],
        )
        trainer.remove_callback(PrinterCallback)
        if main_process():
            write(settings.out / IDENTITY, identity)
        start = measured_once(settings.out / START, trainer.start)
        begun = time.monotonic()
        trainer.train(resume_from_checkpoint=checkpoint)
        seconds = time.monotonic() - begun
        accuracy = trainer.accuracy()
    finally:
        if session is not None:
            session.remove()
    result = {**identity, **start, "accuracy": accuracy, "seconds": seconds, "history": trainer.state.log_history}
    if main_process():
        student.save(settings.out)
        write(settings.out / RESULT, result)
    return result
