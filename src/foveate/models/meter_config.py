"""Configuration of METER."""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig, PreTrainedConfig, RobertaConfig

__all__ = ["MeterConfig"]

_VISION = {"patch_size": 16, "image_size": 288, "num_hidden_layers": 11}
"""CLIP ViT-B/16 without its last layer."""
_TEXT = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
"""roberta-base."""


class MeterConfig(PreTrainedConfig):
    """METER (arXiv 2111.02387): a CLIP image tower, a RoBERTa text tower, co-attention layers over both.

    Args:
        vision_config: `CLIPVisionConfig` or its fields; CLIP ViT-B/16 at 288 pixels, its last layer left out.
        text_config: `RobertaConfig` or its fields; roberta-base.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: of the co-attention layers.
        hidden_act, hidden_dropout_prob, attention_probs_dropout_prob, layer_norm_eps: likewise.
        modality_type_vocab_size: 2 (text, image); 3 for NLVR2, which has two images.
        image_sees_text: "before": the image side of a layer attends to the text as it entered the layer, as in METER's
            own code; "after": to what the text side made of it, as in PuMer's code and checkpoints.
        initializer_range: standard deviation of fresh weights.

    Raises:
        ValueError: another `image_sees_text`.
    """

    model_type = "meter"
    sub_configs = {"vision_config": CLIPVisionConfig, "text_config": RobertaConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: CLIPVisionConfig | dict[str, Any] | None = None,
        text_config: RobertaConfig | dict[str, Any] | None = None,
        hidden_size: int = 768,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        layer_norm_eps: float = 1e-12,
        modality_type_vocab_size: int = 2,
        image_sees_text: str = "before",
        initializer_range: float = 0.02,
        **kwargs: Any,
    ):
        if image_sees_text not in ("before", "after"):
            raise ValueError(f"image_sees_text={image_sees_text!r}: use 'before' or 'after'")
        if not isinstance(vision_config, CLIPVisionConfig):
            vision_config = CLIPVisionConfig(**{**_VISION, **(vision_config or {})})
        if not isinstance(text_config, RobertaConfig):
            text_config = RobertaConfig(**{**_TEXT, **(text_config or {})})
        self.vision_config, self.text_config = vision_config, text_config
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.layer_norm_eps = layer_norm_eps
        self.modality_type_vocab_size = modality_type_vocab_size
        self.image_sees_text = image_sees_text
        self.initializer_range = initializer_range
        self.is_decoder = False
        kwargs.pop("is_decoder", None)
        super().__init__(**kwargs)
