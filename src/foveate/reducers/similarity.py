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

from ..reduction import OptionError, Patches, UnsupportedError, View
from ._images import by_block

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["CompanionSimilarity", "Question", "Scorer", "choose_scorer", "llm_similarity", "questions"]

Scorer = Callable[[View], Tensor]
Question = str | Sequence[str] | Callable[[View], Sequence[str]]

_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_OWN_PIXELS = {"clip": _CLIP, "siglip": _HALF}
"""Mean and deviation with which a companion's pixels are normalised."""
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
        pair = self.companion if isinstance(self.companion, tuple) else self._load(anatomy.model.device)
        self._model, self._words = pair
        if not (hasattr(self._model, "text_model") and hasattr(self._model, "vision_model")):
            raise OptionError(f"{self.kind}={type(self._model).__name__}: a CLIPModel or SiglipModel is needed")
        self._vision, self._pixels = anatomy.vision_config, anatomy.pixel_normalisation

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
        text = self._encode(questions(view, self.question, self.tokenizer, self.official), self._model.device)
        patches = next(iter(view.vision.values()), None) or by_block(view)
        seen = self._patches(self._pictures(view.info, patches).to(text.device)).to(view.active.device)
        text = text.to(view.active.device)
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

    def _encode(self, texts: list[str], device: torch.device) -> Tensor:
        longest = self._model.config.text_config.max_position_embeddings
        words = self._words(
            texts, return_tensors="pt", truncation=True, max_length=longest,
            padding="max_length" if self.official or self.kind == "siglip" else True,
        )  # fmt: skip
        accepted = {name: words[name].to(device) for name in ("input_ids", "attention_mask") if name in words}
        if self.official:
            states = self._model.text_model(input_ids=accepted["input_ids"]).last_hidden_state[:, -1]
            return normalize(self._model.text_projection(states).float(), dim=-1)
        if self.kind == "siglip":  # trained on padded texts without a mask
            accepted.pop("attention_mask", None)
        pooled = self._model.text_model(**accepted).pooler_output
        projection = getattr(self._model, "text_projection", None)
        return normalize((pooled if projection is None else projection(pooled)).float(), dim=-1)

    def _patches(self, pictures: Tensor) -> Tensor:
        """Unit vectors of the patches of pictures that are as the companion wants them: (I, n, C)."""
        tower = self._model.vision_model
        # CLIP's last hidden state is not normalised yet, SigLIP's is.
        states = tower(pixel_values=pictures.to(next(tower.parameters()).dtype)).last_hidden_state
        if self.kind == "clip":
            states = states[:, 1:] if self.official else tower.post_layernorm(states[:, 1:])
            states = self._model.visual_projection(states)
        return normalize(states.float(), dim=-1)

    def _pictures(self, info: dict[str, Any], patches: Patches) -> Tensor:
        """What the companion sees of every block, (blocks, 3, H, W), resized and normalised for it."""
        pixels = info.get("pixel_values")
        if pixels is None:
            raise UnsupportedError("a companion must see the image: give pixel_values, not image features")
        blocks = len(patches.rows)
        if isinstance(pixels, Tensor) and info.get("image_grid_thw") is not None:
            pictures = unfold_stream(pixels, info["image_grid_thw"], self._vision)
        elif isinstance(pixels, Tensor) and pixels.dim() in (4, 5):
            pictures = list(pixels if pixels.dim() == 4 else _without_padding(pixels, patches))
        else:
            pictures = []
        if not pictures or blocks % len(pictures):
            shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            raise UnsupportedError(
                f"pixels of shape {shape} cannot be shown to a companion as {blocks} pictures; "
                "use similarity='llm' or a function of the view"
            )
        size = self._model.config.vision_config.image_size
        return torch.cat([self._fit(picture.float()[None], size) for picture in pictures])

    def _fit(self, picture: Tensor, size: int) -> Tensor:
        theirs, ours = self._pixels, _OWN_PIXELS[self.kind]
        if theirs != ours:
            (mean, deviation), (to_mean, to_deviation) = picture.new_tensor([theirs, ours])[..., None, None]
            picture = (picture * deviation + mean - to_mean) / to_deviation
        if tuple(picture.shape[-2:]) != (size, size):
            picture = interpolate(picture, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
        return picture


def _without_padding(pixels: Tensor, patches: Patches) -> Tensor:
    """Pixels (images, tiles, 3, H, W) -> (blocks, 3, H, W), without the empty tiles that fill up a batch."""
    rows = patches.rows.bincount(minlength=len(pixels)).tolist()
    if len(rows) == len(pixels) and max(rows) <= pixels.shape[1]:  # one image in each row
        return torch.cat([tiles[:count] for tiles, count in zip(pixels, rows)])
    flat = pixels.flatten(0, 1)
    return flat if len(flat) == len(patches.rows) else flat[flat.flatten(1).any(1)]


def unfold_stream(pixels: Tensor, grids: Tensor, vision: Any) -> list[Tensor]:
    """Pictures (3, H, W), one for each time step, of a stream of patches as Qwen-VL and GLM-4V are fed with.

    Args:
        pixels: (patches, 3 * time * p * p), groups of merge x merge neighbours following each other.
        grids: (images, 3), time steps, height and width in patches.
        vision: configuration of the tower.
    """
    merge, p, time = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
    pictures: list[Tensor] = []
    for (steps, h, w), part in zip(grids.tolist(), pixels.split(grids.prod(1).tolist())):
        part = part.view(steps, h // merge, w // merge, merge, merge, 3, time, p, p)[:, :, :, :, :, :, 0]
        pictures += part.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(steps, 3, h * p, w * p)
    return pictures


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
