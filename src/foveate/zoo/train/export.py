"""Writing the trained model as a standard Transformers folder (fp16 safetensors, processor, chat template)."""

from __future__ import annotations

import shutil
from pathlib import Path

from .stages import load_model
from .vocabulary import BOS, EOS, PAD, processor

__all__ = ["export", "install"]


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


def install(source: Path, target: Path) -> None:
    """Replace the files of `target` one by one; a reader sees the old file or the new one, never half of one."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        fresh = target / f".{file.name}.new"
        shutil.copyfile(file, fresh)
        fresh.replace(target / file.name)
