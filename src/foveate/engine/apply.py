"""`apply`: a method goes into a model, and comes out again without a trace."""

from __future__ import annotations

from torch import Tensor, nn

from ..reduction import OptionError, Reducer
from .compat import check_version
from .cross_modal.session import EncoderMethod, EncoderSession
from .decoder.session import DecoderSession
from .session import Session
from .vision.encoder import PlainSession, find_encoder

__all__ = ["apply"]


def apply(model: nn.Module, reducer: Reducer, *, visual: Tensor | None = None) -> Session:
    """Reduce the visual tokens of a model, until the returned session is left or removed.

    Example:
        with foveate.apply(model, foveate.SparseVLM(keep=192)) as session:
            output = model.generate(**inputs)

    Args:
        model: any Hugging Face vision-language model; with `visual`, any Hugging Face decoder; a vision encoder.
        reducer: the method. It is not changed: one object serves any number of models at once.
        visual: the visual slots of the prompt, for a VLM of your own around a text decoder that is fed with
            `inputs_embeds`: (B, S) bool, or long with 0 for text and 1, 2, ... for the images and videos of a row.
            The numbers also tell which frames make one video where a model's inputs do not (InternVL, SmolVLM).

    Returns:
        The session; a context manager. `session.trace` describes the last prefill of the calling thread and answers
        `visual_tokens`, `mean_visual_tokens` and `kept(stage)` for every kind of model: a decoder after a vision
        tower, an encoder in which image and text meet (PuMer), or a vision encoder on its own (ToMe, PiToMe and
        Downsample in ViT, CLIP, SigLIP).

    Raises:
        UnsupportedError: the model has no images to reduce, has a session already, or cannot do what the method asks;
            transformers is older than the versions that Foveate is tested with (a newer one is a warning).
        OptionError: the method asks for a layer that the model does not have.
    """
    check_version()
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper: what it calls is the model
    if isinstance(reducer, EncoderMethod):
        if visual is not None:
            raise OptionError("visual= is for decoders; this method works inside encoders")
        return EncoderSession(model, reducer)
    encoder = None if visual is not None else find_encoder(model)
    if encoder is not None:
        return PlainSession(model, encoder, reducer)
    return DecoderSession(model, reducer, visual=visual)
