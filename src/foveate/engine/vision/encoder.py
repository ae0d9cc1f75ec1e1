"""Methods inside vision encoders on their own: ViT, CLIP, SigLIP, without a language model.

The encoder is found, `tower.TowerReduction` shortens it, and what it returns keeps the usual length: each patch carries
the feature of the token it went into. So classifiers, poolers and retrieval heads work unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...reduction import Reducer, UnsupportedError
from ..compat import check_checkpointing
from ..session import Session
from ..trace import TowerCall
from .merging import TowerReduction

__all__ = ["PlainSession", "PlainTrace", "find_encoder"]


def find_encoder(model: Any) -> nn.Module | None:
    """The vision encoder of a model that has no language model to feed; None for everything else.

    A model whose configuration names an image placeholder is a vision-language model, whatever it contains.
    """
    config = getattr(model, "config", None)
    placeholder = any(getattr(config, f"image_token_{kind}", None) is not None for kind in ("id", "index"))
    if config is None or placeholder or hasattr(model, "language_model"):
        return None
    if hasattr(model, "can_generate") and model.can_generate():  # it writes text (BLIP, Kosmos-2)
        return None
    for candidate in (getattr(model, "vision_model", None), getattr(model, "base_model", None)):
        sees = getattr(candidate, "main_input_name", None) == "pixel_values"
        if isinstance(candidate, nn.Module) and sees and not hasattr(candidate, "vision_model"):
            return candidate
    return None


@dataclass
class PlainTrace:
    """Record of the last call of an encoder: I images of T tokens, class token included (first, where there is one).

    Attributes:
        call: images, and per layer the tokens of an image, class token included.
        place: (I, T) long, for every token of the full image the token that it went into.
        class_token: whether the tower has one.
    """

    call: TowerCall
    place: Tensor
    class_token: bool = True

    @property
    def entering(self) -> list[int]:
        """Per layer, tokens of an image that entered it, class token included."""
        return [attending for attending, _ in self.call.tokens]

    @property
    def visual_tokens(self) -> Tensor:
        """LongTensor (I, n_layers): tokens that show the image, merged ones included, that entered each layer."""
        entering = torch.tensor(self.entering, device=self.place.device) - int(self.class_token)
        return entering.expand(self.call.images, -1)

    @property
    def mean_visual_tokens(self) -> Tensor:
        """(I,) mean over the layers of the tokens that entered them."""
        return self.visual_tokens.float().mean(1)

    def kept(self, stage: int | None = None) -> Tensor:
        """(I, T) bool: one patch for each token that leaves the last layer, the first that went into it.

        An encoder has one record, that of its end: `stage` is accepted as for other traces and makes no difference.
        """
        slots = torch.arange(self.place.shape[1], device=self.place.device).expand_as(self.place)
        first = torch.full_like(self.place, self.place.shape[1]).scatter_reduce(1, self.place, slots, "amin")
        kept = first.gather(1, self.place) == slots
        if self.class_token:
            kept[:, 0] = False
        return kept


class PlainSession(Session):
    """One method at work in one vision encoder.

    Attributes:
        trace: a `PlainTrace` of the last call of the calling thread; None before the first.

    Raises:
        UnsupportedError: the method does not work inside a vision encoder, the encoder is built in another way than
            CLIP's, SigLIP's or ViT's, or has a session already.
    """

    def __init__(self, model: nn.Module, encoder: nn.Module, reducer: Reducer):
        spec = getattr(reducer, "tower", None)
        kind = type(reducer).__name__
        if spec is None:
            raise UnsupportedError(
                f"{type(model).__name__} has no language model, so {kind} has nothing to reduce there; inside vision "
                "encoders work ToMe, PiToMe (where='tower') and Downsample"
            )
        super().__init__(encoder)
        self.reducer = reducer
        try:
            self._reduction = TowerReduction(encoder, spec)
            # Hooked before and after the reduction's own.
            self._undo.pre_hook(encoder, self._called)
            self._reduction.install(self._undo)
            self._undo.hook(encoder, self._done, always_call=True)
            self._undo.copied(model, encoder)
        except BaseException:
            self.remove()
            raise

    def _called(self, module: nn.Module, args: tuple) -> None:
        check_checkpointing(module.modules())
        self._reduction.clear()
        self._begin("encoder")

    def _done(self, module: nn.Module, args: tuple, output: Any) -> None:
        reduction = self._reduction
        if not self._closed:
            if output is not None and reduction.maps:
                self._record(PlainTrace(reduction.calls[-1], reduction.maps[-1], reduction.class_token))
            reduction.clear()
            self._end("encoder")
