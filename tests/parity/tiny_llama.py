"""The tiny Llama of the end-to-end golden files."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

_WEIGHTS, _CONFIG = "e2e_weights_fp16.safetensors", "e2e_config.json"


def load(folder: Path) -> LlamaForCausalLM:
    """The model in float32 (SDPA, eval mode) whose files are in `folder`, or else in `../sparsevlm`."""

    def find(name: str) -> Path:
        return next(p for p in (folder / name, folder.parent / "sparsevlm" / name) if p.exists())

    return _load(find(_CONFIG), find(_WEIGHTS))


@functools.lru_cache(maxsize=2)
def _load(config_file: Path, weights_file: Path) -> LlamaForCausalLM:
    options = json.loads(config_file.read_text())["config"]
    theta = options.pop("rope_theta")
    config = LlamaConfig(**options, rope_parameters={"rope_type": "default", "rope_theta": theta})
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    weights = {name: tensor.float() for name, tensor in load_file(weights_file).items()}
    model.load_state_dict(weights)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.float().eval().to(torch.float32)
