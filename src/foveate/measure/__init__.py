"""What token reduction saves, on paper and as measured.

* `flops`, `vision_flops`, `geometry`: FLOPs and KV bytes, of the decoder and of a whole prefill, tower included.
* `bench`: methods against the unreduced model, interleaved; `latency` and `memory` are its instruments.
* `random_models`, `prompt`: models of real geometry with random weights, prompts of a wanted length.
"""

from .flops import PAPER_FORMULA, Schedule, exact_flops, kv_bytes, paper_flops, report, schedule
from .geometry import PRESETS, Geometry
from .vision_flops import PrefillFlops, prefill_flops

__all__ = [
    "PAPER_FORMULA",
    "PRESETS",
    "Geometry",
    "PrefillFlops",
    "Schedule",
    "exact_flops",
    "kv_bytes",
    "paper_flops",
    "prefill_flops",
    "report",
    "schedule",
]
