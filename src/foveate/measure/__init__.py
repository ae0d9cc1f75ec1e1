"""What token reduction saves, on paper and as measured.

* `flops`, `vision_flops`, `geometry`: FLOPs and KV bytes, of the decoder and of a whole prefill, tower included;
  `schedule`: the tokens that a method leaves in each layer.
* `bench`: methods against the unreduced model, interleaved; `latency` and `memory` are its instruments.
* `launches`: kernels launched and waits of the host, of a run and of a method's choice.
* `random_models`, `prompt`: models of real geometry with random weights, prompts of a wanted length.
"""

from .flops import PAPER_FORMULA, exact_flops, kv_bytes, paper_macs, report
from .geometry import PRESETS, Geometry
from .schedule import Schedule, schedule
from .vision_flops import PrefillFlops, prefill_flops

__all__ = [
    "PAPER_FORMULA",
    "PRESETS",
    "Geometry",
    "PrefillFlops",
    "Schedule",
    "exact_flops",
    "kv_bytes",
    "paper_macs",
    "prefill_flops",
    "report",
    "schedule",
]
