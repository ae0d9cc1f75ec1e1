"""Methods inside vision encoders on their own: ViT, CLIP, SigLIP, with no language model behind them.

The encoder is found, `tower.TowerReduction` shortens it, and what it returns keeps the usual length: each patch carries
the feature of the token it went into. So classifiers, poolers and retrieval heads work unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...reduction import Reducer, UnsupportedError
from ..trace import TowerCall
from .merging import TowerReduction

__all__ = ["PlainSession", "PlainTrace", "find_encoder"]

_MARK = "_foveate_session"


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
    """Record of the last call of an encoder.

    Attributes:
        call: images, and per layer the tokens of an image, class token included.
        place: (I, T) long, for every token of the full image (class token first) the token that it went into.
    """

    call: TowerCall
    place: Tensor

    @property
    def entering(self) -> list[int]:
        """Per layer, tokens of an image that entered it, class token included."""
        return [attending for attending, _ in self.call.tokens]


class PlainSession:
    """One method at work in one vision encoder. Made by `apply`; a context manager; not thread-safe.

    Attributes:
        trace: of the last call; None before the first.

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
        if _MARK in encoder.__dict__:
            raise UnsupportedError("a session is applied to this model already; remove it first")
        self.encoder, self.reducer = encoder, reducer
        self.trace: PlainTrace | None = None
        self._reduction = TowerReduction(encoder, spec)
        # Hooked before the reduction's own: it forgets an earlier call; `_done`, hooked after them, takes its record.
        self._handles = [encoder.register_forward_pre_hook(lambda *_: self._reduction.clear())]
        try:
            self._reduction.install()
        except BaseException:
            self.remove()
            raise
        self._handles.append(encoder.register_forward_hook(self._done))
        encoder.__dict__[_MARK] = self

    def __enter__(self) -> PlainSession:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Give the model back as it was. Calling it again does nothing."""
        while self._handles:
            self._handles.pop().remove()
        self._reduction.remove()
        if self.encoder.__dict__.get(_MARK) is self:
            del self.encoder.__dict__[_MARK]

    def _done(self, module: nn.Module, args: tuple, output: Any) -> None:
        reduction = self._reduction
        self.trace = PlainTrace(reduction.calls[-1], reduction.maps[-1])
