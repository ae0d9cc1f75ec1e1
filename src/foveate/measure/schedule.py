"""How many visual tokens a method leaves in each decoder layer, without weights: it is run on a small random model.

Lives here: `Schedule`, and the stand-ins that a method is run on. What the tokens cost is said in `flops`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..engine.apply import apply
from ..engine.trace import Trace
from ..reduction import Reducer, UnsupportedError, info
from .geometry import Geometry

__all__ = ["Schedule", "schedule"]

_SYSTEM_TOKENS = 35  # before the image in LLaVA-1.5's prompt
_NO_ATTENTION = "foveate_schedule"
_IMAGE = 7
"""Id of the placeholder; all ids are below 8."""
_WIDTH, _HEADS = 32, 16  # some methods choose among 14 heads or more
_TOWER_LAYERS = 24


class Schedule(NamedTuple):
    """Visual tokens, merged ones included, in each decoder layer.

    Two averages are in use: `mean_entering` is over what each layer computes; `mean_after`, over what is left after
    it, is what SparseVLM's tables call the number of retained tokens.
    """

    entering: Tensor
    """(layers,) long, at the input of each layer."""
    after: Tensor
    """(layers,) long, left after each layer and the decision after it."""

    @property
    def mean_entering(self) -> float:
        """Mean over the layers of the visual tokens entering them."""
        return float(self.entering.double().mean())

    @property
    def mean_after(self) -> float:
        """Mean over the layers of the visual tokens left after them."""
        return float(self.after.double().mean())


# ------------------------------------------------------------------------------------------------------- schedule
def schedule(geometry: Geometry, reducer: Reducer) -> Schedule:
    """How many visual tokens a method leaves in each layer, without weights.

    The method itself is run, on a random model of the geometry's depth and prompt but of width 32 and without attention
    between the tokens of its decoder, so no method needs a second book-keeping. Where the number of tokens depends on
    the image (rank rules, thresholds), it is what noise gives, not what a real picture would.

    Args:
        geometry: depth and prompt, which holds one image. The text is put as in LLaVA-1.5: 35 tokens before the image,
            the rest after it.
        reducer: the method; `prepare` is called on it. One that reads the vision tower or works in it is shown CLIP
            where the visual tokens make a square, else a Qwen2-VL tower, which has no CLS token; 24 layers of either.

    Raises:
        UnsupportedError: the method needs more than such a model or acts on videos.
        ValueError: no visual token, or no text after the image.
    """
    visual, text = geometry.visual_tokens, geometry.text_tokens
    if visual < 1 or text < 1:
        raise ValueError(f"{geometry.name}: a schedule needs visual and text tokens, got {visual} and {text}")
    name = getattr(reducer, "name", "") or type(reducer).__name__
    if reducer.name and "on videos" in info(reducer.name).acts:
        raise UnsupportedError(f"{name} acts on videos, and the prompt of a geometry holds one image")
    before = min(_SYSTEM_TOKENS, text - 1)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        ids = torch.randint(0, _IMAGE, (1, visual + text))
        ids[:, before : before + visual] = _IMAGE
        try:
            trace = _text_only(geometry.layers, ids, reducer)
        except UnsupportedError:  # it needs the images themselves
            try:
                trace = _with_image(geometry.layers, ids, visual, reducer)
            except UnsupportedError as error:
                raise UnsupportedError(f"{name} cannot be followed without a model: {error}") from error
    return Schedule(trace.visual_tokens[0], trace.visual_tokens_after[0])


# ------------------------------------------------------------------------------------------------------ the stand-ins
def _text_only(layers: int, ids: Tensor, reducer: Reducer) -> Trace:
    model = LlamaForCausalLM(LlamaConfig(**_text(layers, ids)))
    return _run(model, {"inputs_embeds": torch.randn(*ids.shape, _WIDTH)}, reducer, visual=ids == _IMAGE)


def _with_image(layers: int, ids: Tensor, visual: int, reducer: Reducer) -> Trace:
    model, inputs = _vision_language_model(layers, ids, visual)
    return _run(model, inputs, reducer)


def _run(model: Any, inputs: dict[str, Tensor], reducer: Reducer, **given: Any) -> Trace:
    model.get_decoder().config._attn_implementation = _NO_ATTENTION
    with apply(model.eval(), reducer, **given) as session:
        model(**inputs, logits_to_keep=1)
    assert session.trace is not None  # there are visual tokens
    return session.trace


def _text(layers: int, ids: Tensor) -> dict[str, Any]:
    if _NO_ATTENTION not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(_NO_ATTENTION, _own_value)
    return {
        "hidden_size": _WIDTH, "intermediate_size": _WIDTH, "num_hidden_layers": layers, "vocab_size": _IMAGE + 1,
        "num_attention_heads": _HEADS, "num_key_value_heads": _HEADS, "max_position_embeddings": ids.shape[1],
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip


def _vision_language_model(layers: int, ids: Tensor, visual: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model whose tower makes `visual` tokens of one image of as many patches, and its inputs."""
    text, side = _text(layers, ids), math.isqrt(visual)
    if side**2 == visual:
        tower = CLIPVisionConfig(
            hidden_size=_WIDTH, intermediate_size=_WIDTH, num_hidden_layers=_TOWER_LAYERS, num_attention_heads=_HEADS,
            image_size=side, patch_size=1, projection_dim=_WIDTH,
        )  # fmt: skip
        config = LlavaConfig(
            vision_config=tower, text_config=LlamaConfig(**text), image_token_index=_IMAGE, image_seq_length=visual
        )
        inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, side, side)}
        return LlavaForConditionalGeneration(config), inputs
    height = next(side for side in range(side, 0, -1) if visual % side == 0)
    qwen = {
        "depth": _TOWER_LAYERS, "embed_dim": _WIDTH, "hidden_size": _WIDTH, "num_heads": _HEADS // 2, "mlp_ratio": 1,
        "patch_size": 1, "temporal_patch_size": 1, "spatial_merge_size": 1,
    }  # fmt: skip
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 0, 0], "rope_theta": 1e4}
    special: dict[str, Any] = {"video_token_id": -2, "vision_start_token_id": -3, "vision_end_token_id": -4}
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=qwen, image_token_id=_IMAGE, **special)
    )
    inputs = {
        "input_ids": ids, "pixel_values": torch.randn(visual, 3), "mm_token_type_ids": (ids == _IMAGE).int(),
        "image_grid_thw": torch.tensor([[1, height, visual // height]]),
    }  # fmt: skip
    return model, inputs


def _own_value(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):
    """Attention in which every token sees itself: what a method taps comes from `query` and `key` anyway."""
    return value.transpose(1, 2), None
