"""What the tiny CLIP's scores are worth: how they rank patches, what the tiny LLaVA still answers; and its card."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from foveate.zoo.scenes import KINDS, Sample, scenes

from ..tiny_llava.evaluate import Bench, margin
from ..tiny_llava.evaluate_all import DRAWS, REMOVED, TEST_SEED, VALIDATION_SEED
from .model import LAYERS, embed_patches, embed_texts

__all__ = ["CLS", "TEXT", "GuidedBench", "measure", "ranking", "scores", "write_card"]

CARD = Path(__file__).with_name("card.md")
TEXT, TEXT_FEATURE = "question, last layer", "question, feature layer"
CLS = "CLS attention, last layer"
CHOICES = ("random", CLS, TEXT_FEATURE, TEXT, "asked objects")
BUDGETS = (64, 32, 22, 8)


@torch.no_grad()
def scores(folder: Path, samples: list[Sample], layer: int = -1) -> Tensor:
    """Cosine of every patch to its question, (N, 196).

    Args:
        folder: the tiny CLIP.
        samples: those of one image must share the `image` object to be encoded once.
        layer: the tower's hidden state that is normed and projected, one of `LAYERS`.
    """
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, prepare = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    images = {id(sample.image): sample.image for sample in samples}
    rows = {key: row for row, key in enumerate(images)}
    shown, patches = list(images.values()), []
    for first in range(0, len(shown), 32):
        pixels = prepare(shown[first : first + 32], return_tensors="pt")["pixel_values"]
        states = model.vision_model(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]
        patches.append(embed_patches(model, model.vision_model.post_layernorm(states)))
    ids = tokenizer([sample.question for sample in samples], padding=True, truncation=True, return_tensors="pt")
    asked = embed_texts(model, ids["input_ids"])
    image = torch.tensor([rows[id(sample.image)] for sample in samples])
    return (torch.cat(patches)[image] @ asked[..., None])[..., 0]


class GuidedBench(Bench):
    """A `Bench` that can also keep the patches nearest to the question, by the last or the feature layer's states."""

    def __init__(self, llava: Path, clip: Path, samples: list[Sample]) -> None:
        super().__init__(llava, samples)
        self.guided = {name: scores(clip, samples, layer) for name, layer in zip((TEXT_FEATURE, TEXT), LAYERS)}

    def _scores(self, choice: str, seed: int) -> Tensor | None:
        return self.guided[choice] if choice in self.guided else super()._scores(choice, seed)


def ranking(rated: Tensor, asked: Tensor, keep: int = REMOVED) -> dict[str, Any]:
    """How well scores (N, 196) find the asked-about patches (N, 196), means over questions that are about some.

    "auc": probability that an asked patch has a higher score than another one of its image; "recall": share of the
    asked patches among the `keep` best, of as many as fit there; "n": questions.
    """
    asked = asked.bool()
    some = asked.any(1) & ~asked.all(1)
    rated, asked = rated[some].double(), asked[some]
    ranks = rated.argsort(1).argsort(1).double() + 1
    count = asked.sum(1).double()
    above = (ranks * asked).sum(1) - count * (count + 1) / 2
    auc = above / (count * (asked.shape[1] - count))
    found = asked.gather(1, rated.topk(keep, 1).indices).sum(1)
    recall = found / count.clamp(max=keep)
    return {"auc": auc.mean().item(), "recall": recall.mean().item(), "n": len(rated)}


def measure(clip: Path, llava: Path, split: str, count: int) -> dict[str, Any]:
    """All that the card says, on `count` scenes of the test or the validation split, five questions each."""
    bench = GuidedBench(llava, clip, scenes(count, TEST_SEED if split == "test" else VALIDATION_SEED, split=split))
    found: dict[str, dict[str, Any]] = {}
    for choice in CHOICES[:-1]:
        rated = bench._scores(choice, 0)
        assert rated is not None
        found[choice] = {"all": ranking(rated, bench.asked)}
        for kind in KINDS:
            rows = torch.from_numpy(bench.kinds == kind)
            found[choice][kind] = ranking(rated[rows], bench.asked[rows])
    right = {
        choice: {
            keep: np.mean([bench.pruned(choice, keep, seed=s) for s in range(DRAWS if choice == "random" else 1)], 0)
            for keep in BUDGETS
        }
        for choice in CHOICES
    }
    pairs = ((TEXT, CLS), (TEXT, "random"), (CLS, "random"), ("asked objects", TEXT))
    margins = {
        f"{better} over {worse}": margin(right[better][REMOVED], right[worse][REMOVED], bench.image.numpy())
        for better, worse in pairs
    }
    return {
        "split": split,
        "scenes": count,
        "questions": len(bench.samples),
        "full": float(bench.full().mean()),
        "ranking": found,
        "accuracy": {choice: {keep: float(hit.mean()) for keep, hit in row.items()} for choice, row in right.items()},
        "margins": margins,
        "kinds": {
            choice: {kind: float(row[REMOVED][bench.kinds == kind].mean()) for kind in KINDS}
            for choice, row in right.items()
        },
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
    }


# ------------------------------------------------------------------------------------------------------------- card
def write_card(target: Path, results: Mapping[str, Any], llava: Path) -> None:
    """Fill the card's text with `measure`'s results and the facts of the run."""
    found, seconds = results["ranking"], results["seconds"]
    kinds = ["all", *KINDS]
    fields = {
        **{name: str(results[name]) for name in ("images", "steps", "seed", "split", "scenes", "questions", "machine")},
        "note": results["note"],
        "full": f"{results['full']:.3f}",
        "looking": f"{seconds['looking']:.0f}",
        "contrast": f"{seconds['contrast']:.0f}",
        "tower": sha256((llava / "model.safetensors").read_bytes()).hexdigest()[:12],
        "ranking": _table(
            ["scores", "AUC", "recall in the top 22", "n"],
            ([name, *_both(row["all"]), row["all"]["n"]] for name, row in found.items()),
        ),
        "by_kind": _table(
            ["kind", "n", *(f"{what}, {name}" for name in (TEXT, CLS) for what in ("AUC", "recall"))],
            ([kind, found[TEXT][kind]["n"], *_both(found[TEXT][kind]), *_both(found[CLS][kind])] for kind in kinds),
        ),
        "accuracy": _table(
            ["tokens kept", *map(str, BUDGETS)],
            ([name, *(f"{hit:.3f}" for hit in row.values())] for name, row in results["accuracy"].items()),
        ),
        "kinds": _table(
            ["22 tokens kept", *KINDS],
            ([name, *(f"{hit:.2f}" for hit in row.values())] for name, row in results["kinds"].items()),
        ),
        "margins": _table(
            ["22 tokens kept", "margin"],
            ([name, f"{mean:+.3f} ± {error:.3f}"] for name, (mean, error) in results["margins"].items()),
        ),
    }
    target.write_text(Template(CARD.read_text(encoding="utf-8")).substitute(fields), encoding="utf-8")


def _both(row: Mapping[str, float]) -> list[str]:
    return [f"{row['auc']:.3f}", f"{row['recall']:.3f}"]


def _table(head: list[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
