"""METER as a model of transformers: two towers, co-attention layers over both, heads.

Paper: "An Empirical Study of Training End-to-End Vision-and-Language Transformers", arXiv 2111.02387. Official code:
zdou0830/METER @ f4f09345 (MIT; the CLIP and RoBERTa variant, re-implemented). `foveate.PuMer` makes it faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import CLIPVisionModel, PreTrainedModel, RobertaModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutput
from transformers.models.roberta.modeling_roberta import RobertaAttention, RobertaIntermediate, RobertaOutput
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .meter_config import MeterConfig
from .meter_keys import convert_state_dict, infer_config, load_weights, resize_positions

__all__ = [
    "MeterForImageAndTextRetrieval",
    "MeterForImagesAndTextClassification",
    "MeterForQuestionAnswering",
    "MeterForVisualEntailment",
    "MeterModel",
    "MeterModelOutput",
    "MeterPreTrainedModel",
]

logger = logging.get_logger(__name__)

_HEADS = ("classifier.", "rank_output.")
_M = TypeVar("_M", bound="MeterPreTrainedModel")


@dataclass
class MeterModelOutput(ModelOutput):
    """What `MeterModel` returns.

    Attributes:
        text_features: (B, L, D).  image_features: (B, N, D), class token first.
        pooler_output: (B, 2 D), text then image.
        hidden_states: per co-attention layer (text, image), its input first; with `output_hidden_states`.
        attentions: per layer (text to text, text to image, image to image, image to text), None where the attention
            implementation has no maps; with `output_attentions`.
    """

    text_features: Tensor | None = None
    image_features: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[tuple[Tensor, Tensor], ...] | None = None
    attentions: tuple[tuple[Tensor | None, ...], ...] | None = None


class MeterCrossLayer(nn.Module):
    """One side of a co-attention layer: self-attention, attention to the other modality, MLP; post-norm as in BERT."""

    def __init__(self, config: MeterConfig):
        super().__init__()
        self.attention = RobertaAttention(config)
        self.crossattention = RobertaAttention(config, is_cross_attention=True)
        self.intermediate = RobertaIntermediate(config)
        self.output = RobertaOutput(config)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_attentions: bool = False,
    ) -> Any:
        """(B, T, D), with its two attention maps if asked for; `encoder_*` is the other modality."""
        states, own = self.attention(hidden_states, attention_mask=attention_mask)
        states, other = self.crossattention(
            states, encoder_hidden_states=encoder_hidden_states, encoder_attention_mask=encoder_attention_mask
        )
        states = self.output(self.intermediate(states), states)
        return (states, own, other) if return_attentions else states


class MeterPooler(nn.Module):
    """tanh of a linear layer on the first token."""

    def __init__(self, config: MeterConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) -> (B, D)."""
        return self.activation(self.dense(hidden_states[:, 0]))


class MeterPreTrainedModel(PreTrainedModel):
    """Loading, saving, fresh weights."""

    config: MeterConfig
    config_class = MeterConfig
    base_model_prefix = "meter"
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _modalities = 2
    """Rows of `token_type_embeddings` that the model needs."""
    _no_split_modules = ["MeterCrossLayer", "CLIPEncoderLayer", "RobertaLayer"]  # noqa: RUF012

    @classmethod
    def from_official(
        cls: type[_M], checkpoint: str | Path | dict[str, Tensor], image_size: int | None = None, **options: Any
    ) -> _M:
        """A model with the weights of an official METER or PuMer checkpoint, in evaluation mode.

        From a pre-trained checkpoint the head of a task stays fresh, with a warning. For two images (NLVR2) the second
        starts from the embedding of the first, as in the official codes.

        Args:
            checkpoint: a file, a folder, or the weights themselves.
            image_size: pixels; position embeddings are interpolated to it. Default: as trained.
            options: fields of `MeterConfig` that cannot be seen in the weights (`num_attention_heads`, which is taken
                as `hidden_size // 64`; `num_labels` without a head; `vision_config`, `text_config` as dicts).

        Raises:
            KeyError: a weight of neither layout.
            RuntimeError: weights are missing, left over, or of other shapes.
        """
        state = checkpoint if isinstance(checkpoint, dict) else load_weights(checkpoint)
        if image_size is not None:
            options["vision_config"] = {**options.get("vision_config", {}), "image_size": image_size}
        ours = convert_state_dict(state)
        kinds = ours["meter.token_type_embeddings.weight"]
        if len(kinds) < cls._modalities:
            ours["meter.token_type_embeddings.weight"] = torch.cat([kinds, kinds[1:2]])
            options["modality_type_vocab_size"] = cls._modalities
        config = infer_config(state, **options)
        tower: Any = config.vision_config
        places = "meter.vision_model.embeddings.position_embedding.weight"
        ours[places] = resize_positions(ours[places], (tower.image_size // tower.patch_size) ** 2)
        model = cls(config).eval()
        if cls is MeterModel:
            ours = {name.removeprefix("meter."): value for name, value in ours.items() if name.startswith("meter.")}
        elif not hasattr(model, "rank_output"):
            ours = {name: value for name, value in ours.items() if not name.startswith("rank_output.")}
        else:
            ours = {name: value for name, value in ours.items() if not name.startswith("classifier.")}
        fresh = [name for name in model.state_dict() if name.startswith(_HEADS) and name not in ours]
        ours |= {name: model.state_dict()[name] for name in fresh}
        model.load_state_dict(ours)
        if fresh:
            logger.warning(f"{cls.__name__}: no weights for the head in this checkpoint, it is fresh: {fresh}")
        return model


class MeterModel(MeterPreTrainedModel):
    """Towers, co-attention layers, poolers."""

    def __init__(self, config: MeterConfig):
        super().__init__(config)
        self.vision_model = CLIPVisionModel(config.vision_config)
        self.text_model = RobertaModel(config.text_config, add_pooling_layer=False)
        self.cross_modal_text_transform = nn.Linear(config.text_config.hidden_size, config.hidden_size)
        self.cross_modal_image_transform = nn.Linear(config.vision_config.hidden_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.modality_type_vocab_size, config.hidden_size)
        depth = range(config.num_hidden_layers)
        self.cross_modal_text_layers = nn.ModuleList([MeterCrossLayer(config) for _ in depth])
        self.cross_modal_image_layers = nn.ModuleList([MeterCrossLayer(config) for _ in depth])
        self.cross_modal_text_pooler = MeterPooler(config)
        self.cross_modal_image_pooler = MeterPooler(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_token_type_idx: int = 1,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> MeterModelOutput:
        """One image for each text.

        Args:
            input_ids: (B, L).  attention_mask: (B, L), 1 for text; None: no padding.
            pixel_values: (B, 3, H, W).
            image_token_type_idx: 1; 2 for the second image of NLVR2.
            interpolate_pos_encoding: for images of another size than configured.

        Raises:
            ValueError: no image, or a batch of another size.
        """
        if pixel_values is None or len(pixel_values) != len(input_ids):
            raise ValueError("give pixel_values, one image for each text")
        wants_maps = self.config.output_attentions if output_attentions is None else output_attentions
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        text = self.text_model(input_ids, attention_mask=attention_mask).last_hidden_state
        text = self.cross_modal_text_transform(text) + self.token_type_embeddings.weight[0]
        tower = self.vision_model
        image = tower(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding).last_hidden_state
        image = self.cross_modal_image_transform(tower.post_layernorm(image))
        image = image + self.token_type_embeddings.weight[image_token_type_idx]

        for_text = create_bidirectional_mask(self.config, text, attention_mask)
        for_image = create_bidirectional_mask(self.config, image, attention_mask, encoder_hidden_states=text)
        states, maps = [(text, image)], []
        for text_layer, image_layer in zip(self.cross_modal_text_layers, self.cross_modal_image_layers):
            new_text, *text_maps = text_layer(text, image, for_text, None, True)
            seen = new_text if self.config.image_sees_text == "after" else text
            image, *image_maps = image_layer(image, seen, None, for_image, True)
            text = new_text
            states.append((text, image))
            maps.append((*text_maps, *image_maps))
        pooled = torch.cat([self.cross_modal_text_pooler(text), self.cross_modal_image_pooler(image)], -1)
        return MeterModelOutput(
            text_features=text,
            image_features=image,
            pooler_output=pooled,
            hidden_states=tuple(states) if wants_states else None,
            attentions=tuple(maps) if wants_maps else None,
        )


def _classifier(config: MeterConfig, images: int) -> nn.Sequential:
    width = config.hidden_size * 2
    return nn.Sequential(
        nn.Linear(width * images, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, config.num_labels or 2)
    )


class _MeterWithHead(MeterPreTrainedModel):
    """One image, one vector, one linear or deeper head."""

    def __init__(self, config: MeterConfig):
        super().__init__(config)
        self.meter = MeterModel(config)
        self._add_head(config)
        self.post_init()

    def _add_head(self, config: MeterConfig) -> None:
        self.classifier = _classifier(config, 1)

    def _head(self, pooled: Tensor) -> Tensor:
        return self.classifier(pooled)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """`logits` (B, labels) and with `labels` the `loss`; arguments as for `MeterModel`."""
        outputs = self.meter(input_ids, attention_mask, pixel_values, **kwargs)
        logits = self._head(outputs.pooler_output)
        loss = None if labels is None else self._loss(logits, labels.to(logits.device))
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MeterForQuestionAnswering(_MeterWithHead):
    """VQAv2: labels (B, num_labels) are soft scores; the loss is binary cross-entropy summed over the answers."""

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(logits, labels) * labels.shape[1]


class MeterForVisualEntailment(_MeterWithHead):
    """SNLI-VE: labels (B,) are classes."""

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels)


class MeterForImageAndTextRetrieval(_MeterWithHead):
    """How well image and text match: logits (B, 1). Labels (B,) in [0, 1] train it with binary cross-entropy."""

    def _add_head(self, config: MeterConfig) -> None:
        self.rank_output = nn.Linear(config.hidden_size * 2, 1)

    def _head(self, pooled: Tensor) -> Tensor:
        return self.rank_output(pooled)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype))


class MeterForImagesAndTextClassification(MeterPreTrainedModel):
    """NLVR2: two images for each text; labels (B,) are classes. Needs `modality_type_vocab_size=3`."""

    _modalities = 3

    def __init__(self, config: MeterConfig):
        super().__init__(config)
        if config.modality_type_vocab_size < 3:
            raise ValueError("two images need modality_type_vocab_size=3")
        self.meter = MeterModel(config)
        self.classifier = _classifier(config, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """As for one image, with `pixel_values` (B, 2, 3, H, W); states and attentions are of the second image."""
        if pixel_values is None or pixel_values.dim() != 5 or pixel_values.shape[1] != 2:
            raise ValueError("give pixel_values (B, 2, 3, H, W)")
        passes = [
            self.meter(input_ids, attention_mask, pixel_values[:, i], image_token_type_idx=i + 1, **kwargs)
            for i in range(2)
        ]
        logits = self.classifier(torch.cat([outputs.pooler_output for outputs in passes], -1))
        loss = None if labels is None else cross_entropy(logits, labels.to(logits.device))
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=passes[1].hidden_states, attentions=passes[1].attentions
        )
