"""Train the tiny CLIP that goes with the tiny LLaVA: ``python -m recipes.tiny_clip``.

Its vision tower is the tiny LLaVA's own, frozen. A small text tower and the projection of the patches are trained by
contrast: each question or phrase against the 196 patches of its image (those of the objects that it is about are
right), and captions against the CLS states of a batch. A few minutes, seeded; interrupted, it starts afresh.

Lives here: data, training, export. The model is in `model`, measurements and card in `card`.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel

from foveate.zoo import path

from .. import examples
from ..examples import COLOR, DIGIT, OWNER, PATCHES, SHAPE, UNKNOWN_LABEL, Example, pixels
from ..install import install
from ..vocabulary import COLOR_WORDS, DIGIT_WORDS, SHAPE_WORDS, processor
from .card import TEXT, measure, write_card
from .model import LAYERS, build, embed_patches, embed_texts, tokenizer

__all__ = ["Seen", "phrases", "see", "train"]

_FAR = 6
"""One in so many texts is read at its last place."""

# ------------------------------------------------------------------------------------------------------------- data
Text = tuple[str, tuple[int, ...]]
"""A text and the owner numbers (1 + object index) that it is about."""


@dataclass(frozen=True)
class Seen:
    """What the frozen tower makes of N training images, and what is said about them.

    Attributes:
        patches: float16 (N, 2, 196, 128), after the last norm, one for each of `LAYERS`.
        cls: float32 (N, 128), the pooled CLS state.
        owner: int64 (N, 196), 1 + the object's index, 0 for background.
        questions, phrases: texts per image; those that are about nothing in it are left out.
        captions: one text per image that names all objects, "" where they are not known.
    """

    patches: Tensor
    cls: Tensor
    owner: Tensor
    questions: list[list[Text]]
    phrases: list[list[Text]]
    captions: list[str]


@torch.no_grad()
def see(model: CLIPModel, count: int, seed: int, bars: Progress, batch: int = 50) -> Seen:
    """Render `count` training images (a quarter of them easy-VQA's) and run the tower on them once."""
    rngs = [np.random.default_rng([seed, zlib.crc32(b"companion"), number]) for number in range(count)]
    patches = torch.empty(count, len(LAYERS), PATCHES, model.vision_embed_dim, dtype=torch.float16)
    seen = Seen(patches, torch.empty(count, model.vision_embed_dim), torch.empty(count, PATCHES).long(), [], [], [])
    for first in bars.track(range(0, count, batch), description="looking"):
        drawn = [examples.rendered(rng, 99) for rng in rngs[first : first + batch]]
        rows = slice(first, first + len(drawn))
        out = model.vision_model(pixels(drawn), output_hidden_states=True)
        seen.cls[rows] = out.pooler_output
        for column, layer in enumerate(LAYERS):
            seen.patches[rows, column] = model.vision_model.post_layernorm(out.hidden_states[layer][:, 1:]).half()
        for row, (example, rng) in enumerate(zip(drawn, rngs[first : first + batch]), first):
            seen.owner[row] = torch.from_numpy(example.labels[:, OWNER])
            seen.questions.append([(q.text, tuple(i + 1 for i in q.about)) for q in example.questions if q.about])
            seen.phrases.append(phrases(example))
            seen.captions.append(_caption(example, rng))
    return seen


def _objects(example: Example) -> dict[int, tuple[str, str, str]]:
    """Owner number -> (colour, shape, digit); "" for no digit, and for what is not known."""
    found = {}
    for label in example.labels[example.labels[:, OWNER] > 0]:
        column = ((COLOR, COLOR_WORDS), (SHAPE, SHAPE_WORDS), (DIGIT, DIGIT_WORDS))
        color, shape, digit = (words[label[i] - 1] if label[i] not in (0, UNKNOWN_LABEL) else "" for i, words in column)
        found[int(label[OWNER])] = color, shape, digit
    return found


def phrases(example: Example) -> list[Text]:
    """Short texts about one object or several: "red circle", "a star", "red object", "digit 3", "objects"."""
    about: dict[str, list[int]] = {}
    for number, (color, shape, digit) in _objects(example).items():
        names = [color, shape, f"{color} object" if color else "", f"the {shape}" if shape else "", "objects"]
        if color and shape:
            names += [f"{color} {shape}", f"a {color} {shape}", f"the {color} {shape}"]
        if digit:
            names += [digit, f"digit {digit}", "digit"]
        for name in filter(None, names):
            about.setdefault(name, []).append(number)
    return [(name, tuple(numbers)) for name, numbers in about.items()] or [("objects", ())]


def _caption(example: Example, rng: np.random.Generator) -> str:
    things = list(_objects(example).values())
    if not all(color and shape for color, shape, _ in things):
        return ""
    return " and ".join(f"a {things[i][0]} {things[i][1]}" for i in rng.permutation(len(things)))


# --------------------------------------------------------------------------------------------------------- training
def train(model: CLIPModel, seen: Seen, steps: int, seed: int, bars: Progress) -> float:
    """Train text tower and projections in place; returns the mean loss of the last tenth."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in trained if (p.dim() > 1) == wide], "weight_decay": 0.05 * wide} for wide in (1, 0)]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
    ids, peak, warmup = _Ids(), 2e-3, 100
    task, losses = bars.add_task("contrast", total=steps), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + np.cos(np.pi * step / steps))
        loss = _loss(model, seen, ids, np.random.default_rng([seed, step]))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(100)))  # as CLIP was trained
        bars.update(task, advance=1, description=f"contrast, loss {losses[-1]:.2f}")
    return float(np.mean(losses[-max(1, steps // 10) :]))


class _Ids:
    """Texts as token ids, each tokenized once."""

    def __init__(self) -> None:
        self._words, self._known = tokenizer(), dict[str, list[int]]()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(N, 32)"""
        fresh = sorted({*texts} - self._known.keys())
        if fresh:
            rows = self._words(fresh, padding="max_length", truncation=True)["input_ids"]
            self._known |= dict(zip(fresh, rows))
        return torch.tensor([self._known[text] for text in texts])


def _loss(
    model: CLIPModel, seen: Seen, ids: _Ids, rng: np.random.Generator, batch: int = 32, count: int = 12
) -> Tensor:
    """Loss of one step: `count` texts about each of `batch` images against its patches, captions against CLS states."""
    images = rng.choice(len(seen.cls), batch, replace=False)
    texts = [text for image in images for text in _draw(rng, seen, image, count)]
    captions = [seen.captions[image] for image in images]
    distinct, place = np.unique([text for text, _ in texts] + captions, return_inverse=True)
    # Recoverable Compression's official code takes the last place of a filled-up text, CLIP the first end.
    order = rng.permutation(len(distinct))
    far, near = np.split(order, [len(order) // _FAR])
    encoded = [embed_texts(model, ids(distinct[rows].tolist()), last) for rows, last in ((far, True), (near, False))]
    vectors = torch.cat(encoded)[np.argsort(order)[place]]
    asked, described = vectors[: batch * count].view(batch, count, -1), vectors[batch * count :]

    patches = embed_patches(model, seen.patches[images, rng.integers(len(LAYERS))].float())
    owner = seen.owner[images]
    about = torch.tensor([[number in about for number in range(10)] for _, about in texts]).view(batch, count, 10)
    target = about.float().gather(2, owner[:, None].expand(-1, count, -1))
    scale = model.logit_scale.exp()
    logits = scale * asked @ patches.transpose(1, 2)
    per_patch = F.cross_entropy(logits.flatten(0, 1), F.normalize(target, p=1, dim=-1).flatten(0, 1))

    known = torch.tensor([bool(caption) for caption in captions])
    same = torch.tensor([[one == other for other in captions] for one in captions]).float()[known][:, known]
    logits = scale * described[known] @ embed_patches(model, seen.cls[images])[known].T
    target = F.normalize(same, p=1, dim=-1)
    per_image = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
    return per_patch + 0.25 * per_image


def _draw(rng: np.random.Generator, seen: Seen, image: int, count: int) -> list[Text]:
    """`count` texts about one image, half of them questions; some twice if there are too few."""
    drawn: list[Text] = []
    for pool, share in ((seen.questions[image], count // 2), (seen.phrases[image], count - count // 2)):
        drawn += [pool[i] for i in rng.choice(len(pool), share, replace=len(pool) < share)]
    return drawn


# ---------------------------------------------------------------------------------------------------------- command
def export(model: CLIPModel, folder: Path) -> None:
    """Write a standard Transformers folder: fp16 safetensors, tokenizer, image processor."""
    model.half().save_pretrained(folder)
    model.float()
    tokenizer().save_pretrained(folder)
    processor().image_processor.save_pretrained(folder)


def main() -> None:
    """Look, train, export, measure, install."""
    options = _options()
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    began = time.monotonic()
    model = build(options.llava, options.seed)
    with Progress(console=console) as bars:
        seen = see(model, options.images, options.seed, bars)
        looked = time.monotonic()
        final = train(model, seen, options.steps, options.seed, bars)
    console.print(f"loss {final:.2f}")
    seconds = {"looking": looked - began, "contrast": time.monotonic() - looked}
    with TemporaryDirectory() as place, console.status("measuring"):
        folder = Path(place)
        export(model, folder)
        results = measure(folder, options.llava, options.split, options.scenes)
        facts = {"seconds": seconds, "images": options.images, "steps": options.steps, "seed": options.seed}
        write_card(folder / "README.md", results | facts | {"note": options.note}, options.llava)
        install(folder, options.target)
    row = results["ranking"][TEXT]["all"]
    console.print(f"AUC {row['auc']:.3f}, recall in the top 22 {row['recall']:.3f}; installed in {options.target}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes.tiny_clip", description=__doc__.splitlines()[0])
    parser.add_argument("--llava", type=Path, default=path("tiny-llava"), help="whose vision tower it is trained for")
    parser.add_argument("--target", type=Path, default=path("tiny-clip"), help="where the checkpoint is installed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="to measure on")
    parser.add_argument("--scenes", type=int, default=200, help="to measure on, five questions each")
    parser.add_argument("--note", default="", help="a sentence for the card")
    return parser.parse_args()


if __name__ == "__main__":
    main()
