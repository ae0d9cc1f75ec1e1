"""Questions whose answer changed under a method, asked again to see what was dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from ..evaluate.answer import VLM, answer
from ..evaluate.data import Sample, video_of
from ..evaluate.grid import FULL, build_reducer
from ..evaluate.results import BASELINES
from ..evaluate.runner import Record
from ..recipe import Recipe
from .folder import AXES, Entry, Results
from .patches import Panel, panels
from .seen import as_seen, frames_as_seen
from .strip import video_panels

__all__ = ["Change", "Example", "changes", "show"]


@dataclass(frozen=True)
class Change:
    """A question to which a method answers otherwise than the full model, and one of them is right.

    Attributes:
        sample: its number.
        full, reduced: the records of both.
    """

    entry: Entry
    recipe: Recipe
    sample: int
    full: Record
    reduced: Record

    @property
    def lost(self) -> bool:
        """Whether the full model was the one that was right."""
        return self.full.score > self.reduced.score


@dataclass(frozen=True)
class Example:
    """A change with its pictures: for each picture of the question the panels of `view.panels`."""

    change: Change
    pictures: list[list[Panel]]


def changes(results: Results) -> Iterator[Change]:
    """Changes worth showing: methods of the front first, each once before any twice, lost and repaired in turns.

    No image comes twice.
    """
    by_id = {recipe.id: recipe for recipe in results.plan.recipes}
    queues = []
    for number, entry in enumerate(_by_interest(results.entries)):
        found = list(_of(results, entry, by_id[entry.seeds[0]]))
        lost, repaired = [c for c in found if c.lost], [c for c in found if not c.lost]
        # Most changes are losses; a third of the examples shows the other kind.
        mixed = [repaired, lost] if number % 3 == 2 else [lost, repaired]
        queues.append([change for pair in zip_longest(*mixed) for change in pair if change is not None])
    seen: set[object] = set()
    while any(queues):
        for queue in queues:
            while queue:
                change = queue.pop(0)
                image = results.samples[change.sample]["image_id"]
                if image not in seen:
                    seen.add(image)
                    yield change
                    break


def _by_interest(entries: Sequence[Entry]) -> list[Entry]:
    """Entries on a front, after them the others, the baselines last; methods and budgets alternate."""

    def fronts(entry: Entry) -> int:
        return sum(entry.on_front(axis) for axis in AXES.values())

    ordered: list[tuple[int, Entry]] = []
    seen: dict[str, int] = {}
    for entry in sorted(entries, key=lambda entry: (-fronts(entry), -entry.accuracy)):
        seen[entry.name] = seen.get(entry.name, 0) + 1
        ordered.append((seen[entry.name], entry))
    ordered.sort(key=lambda pair: (pair[1].method in BASELINES, pair[0]))
    return [entry for _, entry in ordered]


def _of(results: Results, entry: Entry, recipe: Recipe) -> Iterator[Change]:
    for sample in range(len(results.samples)):
        full, reduced = (results.records.get((each, sample)) for each in (FULL.id, recipe.id))
        if full is not None and reduced is not None and not reduced.same and full.score != reduced.score:
            yield Change(entry, recipe, sample, full, reduced)


def show(vlm: VLM, change: Change, sample: Sample, max_new_tokens: int) -> Example | None:
    """Ask again and see what was kept. None if the answer is another one this time, or nothing was decided.

    In the sweep the question was one of a batch, whose rounding may tip a close call.

    Raises:
        UnsupportedError: the method cannot be applied to this model.
    """
    reducer = build_reducer(change.recipe, vlm)
    if reducer is None:
        return None
    inputs = vlm.inputs([sample])
    with vlm.apply(reducer, [sample], inputs) as session:
        said = answer(vlm, inputs, max_new_tokens)
    trace = session.trace
    if trace is None or not trace.stages or said.texts[0] != change.reduced.predicted:
        return None
    video = video_of(sample)
    if video is not None:
        return Example(change, [video_panels(frames_as_seen(video.frames, vlm), trace)])
    return Example(change, panels([as_seen(sample.image, vlm.processor)], trace, scores=True))
