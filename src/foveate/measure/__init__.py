"""What token reduction saves: FLOPs and KV bytes on paper (`flops`, `vision_flops`, `geometry`)."""

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
