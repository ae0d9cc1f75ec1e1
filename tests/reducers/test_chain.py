"""Chain: one trace, honest budgets, and each member's own positions."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.reduction import TapSpec
from tests import families
from tests.reducers.test_matrix import one_row
from tests.reference.checks import build_once, footprint, largest
from tests.reference.plans import Fixed, draw_removed
from tests.reference.renumbered import decoder_inputs, shorter_prompt


@torch.no_grad()
def entering(*members: foveate.Reducer, name: str = "llava") -> list[int]:
    """Visual tokens (of 16) that enter each layer."""
    model = build_once(name)
    before = footprint(model)
    with foveate.apply(model, foveate.Chain(*members)) as session:
        model(**families.inputs(name, model))
    assert footprint(model) == before
    counts = session.trace.visual_tokens
    assert torch.equal(counts[0], counts[1])
    assert session.trace.mean_visual_tokens[0] == counts[0].double().mean()
    return counts[0].tolist()


def test_a_fraction_is_of_what_arrives_and_a_count_stays_a_count():
    half = {"keep": 0.5}
    assert entering(foveate.DivPrune(**half), foveate.FastV(**half, layer=2)) == [8, 8, 4, 4, 4, 4]
    assert entering(foveate.DivPrune(keep=8), foveate.FastV(keep=6, layer=2)) == [8, 8, 6, 6, 6, 6]
    assert entering(foveate.DivPrune(keep=4), foveate.FastV(keep=6, layer=2)) == [4] * 6
    assert entering(foveate.VisionZip(keep=8), foveate.VTW(layer=3)) == [8, 8, 8, 0, 0, 0]
    assert entering(foveate.ToMe(keep=12), foveate.DivPrune(**half), foveate.DART(**half, layer=4)) == [6] * 4 + [3] * 2
    assert entering(foveate.PruMerge(**half), foveate.VisPruner(**half), foveate.DivPrune(**half)) == [2] * 6


@torch.no_grad()
def test_the_one_trace_knows_every_stage():
    model = build_once("llava")
    inputs = families.inputs("llava", model)
    with foveate.apply(model, foveate.Chain(foveate.PruMerge(keep=8), foveate.FastV(keep=3, layer=2))) as session:
        model(**inputs)
    trace = session.trace
    assert list(trace.stages) == [-1, 1]
    assert trace.kept(-1).sum(1).tolist() == [8, 8]
    assert trace.kept(1).sum(1).tolist() == [3, 3]
    assert not bool((trace.kept(1) & ~trace.kept(-1)).any())
    assert trace.kv_lengths[0] - trace.kv_lengths[-1] == 5
    assert trace.scores(1) is not None
    assert trace.origins(-1) is not None


@torch.no_grad()
@pytest.mark.parametrize(
    "second", [foveate.FastV(keep=4, layer=2), foveate.PyramidDrop(layers=[2, 4], ratios=[0.5, 0.25])]
)
def test_behind_a_compact_member_it_is_the_second_on_the_shorter_prompt(second: foveate.Reducer):
    model = build_once("llava")
    inputs = families.inputs("llava", model, batch=1)
    first = foveate.DivPrune(keep=8)
    with foveate.apply(model, first) as session:
        model(**inputs)
    visual = families.visual_slots(inputs["input_ids"])
    removed = visual & ~session.trace.kept(-1)
    short, _ = shorter_prompt(decoder_inputs(model, inputs), inputs["attention_mask"], {-1: removed})
    with foveate.apply(model, second, visual=visual[~removed][None]):
        expected = model.generate(**short, max_new_tokens=4, do_sample=False, pad_token_id=0, output_logits=True,
                                  return_dict_in_generate=True, suppress_tokens=[150, 151])  # fmt: skip
    with foveate.apply(model, foveate.Chain(first, second)):
        actual = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0, output_logits=True,
                                return_dict_in_generate=True, suppress_tokens=[150, 151])  # fmt: skip
    assert largest(torch.stack(actual.logits) - torch.stack(expected.logits)) <= 2e-4
    assert torch.equal(actual.sequences[:, -4:], expected.sequences[:, -4:])


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_after_rows_of_different_length_it_is_the_second_on_each_row(name: str):
    """DART undoes a rotation that begins at a row's first token, not at what fills a short row up."""
    model = build_once(name)
    prompt = families.inputs(name, model)
    removed = draw_removed(prompt["input_ids"], {-1: [9, 16]})[-1]

    def kept(prompt: dict[str, torch.Tensor], removed: torch.Tensor) -> torch.Tensor:
        with foveate.apply(model, foveate.Chain(Fixed({-1: removed}), foveate.DART(keep=4, layer=2))) as session:
            model(**prompt)
        return session.trace.kept(1)

    together = kept(prompt, removed)
    for row in range(2):
        there = prompt["attention_mask"][row].bool()
        assert torch.equal(kept(one_row(prompt, row), removed[row, there][None])[0], together[row, there])


class Reads(foveate.Reducer):
    stages = (1,)

    def __init__(self, spec: TapSpec):
        self.taps = {1: spec}


@torch.no_grad()
def test_what_the_second_overwrites_it_overwrites_last():
    """Two that merge at one stage: a token merged twice is the mean of all, one merged once of its own."""
    model = build_once("llava")
    prompt = families.inputs("llava", model, batch=1)
    start = int(families.visual_slots(prompt["input_ids"])[0].int().argmax())
    frames: list[torch.Tensor] = []
    nowhere = torch.zeros_like(prompt["attention_mask"], dtype=torch.bool)

    class Pairs(foveate.Reducer):
        """Each of the given slots becomes the mean of itself and of the one after it, which goes."""

        stages = (1,)

        def __init__(self, *slots: int, apart: int = 1):
            self.slots, self.apart = torch.tensor([slots]) + start, apart

        def decide(self, view: foveate.View) -> foveate.Decision:
            frames.append(view.hidden)
            gone = self.slots + self.apart
            values = (view.hidden[0, self.slots] + view.hidden[0, gone]) / 2
            return foveate.Decision(view.active & ~nowhere.scatter(1, gone, True), self.slots, values)

    seen: list[torch.Tensor] = []
    handle = model.get_decoder().layers[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with foveate.apply(model, foveate.Chain(Pairs(0, 2, 5), Pairs(0, apart=2))) as session:
        model(**prompt)
    handle.remove()
    before = frames[0][0, start:]
    assert session.trace.visual_tokens[0, 2] == 12
    after = seen[0][0, start:]
    torch.testing.assert_close(after[0], (before[0] + before[1] + before[2] + before[3]) / 4)
    torch.testing.assert_close(after[5], (before[5] + before[6]) / 2)
    assert torch.equal(after[7], before[7])
    assert torch.equal(seen[0][0, :start], frames[0][0, :start])


def test_one_tap_serves_two_members():
    """What one of them wants beyond the other is read, too."""
    last, ahead = TapSpec("last"), TapSpec("last", ahead=True)
    for specs in ((last, ahead), (ahead, last), (TapSpec(None, ahead=True), last), (last, TapSpec(None, ahead=True))):
        with foveate.apply(build_once("llava"), foveate.Chain(*map(Reads, specs))) as session:
            assert session.reducer.taps == {1: ahead}


def test_what_cannot_go_together():
    model = build_once("llava")
    with pytest.raises(foveate.OptionError, match="at least one"):
        foveate.Chain()
    for members, culprit in (
        ((foveate.ToMe(8), foveate.PiToMe(8)), "vision tower"),
        ((Reads(TapSpec("last")), Reads(TapSpec("text"))), "decoder layer 1"),
        ((foveate.FoPru(8), foveate.VisionZip(8)), "vision layer -2"),
    ):
        with pytest.raises(foveate.OptionError, match=culprit):
            foveate.apply(model, foveate.Chain(*members))
