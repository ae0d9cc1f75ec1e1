"""Clips of moving shapes: seeded, and their answers true."""

from __future__ import annotations

import numpy as np

from foveate.zoo.moving import DIRECTIONS, clips

CLIPS = clips(40, seed=3, frames=6)


def test_a_clip_depends_on_its_number_alone():
    again = clips(3, seed=3, frames=6)
    for one, other in zip(CLIPS, again):
        assert one.questions == other.questions
        assert all(np.array_equal(a, b) for a, b in zip(one.frames, other.frames))
    assert not np.array_equal(clips(1, seed=4)[0].frames[0], CLIPS[0].frames[0])


def test_only_what_moves_changes():
    for clip in CLIPS:
        changed = np.stack([np.asarray(frame, dtype=int) for frame in clip.frames])
        changed = (changed != changed[0]).any((0, 3))
        for thing, way in zip(clip.things, clip.ways):
            box = changed[thing.top : thing.top + thing.side, thing.left : thing.left + thing.side]
            assert bool(box.any()) == bool(way)
        assert bool(changed.any()) == any(clip.ways)


def test_shapes_move_the_way_they_are_said_to():
    for clip in CLIPS:
        for thing, way in zip(clip.things, clip.ways):
            if way:
                x, y = DIRECTIONS[way]
                first, last = (np.asarray(frame, dtype=int) for frame in (clip.frames[0], clip.frames[-1]))
                gone = np.abs(first - last).sum(2) > 60
                rows, columns = gone[_path(thing, x, y)].nonzero()
                assert len(rows)
                assert rows.max() - rows.min() >= (20 if y else 0)
                assert columns.max() - columns.min() >= (20 if x else 0)


def _path(thing, x: int, y: int) -> tuple[slice, slice]:
    """Where the shape starts and whither it goes."""
    far, side = 48, thing.side
    top, left = (thing.top, thing.left)
    return (
        slice(max(0, top - far * (y < 0)), top + side + far * (y > 0)),
        slice(max(0, left - far * (x < 0)), left + side + far * (x > 0)),
    )


def test_questions_and_answers():
    kinds = {question.kind for clip in CLIPS for question in clip.questions}
    assert kinds >= {"way", "moves", "end", "number", "color", "shape"}
    assert sum(any(clip.ways) for clip in CLIPS) >= 30
    for clip in CLIPS:
        assert len(clip.questions) == 3
        names = {f"{thing.color} {thing.shape}": way for thing, way in zip(clip.things, clip.ways)}
        for question in clip.questions:
            thing = next((way for name, way in names.items() if name in question.text), None)
            if question.kind == "way":
                assert question.answer == thing
            elif question.kind == "moves":
                assert question.answer == ("yes" if thing else "no")
            elif question.kind == "number":
                assert question.answer == str(sum(map(bool, clip.ways)))
