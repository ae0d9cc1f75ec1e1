"""What token reduction saves: FLOPs and KV bytes on paper (`flops`, `geometry`)."""

from .flops import PAPER_FORMULA, Schedule, exact_flops, kv_bytes, paper_flops, report, schedule
from .geometry import PRESETS, Geometry

__all__ = [
    "PAPER_FORMULA",
    "PRESETS",
    "Geometry",
    "Schedule",
    "exact_flops",
    "kv_bytes",
    "paper_flops",
    "report",
    "schedule",
]
