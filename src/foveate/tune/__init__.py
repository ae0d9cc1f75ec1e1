"""Which method, layer and budget: measured by the divergence from the full model.

* `withdrawal`: VTW's own search for the layer.
* `search`: for every method; with `candidates` (the grid), `reference` (what is measured, and what is shared),
  `estimate` (how sure that is), `cost` and `journal`.
"""

from .candidates import KEEPS, Family, families
from .divergence import next_token_divergence
from .estimate import Bounds, Estimate, binomial_interval, changed_share
from .journal import Journal
from .reference import Outcome, Reference
from .search import SearchResult, Trial, round_sizes, search
from .withdrawal import DEFAULT_ETA, ETA_PRESETS, choose_layer, withdrawal_curve

__all__ = [
    "DEFAULT_ETA",
    "ETA_PRESETS",
    "KEEPS",
    "Bounds",
    "Estimate",
    "Family",
    "Journal",
    "Outcome",
    "Reference",
    "SearchResult",
    "Trial",
    "binomial_interval",
    "changed_share",
    "choose_layer",
    "families",
    "next_token_divergence",
    "round_sizes",
    "search",
    "withdrawal_curve",
]
