"""What PuMer saves in training: bytes that autograd keeps for the backward pass, at the paper's presets.

ViLT-B/32-shaped and METER-shaped models with random weights at 384 pixels (288 for METER on NLVR2), in training mode,
with texts of 40 tokens. Every tensor saved by autograd is seen through `torch.autograd.graph.saved_tensors_hooks` and
counted once per storage; parameters and inputs do not count. "eager" is transformers' own attention, which keeps its
maps; "SDPA" is the same full model with the attention that runs under PuMer, the stricter comparison.

    python benchmarks/pumer_training.py --json benchmarks/results/pumer_training.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, ViltConfig, ViltForImagesAndTextClassification, ViltForQuestionAnswering

import foveate
from foveate.models import MeterConfig, MeterForImagesAndTextClassification, MeterForQuestionAnswering

WORDS = 40
MB = 1e6
CASES = (("vilt", "vqav2"), ("vilt", "snli-ve"), ("vilt", "nlvr2"),
         ("meter", "vqav2"), ("meter", "snli-ve"), ("meter", "nlvr2"))  # fmt: skip


class Full(foveate.PuMer):
    """All tokens, through the attention that runs under PuMer."""

    def reduce(self, seen: Any) -> tuple[None, None]:
        return None, None


def case(family: str, task: str, batch: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model in training mode and a batch for it; NLVR2 has two images."""
    torch.manual_seed(0)
    two = task == "nlvr2"
    side = 288 if two and family == "meter" else 384
    kinds = {"modality_type_vocab_size": 3 if two else 2, "num_labels": 2 if two else 3129}
    model: nn.Module
    if family == "vilt":
        config = ViltConfig(num_images=2, max_position_embeddings=WORDS, **kinds)
        model = (ViltForImagesAndTextClassification if two else ViltForQuestionAnswering)(config)
    else:
        vision = CLIPVisionConfig(patch_size=16, image_size=side, num_hidden_layers=11)
        meter = MeterConfig(vision_config=vision, **kinds)
        model = (MeterForImagesAndTextClassification if two else MeterForQuestionAnswering)(meter)
    images = (batch, 2) if two else (batch,)
    inputs = {
        "input_ids": torch.randint(5, 1000, (batch, WORDS)),
        "attention_mask": torch.ones(batch, WORDS).long(),
        "pixel_values": torch.randn(*images, 3, side, side),
    }
    if family == "vilt":
        inputs["pixel_mask"] = torch.ones(*images, side, side).long()
    return model.train(), inputs


@contextmanager
def counting(but: set[int]) -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd saves meanwhile, by address; storages in `but` do not count."""
    seen: dict[int, int] = {}
    alive = []  # an address must not be used again while we count

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in but:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield seen


def saved_bytes(model: nn.Module, inputs: dict[str, Tensor], reducer: foveate.Reducer | None) -> int:
    """Saved for the backward pass of one batch."""
    but = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers(), *inputs.values())}
    with nullcontext() if reducer is None else foveate.apply(model, reducer), counting(but) as seen:
        loss = model(**inputs).logits.float().square().mean()
        total = sum(seen.values())
        del loss
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begun, rows = time.process_time(), []
    print(f"batch {arguments.batch}, MB saved for the backward pass; share = PuMer / full")
    print(f"{'model':6} {'preset':8} {'eager':>8} {'SDPA':>8} {'PuMer':>8} {'/ eager':>8} {'/ SDPA':>8}")
    for family, task in CASES:
        model, inputs = case(family, task, arguments.batch)
        eager = saved_bytes(model, inputs, None)
        sdpa = saved_bytes(model, inputs, Full(task=task))
        ours = saved_bytes(model, inputs, foveate.PuMer(task=task))
        rows.append({
            "model": family, "preset": task, "batch": arguments.batch, "full_eager_mb": eager / MB,
            "full_sdpa_mb": sdpa / MB, "pumer_mb": ours / MB, "share_of_eager": ours / eager,
            "share_of_sdpa": ours / sdpa,
        })  # fmt: skip
        sizes = f"{eager / MB:8.0f} {sdpa / MB:8.0f} {ours / MB:8.0f}"
        del model, inputs  # before the next model is made
        print(f"{family:6} {task:8} {sizes} {ours / eager:8.1%} {ours / sdpa:8.1%}", flush=True)
    print(f"{time.process_time() - begun:.0f} s of CPU time")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
