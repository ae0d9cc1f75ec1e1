"""A second turn with a new photograph, on the cache that the first turn returned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

import foveate
from foveate.engine.compat import CACHE_NAME, returned_cache
from foveate.reduction import Decision, Reducer, View
from tests.catalogue.count import differ
from tests.processors.build import family, vlm
from tests.processors.media import asked, encoded
from tests.reference.masked import MaskedReference
from tests.reference.short import ShortReference, is_recurrent

_GREEDY = {
    "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0,
    "suppress_tokens": list(range(145, 200)), "return_dict_in_generate": True, "output_logits": True,
}  # fmt: skip


class _EverySecond(Reducer):
    """Removes every second visual token before layer 2, and remembers which: both turns can be told to a reference."""

    stages = (1,)

    def __init__(self) -> None:
        self.removed: list[Tensor] = []

    def decide(self, view: View) -> Decision:
        number = view.visual.cumsum(1)
        gone = view.visual & (number % 2 == 0)
        self.removed.append(gone)
        return Decision(keep=~gone)


def _continued(first: Mapping[str, Tensor], said: Tensor, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `generate` takes of a conversation whose beginning is cached: all of its ids, the new pixels.

    A model that counts positions by grids finds no grid for the cached images, and is given the new ids alone.
    """
    whole = not any("grid" in key for key in new)
    answered = said.shape[1] - first["input_ids"].shape[1]
    turn = dict(new)
    for key, value in new.items():
        if value.shape != new["input_ids"].shape:
            continue
        if key == "attention_mask":
            turn[key] = torch.cat([pad(first[key], (0, answered), value=1), value], 1)
        elif whole:
            beginning = said if key == "input_ids" else pad(first[key], (0, answered))
            turn[key] = torch.cat([beginning, value], 1)
    return turn


@torch.no_grad()
@family(quick="idefics3")
def test_a_new_photograph_in_a_second_turn(name: str):
    model, processor = vlm(name)
    first = encoded(processor, [asked("What is this?", "landscape")])
    new = encoded(processor, [asked("And this one?", "square")])

    def talk() -> tuple[Tensor, Tensor]:
        one = model.generate(**first, **_GREEDY)
        turn = _continued(first, one.sequences, new)
        two = model.generate(**turn, **{CACHE_NAME: returned_cache(one)}, **_GREEDY)
        return torch.stack(one.logits, 1), torch.stack(two.logits, 1)

    plain = talk()
    with foveate.apply(model, _EverySecond()) as session:
        found = talk()
        first_gone, new_gone = session.reducer.removed
    assert min(first_gone.sum(), new_gone.sum()) >= 2
    generated = _GREEDY["max_new_tokens"] - 1  # the last one is not cached yet
    reference = ShortReference if is_recurrent(model) else MaskedReference
    with reference(model, {1: torch.cat([pad(first_gone, (0, generated)), new_gone], 1)}):
        expected = talk()
    for turn, what in enumerate(("first turn", "second turn")):
        differ(what, found[turn], expected[turn])
        assert (expected[turn] - plain[turn]).abs().max() > 1e-4, "the reference shows no effect"
