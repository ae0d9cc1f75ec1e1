"""A tiny model of a family, and transformers' own processor around it: image and video processor, tokenizer, template.

The tokenizer writes one id for each character, and the family's special tokens by their ids in the model's vocabulary.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from tests import catalogue

__all__ = [
    "FAMILIES",
    "STATEFUL",
    "STRUCTURES",
    "VIDEO",
    "about",
    "family",
    "made",
    "tokenizer",
    "vlm",
]

_DATA: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "families.yaml").read_text())["families"]
FAMILIES = list(_DATA)
VIDEO = [name for name, entry in _DATA.items() if "video" in entry]
STATEFUL = ["qwen3_5"]
"""transformers takes no candidates back from these: no assisted decoding, no prompt lookup."""
STRUCTURES = ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "smolvlm", "lfm2_vl", "qwen3_5"]
"""A CLS tower, M-RoPE, DeepStack, tiles, windows with bidirectional images, split images, and two kinds of hybrid."""
_TEMPLATE = (
    "<s>{% for message in messages %}{{ message.role }}: {% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'image' %}IMAGE{% elif part.type == 'video' %}VIDEO"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

_needs_torchvision = pytest.mark.skipif(
    not hf.utils.is_torchvision_available(), reason="needs torchvision: run `make processors`"
)


def family(names: Sequence[str] = FAMILIES, quick: str = "") -> Any:
    """Parametrise a test by families; those but `quick` are slow tests, and skip where a package is missing."""
    slow = {name: [] if name == quick else [pytest.mark.slow] for name in names}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=slow[name] + _skips(name)) for name in names])


def about(name: str, what: str) -> Any:
    """An entry of `families.yaml`, None where it is left out."""
    return _DATA[name].get(what)


def _skips(name: str) -> list[Any]:
    marks = []
    images = IMAGE_PROCESSOR_MAPPING_NAMES.get(name) or IMAGE_PROCESSOR_MAPPING_NAMES[about(name, "known_as")]
    if "video" in _DATA[name] or "pil" not in images:
        marks.append(_needs_torchvision)
    wanted = about(name, "needs") or []
    needed = catalogue.missing(name) + [package for package in wanted if importlib.util.find_spec(package) is None]
    if needed:
        marks.append(pytest.mark.skip(reason=f"needs {', '.join(needed)}: run `make processors`"))
    return marks


@functools.cache
def vlm(name: str) -> tuple[Any, Any]:
    """(model, processor), shared by the tests of a process: every test leaves them as it found them."""
    return made(name)


def made(name: str) -> tuple[Any, Any]:
    """(model, processor), new ones."""
    model = catalogue.build(name, text=about(name, "text"), top=about(name, "top"))
    return model, _processor(name)


def tokenizer(name: str) -> Any:
    """Ids 0 to 3 are padding, start, end and unknown; the printable characters come from 5 on."""
    tokens = _DATA[name]["tokens"]
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {c: i for i, c in enumerate(string.printable[:96], 5)}
    characters = Tokenizer(models.WordLevel(words | tokens, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=characters, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        padding_side="left", extra_special_tokens=_DATA[name].get("named", {}),
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


def _class(names: Mapping[str, Any], name: str) -> Any:
    found = names.get(name) or names[about(name, "known_as")]
    if isinstance(found, str):
        return getattr(hf, found)
    kinds = ["torchvision", "pil"] if hf.utils.is_torchvision_available() else ["pil"]
    return getattr(hf, next(found[kind] for kind in [*kinds, "pil"] if kind in found))


def _processor(name: str) -> Any:
    entry = _DATA[name]
    processor = _class(PROCESSOR_MAPPING_NAMES, name)
    written = dict(zip(["image", "video"], entry["tokens"])) | entry.get("written", {})
    template = _TEMPLATE.replace("IMAGE", written["image"]).replace("VIDEO", written.get("video", ""))
    parts = {
        "tokenizer": lambda: tokenizer(name),
        "image_processor": lambda: _class(IMAGE_PROCESSOR_MAPPING_NAMES, name)(**entry["image"]),
        "video_processor": lambda: _class(VIDEO_PROCESSOR_MAPPING_NAMES, name)(**entry.get("video", {})),
        "feature_extractor": lambda: getattr(hf, entry["audio"])(),
        "audio_processor": lambda: getattr(hf, entry["audio"])(),
    }
    takes = inspect.signature(processor.__init__).parameters
    built = processor(**{part: make() for part, make in parts.items() if part in takes}, **entry.get("processor", {}))
    built.chat_template = template
    return built
