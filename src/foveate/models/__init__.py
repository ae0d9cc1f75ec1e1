"""Models that transformers does not have: METER, for PuMer."""

from .meter import (
    MeterForImageAndTextRetrieval,
    MeterForImagesAndTextClassification,
    MeterForQuestionAnswering,
    MeterForVisualEntailment,
    MeterModel,
    MeterPreTrainedModel,
)
from .meter_config import MeterConfig

__all__ = [
    "MeterConfig",
    "MeterForImageAndTextRetrieval",
    "MeterForImagesAndTextClassification",
    "MeterForQuestionAnswering",
    "MeterForVisualEntailment",
    "MeterModel",
    "MeterPreTrainedModel",
]
