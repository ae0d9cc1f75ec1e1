"""What `keep` means: a count is of every image or video, a fraction is Python's own rounding, everything is nothing."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch

import foveate
from foveate.ops.select import rounded_ratio
from foveate.ops.visionzip import split_counts
from foveate.reduction import Budget
from tests.families import build, inputs, visual_slots
from tests.reducers.test_matrix import METHODS
from tests.reference.checks import build_once

MOST = 20_000
FRACTIONS = [1 / 3, 2 / 3, 0.1, 0.145, 0.285, 0.469, 0.575, 0.999, 1.0, 1e-4, *(i / 64 for i in range(1, 64))]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(4))
def test_fractions_are_rounded_as_python_does(chunk: int):
    drawn = random.Random(chunk)
    every = torch.arange(MOST + 1)
    for keep in [*FRACTIONS[chunk::4], *(drawn.random() or 0.5 for _ in range(12))]:
        counts = Budget(keep).per_row(every, most=MOST).tolist()
        assert counts == [min(n, max(1, round(keep * n))) for n in range(MOST + 1)], keep


def test_whole_numbers_are_divided_without_error():
    above, below = torch.arange(-60, 400), 7
    assert rounded_ratio(above, below).tolist() == [round(Fraction(n, below)) for n in above.tolist()]
    assert rounded_ratio(torch.tensor([5, 7, -5, -7]), 2).tolist() == [2, 4, -2, -4], "halves to the even one"


def test_visionzip_splits_half_up():
    counts = torch.arange(3000)
    for share in (10 / 64, 0.1, 0.25, 0.3, 0.5, 0.9):
        exact = Fraction(share).limit_denominator(1000)
        expected = [min(int(n * exact + Fraction(1, 2)), max(n - 1, 0)) for n in range(3000)]
        assert split_counts(counts, share)[1].tolist() == expected


# ------------------------------------------------------------------------------------------------------------- items
def kept_of_images(model, method: foveate.Reducer, prompt: dict, stage: int | None = None) -> list[list[int]]:
    with foveate.apply(model, method) as session, torch.no_grad():
        model(**prompt)
    trace = session.trace
    kept, layout = trace.kept(max(trace.stages) if stage is None else stage), trace.layout
    return [[int(kept[row, image.slots].sum()) for image in images] for row, images in enumerate(layout.images)]


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_random_takes_the_count_of_every_image(family: str):
    model = build_once(family)
    prompt = inputs(family, model, batch=2, images=[2, 1] if family == "qwen2_5_vl" else 1)
    for row in kept_of_images(model, foveate.Random(keep=5), prompt):
        assert row == [5] * len(row)


TOTALS = ["dart", "fastv", "random", "sparsevlm-2.0"]


@pytest.mark.parametrize("method", TOTALS)
def test_an_image_smaller_than_the_count_leaves_nothing_to_the_others(method: str):
    """Of images of 12 and of 15 tokens a count of 13 leaves 12 + 13, not 2 * 13."""
    model = build_once("qwen2_5_vl")
    prompt = inputs("qwen2_5_vl", model, batch=1, images=2)
    sizes = kept_of_images(model, foveate.Random(keep=1.0), prompt)[0]
    assert len(set(sizes)) == 2
    keep = (min(sizes) + max(sizes)) // 2
    total = min(sizes) + keep
    after = foveate.FastV(keep=keep, layer=1) if method == "fastv" else METHODS[method](keep)
    with foveate.apply(model, after) as session, torch.no_grad():
        model(**prompt)
    if method.startswith("sparsevlm"):
        assert float(session.trace.mean_visual_tokens_after[0]) <= total + 0.5
    else:
        assert int(session.trace.visual_tokens[0, -1]) == total
    assert total < min(2 * keep, sum(sizes))


# -------------------------------------------------------------------------------------------------------- everything
EVERYTHING = {
    **METHODS,
    "downsample": lambda keep: foveate.Downsample(keep=keep),
    "pitome in the tower": lambda keep: foveate.PiToMe(keep=keep),
    "tome in the tower": lambda keep: foveate.ToMe(keep=keep),
}
IN_TOWER = ["downsample", "pitome in the tower", "tome in the tower"]


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("keep", [1.0, 1000])
@torch.no_grad()
def test_everything_kept_is_the_model_bit_for_bit(family: str, keep: float):
    model = build_once(family)
    prompt = inputs(family, model, batch=2)
    full = model(**prompt).logits
    for method, make in EVERYTHING.items():
        try:
            with foveate.apply(model, make(keep)) as session:
                assert torch.equal(model(**prompt).logits, full), method
        except (foveate.UnsupportedError, foveate.OptionError):  # a tower it cannot work in, a count of several tiles
            assert method in IN_TOWER
            continue
        assert torch.equal(session.trace.visual_tokens[:, -1], visual_slots(prompt["input_ids"]).sum(1)), method


@torch.no_grad()
def test_row_ends_stay_with_an_image_that_keeps_everything():
    """In a batch in which another image loses some."""
    model = build("llava_next")
    prompt = inputs("llava_next", model, batch=2)
    sizes = visual_slots(prompt["input_ids"]).sum(1)
    assert int(sizes.min()) < int(sizes.max())
    with foveate.apply(model, foveate.AveragePool(keep=int(sizes.min()))) as session:
        model(**prompt)
    left = session.trace.visual_tokens[:, 0]
    assert int(left[sizes.argmin()]) == int(sizes.min())
    assert int(left[sizes.argmax()]) <= int(sizes.min())
