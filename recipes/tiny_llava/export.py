"""Writing the trained model as a standard Transformers folder (fp16 safetensors, processor, chat template)."""

from __future__ import annotations

from pathlib import Path

from ..vocabulary import BOS, EOS, PAD, processor
from .stages import load_model

__all__ = ["export"]


def export(run: Path, seed: int) -> Path:
    """Write the model of a finished run to ``run/export`` and return that folder."""
    folder = run / "export"
    model = load_model(run, seed).half()
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder
