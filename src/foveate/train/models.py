"""Which model learns which task: classes, heads, processors, label numbers."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..evaluate.answer import ModelError, _locate, loading, quiet
from .vocabulary import Vocabulary, is_generic

__all__ = ["ENCODERS", "Student", "check_task", "family_of", "known_labels", "load_encoder"]

ENCODERS = ("vilt", "meter", "bridgetower")
"""Model types whose image and text meet in encoder layers; all others are taken for decoders."""

_CLASSES = {
    ("vilt", "vqa"): "ViltForQuestionAnswering",
    ("vilt", "ve"): "ViltForQuestionAnswering",  # the head of SNLI-VE has the same layers
    ("vilt", "nlvr2"): "ViltForImagesAndTextClassification",
    ("vilt", "retrieval"): "ViltForImageAndTextRetrieval",
    ("meter", "vqa"): "MeterForQuestionAnswering",
    ("meter", "ve"): "MeterForVisualEntailment",
    ("meter", "nlvr2"): "MeterForImagesAndTextClassification",
    ("meter", "retrieval"): "MeterForImageAndTextRetrieval",
    ("bridgetower", "retrieval"): "BridgeTowerForImageAndTextRetrieval",
}
_HEADLESS = ("Model", "ForMaskedLM", "ForPreTraining")
"""A checkpoint of these gets a fresh head; one with the head of another task is refused."""
HEADS = ("classifier", "rank_output", "itm_score")
"""Names of the modules that a task brings along."""


@dataclass
class Student:
    """A model with what feeds it.

    Attributes:
        name: as the user gave it.
        family: its model type.
        processor: None where image processor and tokenizer lie side by side without one.
        fresh: weights that were not in the checkpoint.
        words: most text tokens.
    """

    name: str
    family: str
    model: Any
    image_processor: Any
    tokenizer: Any
    processor: Any = None
    fresh: list[str] = field(default_factory=list)
    words: int = 512

    def save(self, folder: Path) -> None:
        """Model and processor, ready for `from_pretrained`."""
        self.model.save_pretrained(folder)
        for part in (self.processor,) if self.processor is not None else (self.image_processor, self.tokenizer):
            part.save_pretrained(folder)


def _config_of(name: str) -> tuple[str, dict[str, Any]]:
    """Where a model lies, and its raw configuration. Raises `ModelError`."""
    from transformers import PreTrainedConfig

    source = _locate(name)
    with quiet(), loading(name):
        return source, PreTrainedConfig.get_config_dict(source)[0]


def family_of(name: str) -> str:
    """Model type, e.g. "vilt". Raises `ModelError`."""
    return str(_config_of(name)[1].get("model_type"))


def known_labels(name: str, task: str) -> Vocabulary | None:
    """The labels that a model has learnt, None if it has none for this task."""
    raw = _config_of(name)[1]
    trained = (raw.get("architectures") or [None])[0] == _CLASSES.get((str(raw.get("model_type")), task))
    if not trained or not raw.get("id2label"):
        return None
    labels = {str(label): int(number) for number, label in raw["id2label"].items()}
    return None if is_generic(labels) else Vocabulary(labels)


def load_encoder(name: str, task: str, vocabulary: Vocabulary | None, seed: int = 0) -> Student:
    """A ViLT, METER or BridgeTower for a task, in float32, with its processor.

    Args:
        vocabulary: labels; None where the task has none (retrieval) or the configuration's number is right.
        seed: of a fresh head.

    Raises:
        ModelError: not to be loaded, no class for the task, or the head of another task.
    """
    source, raw = _config_of(name)
    family = str(raw.get("model_type"))
    cls = _class_for(name, family, task, raw)
    with loading(name):
        config = cls.config_class.from_pretrained(source)
    two_images = task == "nlvr2"
    if two_images:
        config.modality_type_vocab_size, config.num_images = 3, 2
    if vocabulary is not None:
        config.label2id = vocabulary.label2id
        config.id2label = {number: label for label, number in vocabulary.label2id.items()}
    torch.manual_seed(seed)
    with quiet(), loading(name):
        model, loaded = cls.from_pretrained(
            source, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
        processor, image_processor, tokenizer = _processors(source)
    mismatched = sorted(key if isinstance(key, str) else key[0] for key in loaded.get("mismatched_keys", ()))
    fresh = sorted({*loaded["missing_keys"], *mismatched})
    if two_images and raw.get("modality_type_vocab_size", 2) < 3:
        _second_image(model, source, cls)
        fresh = [key for key in fresh if "token_type_embeddings" not in key]
    strange = [key for key in fresh if not key.startswith(HEADS)]
    if strange:
        raise ModelError(f"model {name}: its weights do not fit ({strange[0]} is missing or of another size)")
    limit = getattr(getattr(config, "text_config", config), "max_position_embeddings", 512)
    if family != "vilt":
        limit -= 2  # RoBERTa counts positions from 2 on
    return Student(name, family, model, image_processor, tokenizer, processor, fresh, min(limit, 512))


def check_task(name: str, task: str) -> None:
    """Raises `ModelError` for a model that has no head for a task, or that of another one."""
    raw = _config_of(name)[1]
    _class_for(name, str(raw.get("model_type")), task, raw)


def _class_for(name: str, family: str, task: str, raw: Mapping[str, Any]) -> Any:
    wanted = _CLASSES.get((family, task))
    if wanted is None:
        possible = [known for kind, known in _CLASSES if kind == family]
        raise ModelError(f"model {name}: a {family!r} model has no head for task {task}; it has {', '.join(possible)}")
    architecture = (raw.get("architectures") or [wanted])[0]
    if architecture != wanted and not str(architecture).endswith(_HEADLESS):
        raise ModelError(f"model {name}: a {architecture}; task {task} trains a {wanted}")
    if family == "meter":
        from .. import models

        return getattr(models, wanted)
    return getattr(importlib.import_module("transformers"), wanted)


def _processors(source: str) -> tuple[Any, Any, Any]:
    """(processor or None, image processor, tokenizer)."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    try:
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError):
        processor = None
    if hasattr(processor, "image_processor") and hasattr(processor, "tokenizer"):
        return processor, processor.image_processor, processor.tokenizer
    return None, AutoImageProcessor.from_pretrained(source), AutoTokenizer.from_pretrained(source)


def _second_image(model: nn.Module, source: str, cls: Any) -> None:
    """The second image of NLVR2 starts from the embedding of the first, as in the official codes."""
    base = cls.base_model_prefix
    names = importlib.import_module(cls.__module__)
    kind = getattr(names, {"vilt": "ViltModel", "meter": "MeterModel"}[base])
    before = dict(kind.from_pretrained(source, dtype=torch.float32).named_parameters())
    for name, parameter in getattr(model, base).named_parameters():
        if name.endswith("token_type_embeddings.weight") and "text" not in name:
            with torch.no_grad():
                parameter.copy_(torch.cat([before[name], before[name][1:2]]))
