"""Several methods in one model, for instance one before the decoder and one inside it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.select import put_tokens
from ..reduction import Decision, OptionError, Positions, Reducer, TapSpec, UnsupportedError, View, VisionSpec, bind

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["Chain"]


class Chain(Reducer):
    """Methods one after the other: each sees what those before it have left.

    Example:
        foveate.Chain(foveate.VisionZip(keep=192), foveate.VTW(layer=16))

    A member's fraction is a fraction of the tokens that reach it, a member's count stays a count. Members keep their
    own `positions`: one that renumbers does so for what is left at its stage, the others leave the numbers alone.

    Args:
        members: at least one method; at a shared stage they are asked in this order.

    Raises:
        OptionError: no member, or two members read the same layer in different ways.
    """

    def __init__(self, *members: Reducer):
        if not members:
            raise OptionError("Chain needs at least one method")
        self.members = members

    def prepare(self, anatomy: Anatomy) -> None:
        """Bind every member; unite their stages and taps."""
        self.members = tuple(bind(member, anatomy) for member in self.members)
        taps: dict[int, TapSpec] = {}
        vision_taps: dict[int, VisionSpec] = {}
        for i, member in enumerate(self.members):
            for layer, tap in member.taps.items():
                taps[layer] = _united(taps.get(layer), _with_own_state(tap, i), layer)
            for layer, spec in member.vision_taps.items():
                vision_taps[layer] = _both(vision_taps[layer], spec, layer) if layer in vision_taps else spec
        towers = [member.tower for member in self.members if member.tower is not None]
        if len(towers) > 1:
            raise OptionError("two members of the Chain change the vision tower; it can be done once")
        self.tower = towers[0] if towers else None
        self.stages = tuple(sorted({stage for member in self.members for stage in member.stages}))
        self.taps, self.vision_taps = taps, vision_taps

    def decide(self, view: View) -> Decision | None:
        """The members' decisions for this stage, as one."""
        united: Decision | None = None
        before: Decision | None = None
        state = view.state
        for i, member in enumerate(self.members):
            if view.stage not in member.stages:
                continue
            if before is not None:
                view, before = _carried_out(view, before), None
            tap = member.taps.get(view.stage)
            ahead = view.ahead if tap is not None and tap.ahead else None
            own = replace(view, state=state.setdefault(str(i), {}), ahead=ahead)
            decision = member.decide(own)
            if decision is None:
                continue
            before = replace(decision, positions=decision.positions or member.positions)
            united = before if united is None else _join(united, before)
        return united


def _with_own_state(tap: TapSpec, member: int) -> TapSpec:
    queries = tap.queries
    if not callable(queries):
        return tap
    return replace(tap, queries=lambda state: queries(state.setdefault(str(member), {})))


def _united(a: TapSpec | None, b: TapSpec, layer: int) -> TapSpec:
    ahead = b.ahead or (a is not None and a.ahead)
    if a is None or a.queries is None or b.queries is None:
        return replace(b if a is None or a.queries is None else a, ahead=ahead)
    if replace(a, ahead=b.ahead) != b:
        raise OptionError(f"two members of the Chain read decoder layer {layer} in different ways")
    return replace(b, ahead=ahead)


def _both(a: VisionSpec, b: VisionSpec, layer: int) -> VisionSpec:
    if a.attention and b.attention and a.attention != b.attention:
        raise OptionError(f"two members of the Chain read vision layer {layer} in different ways")
    return VisionSpec(a.attention or b.attention, a.key or b.key, a.query or b.query, a.features or b.features)


def _carried_out(view: View, decision: Decision) -> View:
    hidden, active = view.hidden, view.active
    if decision.slots is not None and decision.values is not None:
        if view.streams is not None:
            raise UnsupportedError(
                "this model keeps several hidden states of each token; there, a Chain cannot go on in the same layer "
                "after a member that merges"
            )
        hidden = put_tokens(hidden, decision.slots, decision.values, hidden.shape[1] - 1)
    if decision.keep is not None:
        active = active & decision.keep
    return replace(view, hidden=hidden, active=active)


def _join(first: Decision, second: Decision) -> Decision:
    keep = first.keep if second.keep is None else second.keep if first.keep is None else first.keep & second.keep
    slots, values = first.slots, first.values
    if second.slots is not None and second.values is not None:
        if slots is None or values is None:
            slots, values = second.slots, second.values
        else:
            # What the second method overwrites, it overwrites last.
            again = (slots[:, :, None] == second.slots[:, None]).any(2)
            slots = torch.cat([slots.masked_fill(again, -1), second.slots], 1)
            values = torch.cat([values, second.values.to(values.dtype)], 1)
    renumbered: Positions = "renumber" if "renumber" in (first.positions, second.positions) else "keep"
    scores = first.scores if second.scores is None else second.scores
    return Decision(keep, slots, values, _compose(first, second), scores, renumbered)


def _compose(first: Decision, second: Decision) -> Tensor | None:
    if first.origin is None or second.origin is None:
        return second.origin if first.origin is None else first.origin
    return torch.where(first.origin >= 0, second.origin.gather(1, first.origin.clamp_min(0)), -1)
