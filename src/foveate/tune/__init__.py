"""Which layer and which budget: measured by the divergence from the full model."""

from .divergence import next_token_divergence
from .withdrawal import DEFAULT_ETA, ETA_PRESETS, choose_layer, withdrawal_curve

__all__ = ["DEFAULT_ETA", "ETA_PRESETS", "choose_layer", "next_token_divergence", "withdrawal_curve"]
