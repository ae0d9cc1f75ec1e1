"""The tiny ViLT: its configuration, its words, its processor, and how it is initialised.

ViLT's authors start from an image model, and so does this: patch embedding and the lower layers come from the vision
tower of the tiny LLaVA, which was trained in this repository on the same kind of pictures. CLIP normalises embedded
patches before the first layer and ViLT does not, so the patch embedding is fitted to what came out of that norm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, ViltConfig, ViltForQuestionAnswering

from foveate.zoo import scenes

from ..examples import COLOR, DIGIT, OWNER, PATCHES, SHAPE, Example, pixels
from ..vocabulary import COLOR_WORDS, DIGIT_WORDS, IMAGE_MEAN, IMAGE_STD, SHAPE_WORDS, VOCABULARY
from ..vocabulary import SPECIAL as LLAVA_SPECIAL

__all__ = ["ANSWERS", "LOWER", "build", "encode", "name_words", "parts", "processor", "start_from_tower"]

WIDTH, LAYERS, HEADS = 128, 12, 4
LOWER = 5
"""Layers that come from the vision tower; its language model read the state after them."""
LONGEST = 24
"""Places for text; the longest question has 14 words."""

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
PAD, CLS, SEP, UNKNOWN = range(len(SPECIAL))
WORDS = {word: index for index, word in enumerate((*SPECIAL, *VOCABULARY[len(LLAVA_SPECIAL) :]))}
ANSWERS = (*COLOR_WORDS, *SHAPE_WORDS, *DIGIT_WORDS, *scenes.QUADRANTS, "yes", "no")


def encode(text: str) -> list[int]:
    """Token ids of a question with [CLS] and [SEP], exactly as the shipped tokenizer gives them."""
    return [CLS, *(WORDS.get(word, UNKNOWN) for word in text.lower().replace("?", " ?").split()), SEP]


def processor() -> Any:
    """The `ViltProcessor`: word tokenizer (lower case, "?" split off, [CLS] ... [SEP]) and ViLT's image processor."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, ViltImageProcessor, ViltProcessor

    words = Tokenizer(models.WordLevel(dict(WORDS), unk_token="[UNK]"))
    words.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("?", " ?")])
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=LONGEST,
        clean_up_tokenization_spaces=False,
    )
    images = ViltImageProcessor(
        size={"shortest_edge": scenes.IMAGE_SIZE},
        size_divisor=scenes.PATCH,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    return ViltProcessor(image_processor=images, tokenizer=tokenizer)


def build(seed: int) -> ViltForQuestionAnswering:
    """The untrained model in float32; its upper layers match content from the start."""
    torch.manual_seed(seed)
    config = ViltConfig(
        vocab_size=-(-len(WORDS) // 8) * 8,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=3 * WIDTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=LONGEST,
        image_size=scenes.IMAGE_SIZE,
        patch_size=scenes.PATCH,
        max_image_length=-1,
        pad_token_id=PAD,
        id2label=dict(enumerate(ANSWERS)),
        label2id={answer: index for index, answer in enumerate(ANSWERS)},
    )
    model: Any = ViltForQuestionAnswering(config)
    with torch.no_grad():
        for layer in model.vilt.encoder.layer[LOWER:]:
            _match_content(layer.attention)
        nn.init.eye_(model.vilt.pooler.dense.weight)
        for module in model.classifier:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, module.in_features**-0.5)
    return model


def _match_content(attention: Any) -> None:
    """Queries and keys that match content, as in `model`; values add little at first."""
    inner, size = attention.attention, WIDTH // HEADS
    for head in range(HEADS):
        rows = slice(head * size, (head + 1) * size)
        u, s, v = torch.linalg.svd(0.5 * torch.randn(WIDTH, WIDTH) / WIDTH**0.5 + 0.7 * torch.eye(WIDTH))
        inner.query.weight[rows] = (u[:, :size] * s[:size].sqrt()).T
        inner.key.weight[rows] = (v.T[:, :size] * s[:size].sqrt()).T
    u, s, v = torch.linalg.svd(0.05 * torch.randn(WIDTH, WIDTH) / WIDTH**0.5 + 0.08 * torch.eye(WIDTH))
    inner.value.weight.copy_((v.T * s.sqrt()).T)
    attention.output.dense.weight.copy_(u * s.sqrt())


def parts(model: Any) -> dict[str, nn.Module]:
    """What the stages train at different rates: "lower" (what the image passes first), and "upper" with the text."""
    base = model.vilt
    embeddings, layers = base.embeddings, base.encoder.layer
    own = nn.ParameterList([embeddings.cls_token, embeddings.position_embeddings])
    lower = [embeddings.patch_embeddings, embeddings.token_type_embeddings, own, *layers[:LOWER]]
    upper = [embeddings.text_embeddings, *layers[LOWER:], base.layernorm, base.pooler, model.classifier]
    return {"lower": nn.ModuleList(lower), "upper": nn.ModuleList(upper)}


# --------------------------------------------------------------------------------------------------------- starting
@torch.no_grad()
def start_from_tower(model: Any, llava: Path, drawn: list[Example]) -> None:
    """Fill the lower layers from the vision tower of a tiny LLaVA; the patch embedding is fitted on `drawn`."""
    tower = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32).model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    embeddings = model.vilt.embeddings
    _fit_patches(embeddings, tower, pixels(drawn))
    embeddings.token_type_embeddings.weight.zero_()
    names = {"layer_norm1": "layernorm_before", "layer_norm2": "layernorm_after"}
    names |= {f"self_attn.{short[0]}_proj": f"attention.attention.{short}" for short in ("query", "key", "value")}
    names |= {
        "self_attn.out_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    for source, target in zip(tower.encoder.layers[:LOWER], model.vilt.encoder.layer):
        for theirs, ours in names.items():
            target.get_submodule(ours).load_state_dict(source.get_submodule(theirs).state_dict())


def _fit_patches(embeddings: Any, tower: Any, images: Tensor) -> None:
    """Least squares: pixels of a patch, and its place, to CLIP's normed embedding of it."""
    normed = tower.pre_layrnorm(tower.embeddings(images))
    kernel = tower.embeddings.patch_embedding
    side = kernel.kernel_size[0]
    shown = nn.functional.unfold(images, side, stride=side).transpose(1, 2)  # (B, 196, 3 * 64)
    inputs = shown - shown.mean(0)  # what depends on the place alone goes to the position
    wanted = normed[:, 1:] - normed[:, 1:].mean(0)
    flat, target = inputs.flatten(0, 1).double(), wanted.flatten(0, 1).double()
    gram = flat.T @ flat + 1e-3 * len(flat) * torch.eye(flat.shape[1], dtype=torch.double)
    weight = torch.linalg.solve(gram, flat.T @ target).T.float()
    embeddings.patch_embeddings.projection.weight.copy_(weight.view_as(kernel.weight))
    embeddings.patch_embeddings.projection.bias.zero_()
    places = normed[:, 1:].mean(0) - shown.mean(0) @ weight.T
    embeddings.cls_token.zero_()
    embeddings.position_embeddings.copy_(torch.cat([normed[:1, 0], places])[None])


@torch.no_grad()
def name_words(model: Any, states: Tensor, drawn: list[Example]) -> None:
    """Start the embeddings of shapes, colours and digits as what patches that show them have in common.

    Args:
        states: patch states after the lower layers (B, 196, D), of the pictures `drawn`.
    """
    table = model.vilt.embeddings.text_embeddings
    table.word_embeddings.weight.normal_(0, 1.0)
    table.word_embeddings.weight[PAD] = 0
    table.position_embeddings.weight.normal_(0, 0.3)
    labels = torch.from_numpy(np.stack([example.labels for example in drawn]))
    foreground = labels[..., OWNER] > 0
    middle = states[foreground].mean(0)
    for column, words in ((SHAPE, SHAPE_WORDS), (COLOR, COLOR_WORDS), (DIGIT, DIGIT_WORDS)):
        for index, word in enumerate(words):
            shown = foreground & (labels[..., column] == index + 1)
            if shown.any():
                vector = states[shown].mean(0) - middle
                table.word_embeddings.weight[WORDS[word]] = vector / vector.pow(2).mean().sqrt()


assert PATCHES == (scenes.IMAGE_SIZE // scenes.PATCH) ** 2
