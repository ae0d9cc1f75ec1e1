"""The closed vocabulary of the tiny model, its tokenizer and its chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.zoo import scenes

__all__ = ["COLOR_WORDS", "DIGIT_WORDS", "IDS", "SHAPE_WORDS", "VOCABULARY", "encode", "processor"]

SHAPE_WORDS = (*scenes.SHAPES, "rectangle")  # the rectangle and the last two colours occur in easy-VQA only
COLOR_WORDS = (*scenes.COLORS, "gray", "black")
DIGIT_WORDS = tuple("0123456789")

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:")
_QUESTION_WORDS = (
    "? a above and are below color contain digit does how image in is left many no not object objects of on one "
    "present right shape shapes the there what where with yes"
)
VOCABULARY = (
    *SPECIAL,
    *sorted({*_QUESTION_WORDS.split(), *SHAPE_WORDS, *COLOR_WORDS, *DIGIT_WORDS, *scenes.QUADRANTS}),
)
IDS = {word: index for index, word in enumerate(VOCABULARY)}
PAD, BOS, EOS, UNKNOWN, IMAGE, USER, ASSISTANT = range(len(SPECIAL))

IMAGE_MEAN = (0.48, 0.46, 0.41)
IMAGE_STD = (0.27, 0.26, 0.28)

CHAT_TEMPLATE = """<s>
{%- for message in messages %}
{{- ' USER:' if message['role'] == 'user' else ' ASSISTANT:' }}
{%- if message['content'] is string %}
{{- ' ' + message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{{- ' <image>' if part['type'] == 'image' else ' ' + part['text'] }}
{%- endfor %}
{%- endif %}
{%- if message['role'] == 'assistant' %}
{{- '</s>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- ' ASSISTANT:' }}
{%- endif %}"""


def encode(text: str) -> list[int]:
    """Token ids of a question or an answer, exactly as the shipped tokenizer gives them."""
    return [IDS.get(word, UNKNOWN) for word in text.lower().replace("?", " ?").split()]


def processor() -> Any:
    """The `LlavaProcessor`: word tokenizer (lower case, "?" split off), CLIP image processor, chat template."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(dict(IDS), unk_token="<unk>"))
    words.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("?", " ?")])
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=["<image>", "USER:", "ASSISTANT:"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.image_token, tokenizer.image_token_id = "<image>", IMAGE
    side = scenes.IMAGE_SIZE
    images = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=scenes.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def save_processor(folder: Path) -> None:
    """Write tokenizer, image processor and chat template."""
    processor().save_pretrained(folder)
