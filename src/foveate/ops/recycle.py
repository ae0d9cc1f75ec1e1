"""Where merged tokens go: slots, states and origins of a batch in which some tokens stay and some are merged.

A merged token has no slot of its own: it takes that of a removed one. Both functions answer with

* keep (B, S) bool: visual slots in use from now on,
* slots (B, m) long, -1 for padding, and values (B, m, D): slots that get a new state,
* origin (B, S) long: the slot that carries each visual slot's content from now on, -1 where it is gone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .select import gather_tokens, padded_indices, put

__all__ = ["Merged", "official_order", "slot_order"]


@dataclass(frozen=True)
class Merged:
    """Tokens merged in every row of a batch.

    Attributes:
        slots: (B, P) slots of the members; -1 for padding.
        number: (B, P) number of each member's cluster.
        centres: (B, C) slots of the clusters' centres; -1 for padding.
        states: (B, C, D).
    """

    slots: Tensor
    number: Tensor
    centres: Tensor
    states: Tensor


def _in_use(chosen: Tensor, merged: Merged) -> Tensor:
    return put(chosen, merged.centres, torch.ones_like(merged.centres, dtype=torch.bool))


def slot_order(chosen: Tensor, merged: Merged) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every merged token in the slot of its cluster's centre: image order and positions stay meaningful.

    Args:
        chosen: (B, S) bool, visual tokens that stay as they are.
        merged: the merged ones.
    """
    own = torch.where(chosen, torch.arange(chosen.shape[1], device=chosen.device), -1)
    origin = put(own, merged.slots, merged.centres.gather(1, merged.number))
    return _in_use(chosen, merged), merged.centres, merged.states, origin


def official_order(hidden: Tensor, chosen: Tensor, merged: Merged) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The official sequence: kept tokens in image order, then the merged ones by the score of their centres.

    It is laid into the same slots as `slot_order` uses, in ascending order, so that kept tokens change slots. To be
    used with renumbered positions.

    Args:
        hidden: (B, S, D).
        chosen, merged: as in `slot_order`.
    """
    kept, in_use = chosen.sum(1, keepdim=True), _in_use(chosen, merged)
    most_kept, most = int(kept.max()), int(in_use.sum(1).max())
    slots, stay = padded_indices(in_use, most), padded_indices(chosen, most_kept)
    ranks = torch.arange(most, device=hidden.device)
    states = torch.cat([gather_tokens(hidden, stay), merged.states.to(hidden.dtype)], 1)
    source = torch.where(ranks < kept, ranks, most_kept + ranks - kept).clamp_max(states.shape[1] - 1)

    origin = torch.full_like(chosen, -1, dtype=torch.long)
    origin = put(origin, stay, slots[:, :most_kept])
    carriers = slots.gather(1, (kept + merged.number).clamp_max(most - 1))
    return in_use, slots, gather_tokens(states, source), put(origin, merged.slots, carriers)
