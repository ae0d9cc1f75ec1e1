"""What a search has measured, line by line in a file, so that a search that was stopped goes on."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import journal
from ..files import write_whole
from ..reduction import OptionError

__all__ = ["FULL_MODEL", "Journal", "Measurement"]

FULL_MODEL = "full"
"""Key of the full model's own measurements."""
_HEADER = "foveate tune"


@dataclass
class Measurement:
    """One candidate, or the full model, on one batch.

    Attributes:
        candidate: its key, `FULL_MODEL` for the full model.
        samples: numbers of the samples.
        gaps: per sample, see `reference.Outcome`; the full model's are its margins.
        kl: per sample, nats.
        flops: of the prefill, all samples together.
        entering: visual tokens that entered a decoder layer, mean over the layers, all samples together.
        spent: FLOPs of what was really computed in the prefill.
        seconds: wall time, answers included.
        refused: why the candidate cannot work in this model, "" if it can.
    """

    candidate: str
    samples: list[int]
    gaps: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    flops: float = 0.0
    entering: float = 0.0
    spent: float = 0.0
    seconds: float = 0.0
    refused: str = ""


class Journal:
    """Measurements by candidate and samples, in memory and, with a path, in a JSONL file.

    Args:
        path: of the file, made if it is not there; None: nothing is kept.
        fingerprint: what the measurements depend on (model, questions, ...), as plain values.

    Raises:
        OptionError: the file belongs to another search, or is no journal, or cannot be read or written.
    """

    def __init__(self, path: Path | None, fingerprint: Any = None):
        self.path = path
        self._known: dict[tuple[str, tuple[int, ...]], Measurement] = {}
        if path is None:
            return
        header = {_HEADER: 1, "fingerprint": json.loads(json.dumps(fingerprint))}
        try:
            if rows := journal.read(path):
                self._known = self._measurements(rows, header)
                journal.repair(path)
            else:
                write_whole(path, journal.lines([header]))
        except OSError as error:
            raise OptionError(f"journal {path}: cannot be used ({error})") from error
        except (ValueError, TypeError) as error:
            if isinstance(error, OptionError):
                raise
            raise OptionError(f"journal {path}: no journal of foveate tune; remove it") from error

    def __len__(self) -> int:
        return len(self._known)

    def find(self, candidate: str, samples: tuple[int, ...]) -> Measurement | None:
        """What is known about a candidate on a batch."""
        return self._known.get((candidate, samples))

    def add(self, measurement: Measurement) -> Measurement:
        """Keep a measurement; it is on disk when this returns."""
        self._known[measurement.candidate, tuple(measurement.samples)] = measurement
        if self.path is not None:
            journal.append(self.path, [dataclasses.asdict(measurement)])
        return measurement

    def remove(self) -> None:
        """Delete the file: the search is over."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _measurements(self, rows: list[Any], header: dict[str, Any]) -> dict[tuple[str, tuple[int, ...]], Measurement]:
        found = [Measurement(**row) for row in rows[1:]]
        if not isinstance(rows[0], dict) or _HEADER not in rows[0]:
            raise ValueError("another file")
        if rows[0] != header:
            raise OptionError(
                f"journal {self.path}: belongs to another search (other model, questions or version); remove it"
            )
        return {(m.candidate, tuple(m.samples)): m for m in found}
