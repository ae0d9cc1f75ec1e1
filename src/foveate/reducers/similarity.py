"""How well each patch goes with the question: scorers for Recoverable Compression and CDPruner.

A scorer is a function of the view that returns the similarity (B, S) of every slot to the question, higher is better;
only slots of patches are looked at. Those here need nothing (`llm_similarity`) or a companion, a small model that was
trained on pairs of images and texts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from ..reduction import OptionError, UnsupportedError, View
from ._images import by_block

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["CompanionSimilarity", "Question", "Scorer", "choose_scorer", "llm_similarity", "questions"]

Scorer = Callable[[View], Tensor]
Question = str | Sequence[str] | Callable[[View], Sequence[str]]

_TURN_END = re.compile(r"\s*(?:<[^<>\s]+>\s*)*\b(?:ASSISTANT|assistant|model)\s*:?\s*$")


# ------------------------------------------------------------------------------------------------ without companion
def llm_similarity(view: View) -> Tensor:
    """Mean cosine of each slot to the embeddings of the words after the last image: (B, S) float32.

    Where no words follow, all words of the row are meant. Only before layer 0, where `view.hidden` holds embeddings.
    """
    units = normalize(view.hidden.float(), dim=-1)
    question = _asked(view)[:, None].float() @ units
    return (units @ question.transpose(1, 2))[..., 0] / _asked(view).sum(1, keepdim=True).clamp_min(1)


def _asked(view: View) -> Tensor:
    """Words after the last image, or all where none follow: (B, S) bool."""
    words = view.tokens & ~view.visual
    slots = torch.arange(words.shape[1], device=words.device)
    after = words & (slots > (view.visual * slots).amax(1, keepdim=True))
    return torch.where(after.any(1, keepdim=True), after, words)


# ------------------------------------------------------------------------------------------------------ the question
def questions(view: View, question: Question | None, tokenizer: Any, official: bool = False) -> list[str]:
    """The question of each row.

    Args:
        view: its `info["input_ids"]` are decoded where `question` is not given.
        question: one for all rows, one for each, or a function of the view.
        tokenizer: of the language model.
        official: decode all words and take the first line, as banjiuyufen/Recoverable-Compression @ d9275944 does; in
            LLaVA's prompt that is the system prompt.

    Raises:
        OptionError: neither is given, or the number of questions is not that of the rows.
        UnsupportedError: the model was called without `input_ids`.
    """
    rows = view.active.shape[0]
    if question is not None:
        asked = question(view) if callable(question) else question
        found = [asked] * rows if isinstance(asked, str) else list(asked)
        if len(found) != rows:
            raise OptionError(f"question= gives {len(found)} questions for {rows} rows")
        return found
    if tokenizer is None:
        raise OptionError("the question must be known: give tokenizer= (the language model's) or question=")
    ids = view.info.get("input_ids")
    if ids is None:
        raise UnsupportedError("the model was called without input_ids, so the question cannot be read; give question=")
    ids = ids[:, : view.active.shape[1]]
    words = view.tokens & ~view.visual if official else _asked(view)
    texts = [
        tokenizer.decode(row[mask.to(row.device)], skip_special_tokens=True)
        for row, mask in zip(ids, words, strict=True)
    ]
    if official:
        return [text.split("\n")[0] for text in texts]
    return [_TURN_END.sub("", text).strip() for text in texts]


# -------------------------------------------------------------------------------------------------------- companions
@dataclass
class CompanionSimilarity:
    """Cosine of each patch to the question in the space of a CLIP or SigLIP companion.

    The companion sees the same pixels, resized to its own resolution; its patches are projected like its image
    embedding (CLIP: last norm and projection; SigLIP, which has no projection of single patches: last norm), compared
    with the text embedding, and laid onto the grid of the model's tokens.

    Args:
        companion: hub id, local folder, or (model, tokenizer). A name is loaded when the method is applied, once for
            each device; a model that is given is used as it is, on its own device.
        question, tokenizer: see `questions`.
        kind: "clip" or "siglip".
        official: as banjiuyufen/Recoverable-Compression @ d9275944: first line of the prompt, state of the last place
            of the padded text, patches without the last norm, cosine / sqrt(width).

    Raises:
        OptionError: no question can be known; when applied, the companion cannot be loaded or is of another kind.
        UnsupportedError: when used, the images cannot be shown to the companion.
    """

    companion: Any
    question: Question | None = None
    tokenizer: Any = None
    kind: str = "clip"
    official: bool = False
    _loaded: dict[torch.device, tuple[Any, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.question is None and self.tokenizer is None:
            raise OptionError(
                f"{self.kind}= must read the question: give tokenizer= (the language model's) or question="
            )
        pair = isinstance(self.companion, tuple) and len(self.companion) == 2
        if not (pair or isinstance(self.companion, str) or hasattr(self.companion, "__fspath__")):
            raise OptionError(f"{self.kind}= takes a hub id, a folder, or (model, tokenizer)")

    def prepare(self, anatomy: Anatomy) -> None:
        """Load the companion, if it is not yet, beside the model."""
        given = self.companion
        model, words = given if isinstance(given, tuple) else self._load(anatomy.model.device)
        try:
            self._bound = anatomy.companion(model, words, self.official)
        except UnsupportedError as error:
            raise OptionError(f"{self.kind}={error}") from error
        if self._bound.kind != self.kind:
            raise OptionError(f"{self.kind}={type(model).__name__}: give it as {self._bound.kind}=")

    def _load(self, device: torch.device) -> tuple[Any, Any]:
        """Model and tokenizer on a device; copies of this scorer share them."""
        from transformers import AutoModel, AutoTokenizer

        if device in self._loaded:
            return self._loaded[device]
        try:
            model = AutoModel.from_pretrained(self.companion, dtype=torch.float32).to(device).eval()
            return self._loaded.setdefault(device, (model, AutoTokenizer.from_pretrained(self.companion)))
        except Exception as error:  # whatever a damaged file makes of a library
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise OptionError(f"{self.kind}={str(self.companion)!r} cannot be loaded: {first}") from error

    @torch.no_grad()
    def __call__(self, view: View) -> Tensor:
        text = self._bound.texts(questions(view, self.question, self.tokenizer, self.official)).to(view.active.device)
        patches = next(iter(view.vision.values()), None) or by_block(view)
        seen = self._seen(view.info, patches.rows).to(view.active.device)
        copies = len(patches.rows) // len(seen)  # beams repeat a row, but its image was given once
        cosines = (seen.repeat(copies, 1, 1) @ text[patches.rows.clamp_min(0), :, None])[..., 0]
        side = math.isqrt(seen.shape[1])
        laid = text.new_zeros(patches.slots.shape)
        for height, width in set(map(tuple, patches.grid.tolist())):
            mine = (patches.grid == patches.grid.new_tensor([height, width])).all(1)
            square = cosines[mine].view(-1, 1, side, side)
            if (side, side) != (height, width):
                square = interpolate(square, size=(height, width), mode="bilinear", antialias=True)
            laid[mine, : height * width] = square.flatten(1)
        laid = laid / seen.shape[2] ** 0.5 if self.official else laid
        return patches.to_slots(laid, *view.active.shape)

    def _seen(self, info: dict[str, Any], rows: Tensor) -> Tensor:
        """The companion's patches of every picture, (I, n, C)."""
        pixels, blocks = info.get("pixel_values"), len(rows)
        if pixels is None:
            raise UnsupportedError("a companion must see the image: give pixel_values, not image features")
        seen = self._bound.patches(info, rows)
        if seen is None or blocks % len(seen):
            shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            raise UnsupportedError(
                f"pixels of shape {shape} cannot be shown to a companion as {blocks} pictures; "
                "use similarity='llm' or a function of the view"
            )
        return seen


# ----------------------------------------------------------------------------------------------------------- choosing
def choose_scorer(
    similarity: str | Scorer | None,
    clip: Any,
    siglip: Any,
    question: Question | None,
    tokenizer: Any,
    official: bool = False,
) -> Scorer:
    """The scorer that the options of a method name.

    Args:
        similarity: "clip", "siglip", "llm", a function of the view; None: the companion that is given, else "llm".
        clip, siglip: a companion.
        question, tokenizer: see `questions`.
        official: see `CompanionSimilarity`.

    Raises:
        OptionError: the options contradict each other, or something is missing.
    """
    if callable(similarity):
        return similarity
    if clip is not None and siglip is not None:
        raise OptionError("clip= and siglip=: give one companion")
    if similarity is None:
        similarity = "clip" if clip is not None else "siglip" if siglip is not None else "llm"
    if similarity not in ("clip", "siglip", "llm"):
        raise OptionError(f"similarity={similarity!r}: use 'clip', 'siglip', 'llm' or a function of the view")
    if similarity == "llm":
        if clip is not None or siglip is not None:
            raise OptionError("similarity='llm' needs no companion; leave clip= and siglip= out")
        return llm_similarity
    companion = clip if similarity == "clip" else siglip
    if companion is None:
        raise OptionError(
            f"similarity={similarity!r} needs a companion: {similarity}= a hub id, a folder or (model, tokenizer); "
            "or similarity='llm', which needs none"
        )
    return CompanionSimilarity(companion, question, tokenizer, similarity, official)
