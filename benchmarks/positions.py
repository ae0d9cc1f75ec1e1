"""What closing up positions costs: the same tokens kept before the language model, at their own positions or new ones.

Trained weights (`zoo:tiny-llava`), held-out scenes; accuracy over all questions and on "where" alone.

    python benchmarks/positions.py --samples 500
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import foveate
from foveate.evaluate.answer import VLM, answer, batches, load
from foveate.evaluate.data import Sample
from foveate.evaluate.data import load as load_data
from foveate.evaluate.score import matches

METHODS = ("divprune", "visionzip", "random")


def with_positions(method: str, keep: float, positions: foveate.reduction.Positions) -> foveate.Reducer:
    """The method, but for how it numbers what is left."""
    cls = type(foveate.build(method, keep=keep))

    class Numbered(cls):  # type: ignore[misc, valid-type]
        def prepare(self, anatomy: Any) -> None:
            super().prepare(anatomy)
            self.positions = positions

    return Numbered(keep=keep)


def right(vlm: VLM, samples: list[Sample], reducer: foveate.Reducer) -> list[tuple[str, bool]]:
    """(kind, right or wrong) of every question."""
    found = []
    for batch in batches(vlm, samples, 50):
        with foveate.apply(vlm.model, reducer):
            texts = answer(vlm, batch.inputs).texts
        found += [(sample.kind, matches(text, sample.answer)) for text, sample in zip(texts, batch.samples)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--keep", type=float, default=0.22)
    options = parser.parse_args()
    torch.set_num_threads(1)
    vlm, samples = load("zoo:tiny-llava"), load_data("scenes", options.samples, 1)
    for method in METHODS:
        for positions in ("keep", "renumber"):
            found = right(vlm, samples, with_positions(method, options.keep, positions))
            where = [hit for kind, hit in found if kind == "where"]
            print(
                f"{method:10s} {positions:8s} accuracy {sum(hit for _, hit in found) / len(found):.3f}  "
                f"where {sum(where) / max(len(where), 1):.3f} (n={len(where)})"
            )


if __name__ == "__main__":
    main()
