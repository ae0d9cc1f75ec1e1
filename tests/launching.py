"""Kernels and waits of every method's choice, counted on a pretended device at 576 visual tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

import foveate
from foveate.measure.launches import Launches, launches_of_choosing
from foveate.reduction import Reducer
from tests import devices

__all__ = ["METHODS", "on_pretended_device"]

IMAGE, KEEP = 900, 192

METHODS: dict[str, Callable[..., Reducer]] = {
    "averagepool": lambda keep=KEEP: foveate.AveragePool(keep),
    "cdpruner": lambda keep=KEEP: foveate.CDPruner(keep),
    "chain": lambda keep=KEEP: foveate.Chain(foveate.DivPrune(keep), foveate.FastV(keep // 2)),
    "dart": lambda keep=KEEP: foveate.DART(keep),
    "divprune": lambda keep=KEEP: foveate.DivPrune(keep),
    "downsample": lambda keep=KEEP: foveate.Downsample(keep),
    "fastv": lambda keep=KEEP: foveate.FastV(keep),
    "fopru": lambda keep=KEEP: foveate.FoPru(keep),
    "fopru, row": lambda keep=KEEP: foveate.FoPru(keep, strategy="row"),
    "pitome": lambda keep=KEEP: foveate.PiToMe(keep, where="output"),
    "prumerge": lambda keep=KEEP: foveate.PruMerge(keep),
    "prumerge, no budget": lambda keep=KEEP: foveate.PruMerge(),
    "prumerge+": lambda keep=KEEP: foveate.PruMergePlus(keep),
    "pyramiddrop": lambda keep=KEEP: foveate.PyramidDrop(keep),
    "random": lambda keep=KEEP: foveate.Random(keep),
    "recoverable": lambda keep=KEEP: foveate.Recoverable(keep),
    "sparsevlm": lambda keep=KEEP: foveate.SparseVLM(keep),
    "sparsevlm, 1.0": lambda keep=KEEP: foveate.SparseVLM(keep, variant="1.0"),
    "sparsevlm, 2.0": lambda keep=KEEP: foveate.SparseVLM(keep, variant="2.0"),
    "tome": lambda keep=KEEP: foveate.ToMe(keep, where="output"),
    "visionzip": lambda keep=KEEP: foveate.VisionZip(keep),
    "vispruner": lambda keep=KEEP: foveate.VisPruner(keep),
    "vtw": lambda keep=KEEP: foveate.VTW(keep=keep),
}


@functools.cache
def _model(side: int) -> Any:
    """A LLaVA of side x side visual tokens, all of it on the pretended device."""
    torch.manual_seed(0)
    narrow = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    text = hf.LlamaConfig(**narrow, num_hidden_layers=8, vocab_size=1000, max_position_embeddings=4096)
    tower = hf.CLIPVisionConfig(**narrow, num_hidden_layers=2, image_size=14 * side, patch_size=14)
    config = hf.LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=IMAGE, image_seq_length=side * side
    )
    return devices.shard(hf.LlavaForConditionalGeneration(config).eval(), 99)


def _prompt(rows: int, side: int) -> dict[str, Tensor]:
    """Words, an image, words; every further row has fewer words, and padding before them."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, IMAGE, (rows, 64), generator=generator)
    ids = torch.cat([words[:, :20], torch.full((rows, side * side), IMAGE), words[:, 20:]], 1)
    mask = torch.arange(ids.shape[1]) >= 3 * torch.arange(rows)[:, None]
    pixels = torch.randn(rows, 3, 14 * side, 14 * side, generator=generator)
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "pixel_values": pixels}


def on_pretended_device(method: Reducer, rows: int = 1, side: int = 24) -> Launches:
    """What a method adds to a prefill of so many rows, each with one image of side x side patches."""
    with devices.Devices(), torch.no_grad():
        model, prompt = _model(side), {n: devices.Tagged(v, "meta:0") for n, v in _prompt(rows, side).items()}
        return launches_of_choosing(
            model, method, lambda: model(**prompt, use_cache=True, logits_to_keep=1), device="meta"
        )
