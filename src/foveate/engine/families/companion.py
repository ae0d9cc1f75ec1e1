"""A CLIP or SigLIP model beside a vision-language model: texts and single patches in its common space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from ...reduction import UnsupportedError
from .pixels import normalisation, pictures

__all__ = ["Companion"]


class Companion:
    """Says which direction a text has, and which the patches of a picture.

    Args:
        model: a `CLIPModel`, a `SiglipModel`, or one built alike.
        tokenizer: its own.
        vision: configuration of the other model's tower, whose pixels the companion is shown.
        official: as banjiuyufen/Recoverable-Compression @ d9275944: state of the last place of the padded text, patches
            without the last norm.

    Raises:
        UnsupportedError: the model is built otherwise.
    """

    def __init__(self, model: Any, tokenizer: Any, vision: Any, official: bool = False):
        if not (hasattr(model, "text_model") and hasattr(model, "vision_model")):
            raise UnsupportedError(f"{type(model).__name__}: a CLIPModel or SiglipModel is needed")
        self.model, self.tokenizer, self.official = model, tokenizer, official
        self._vision = vision
        self._pixels, self._own_pixels = normalisation(vision), normalisation(model.config.vision_config)
        self.kind = "clip" if hasattr(model, "visual_projection") else "siglip"
        """SigLIP has no projection of single patches: they are compared as they leave its last norm."""

    def texts(self, texts: list[str]) -> Tensor:
        """Unit vectors of texts: (B, C) float32."""
        longest = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer(
            texts, return_tensors="pt", truncation=True, max_length=longest,
            padding=True if self.kind == "clip" and not self.official else "max_length",
        )  # fmt: skip
        names = ("input_ids", "attention_mask")
        accepted = {name: words[name].to(self.model.device) for name in names if name in words}
        if self.official:
            states = self.model.text_model(input_ids=accepted["input_ids"]).last_hidden_state[:, -1]
            return normalize(self.model.text_projection(states).float(), dim=-1)
        if self.kind == "siglip":  # trained on padded texts without a mask
            accepted.pop("attention_mask", None)
        pooled = self.model.text_model(**accepted).pooler_output
        projection = getattr(self.model, "text_projection", None)
        return normalize((pooled if projection is None else projection(pooled)).float(), dim=-1)

    def patches(self, arguments: Mapping[str, Any], rows: Tensor) -> Tensor | None:
        """Unit vectors of the patches of what another model was given: (pictures, n, C) float32.

        Args:
            arguments: of its call.
            rows: (blocks,) row of the batch of each tile or whole image.

        Returns:
            None if its pixels are laid out in a way that is not known.
        """
        given = pictures(arguments, rows, self._vision)
        if not given:
            return None
        tower = self.model.vision_model
        fitted = torch.cat([self._fit(picture.float()[None]) for picture in given]).to(self.model.device)
        states = tower(pixel_values=fitted.to(next(tower.parameters()).dtype)).last_hidden_state
        if self.kind == "clip":  # CLIP's last hidden state is not normalised yet, SigLIP's is
            states = states[:, 1:] if self.official else tower.post_layernorm(states[:, 1:])
            states = self.model.visual_projection(states)
        return normalize(states.float(), dim=-1)

    def _fit(self, picture: Tensor) -> Tensor:
        """A picture (1, 3, H, W) at the companion's own size and normalisation."""
        size = self.model.config.vision_config.image_size
        if self._pixels != self._own_pixels:
            scales = picture.new_tensor([self._pixels, self._own_pixels])[..., None, None]
            (mean, deviation), (to_mean, to_deviation) = scales
            picture = (picture * deviation + mean - to_mean) / to_deviation
        if tuple(picture.shape[-2:]) != (size, size):
            picture = interpolate(picture, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
        return picture
