"""From an entry of `families.yaml` to a tiny random model, and a left-padded prompt with one image in each row."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hf
import yaml
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.catalogue import handmade, pixels
from tests.catalogue.handmade import HANDMADE, IMAGE

__all__ = ["NAMES", "alone", "build", "class_name", "inputs", "known", "missing", "visual_slots"]

_DATA = yaml.safe_load((Path(__file__).parent / "families.yaml").read_text())
_FAMILIES, _SIZES = _DATA["families"], _DATA["sizes"]
NAMES: list[str] = [*_FAMILIES, *HANDMADE]
"""Model types of all classes."""
_CLASSES = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "phi4_multimodal": "Phi4MultimodalForCausalLM"}


def class_name(name: str) -> str:
    return HANDMADE[name].cls if name in HANDMADE else _CLASSES[name]


def known(name: str) -> bool:
    """Whether the installed transformers has the class."""
    return hasattr(hf, HANDMADE[name].cls if name in HANDMADE else _CLASSES.get(name, name))


def missing(name: str) -> list[str]:
    """Packages that a class needs and that are not installed."""
    return [p for p in _FAMILIES.get(name, {}).get("needs", []) if importlib.util.find_spec(p) is None]


def build(
    name: str, text: Mapping[str, Any] | None = None, impl: str = "sdpa", top: Mapping[str, Any] | None = None
) -> Any:
    """A float32 model in eval mode, its weights the same at every call.

    Args:
        name: one of `NAMES`.
        text: overrides for the configuration of the decoder.
        impl: attention implementation; a class that has only "eager" keeps it.
        top: overrides for the model's own configuration, and those of its vision tower under "vision".
    """
    torch.manual_seed(0)  # some classes draw buffers
    if name in HANDMADE:
        model = HANDMADE[name].make()
    else:
        cls = getattr(hf, _CLASSES[name])
        model = cls(_config(cls.config_class, _overridden(_FAMILIES[name], dict(top or {})), dict(text or {})))
    _spread(model)
    try:
        model.set_attn_implementation(impl)
    except ValueError:
        model.set_attn_implementation("eager")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def _overridden(family: Mapping[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    vision = {**(family.get("vision") or {}), **top.pop("vision", {})}
    merged = {**family, "top": {**family.get("top", {}), **top}}
    return merged | {"vision": vision} if vision or family.get("vision") is not None else merged


def _known(cls: type, table: Mapping[str, Any], particular: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that a configuration class has a name for, then what is particular to the family."""
    names = set(inspect.signature(cls.__init__).parameters) | set(getattr(cls, "__dataclass_fields__", {}))
    with contextlib.suppress(Exception):  # a class that cannot be made without arguments names them
        names |= set(vars(cls()))
    wanted = {name: value for name, value in table.items() if name in names} | dict(particular)
    return {name: value for name, value in wanted.items() if value != "omit"}


def _config(cls: type, family: Mapping[str, Any], text: dict[str, Any]) -> Any:
    top = dict(family.get("top", {}))
    if family.get("flat"):
        return cls(**_known(cls, _SIZES["text"] | _SIZES["tokens"], dict(family.get("text", {})) | top | text))
    parts = {"text_config": _part(cls, "text_config", _SIZES["text"], dict(family.get("text", {})) | text)}
    if family.get("vision") is not None:
        # DeepSeek-OCR2, Unlimited-OCR: a configuration of configurations
        table = {} if "sam_config" in family["vision"] else _SIZES["vision"]
        parts["vision_config"] = _part(cls, "vision_config", table, dict(family["vision"]))
    arguments = {"pad_token_id": 0} | _known(cls, _SIZES["tokens"], top | parts)
    config = cls(**arguments)
    if not all(hasattr(config, part) for part in parts):  # transformers 5.0: Qwen-VL takes dictionaries only
        config = cls(**arguments | {name: part.to_dict() for name, part in parts.items()})
    return config


def _part(cls: Any, name: str, table: Mapping[str, Any], particular: dict[str, Any]) -> Any:
    kind = particular.pop("model_type", None)
    if kind in CONFIG_MAPPING:
        part: Any = CONFIG_MAPPING[kind]
    else:
        part = cls.sub_configs.get(name)
        if part is None or part.__name__ in ("AutoConfig", "PreTrainedConfig"):
            part = type(getattr(cls(), name))
    return part(**_known(part, table, particular))


def _spread(model: Any, gain: float = 1.2) -> None:
    """Draw weights by which every token and every layer matters, as `families.spread_weights` does.

    Decay rates of recurrent layers stay moderate.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.is_floating_point():
                continue
            drawn = torch.randn(weight.shape, generator=generator)
            if "A_log" in name:
                weight.copy_(torch.rand(weight.shape, generator=generator))
            elif "embed" in name and "patch" not in name:
                weight.copy_(drawn * 0.1)
            elif weight.dim() >= 2:
                weight.copy_(drawn * gain / max(1, weight[0].numel()) ** 0.5)
            elif any(word in name for word in ("bias", "newline", "class_embedding")):
                weight.copy_(drawn * 0.1)
    model.float().eval()


def inputs(name: str, model: Any, rows: int = 2) -> dict[str, Tensor]:
    """Row b: BOS, 5 + b words, START, the placeholders of one image, END, 9 + 2b words; padded on the left.

    Words are ids below 140, so `suppress_tokens=range(145, 200)` keeps what is generated free of placeholders.
    """
    if name in HANDMADE:
        return HANDMADE[name].inputs(model, rows)
    family = _FAMILIES[name]
    function, *arguments = family["pixels"]
    made = getattr(pixels, function)
    images = made(*arguments)(model, rows) if arguments or function == "stream" else made(model, rows)
    placeholder = family.get("placeholder", IMAGE)
    tokens = [family["tokens"]] * rows if "tokens" in family else _tokens(model, images, rows)
    prompt = {**images, **handmade.prompts([[152, *[placeholder] * n, 153] for n in tokens])}
    visual = prompt["input_ids"] == placeholder
    takes = inspect.signature(type(model).forward).parameters
    prompt |= {n: visual.int() for n in ("mm_token_type_ids", "moe_mm_token_type_ids") if n in takes}
    if "token_type_ids" in takes:
        prompt["token_type_ids"] = torch.zeros_like(visual, dtype=torch.long) if name == "paligemma" else visual.long()
    if name == "kosmos-2":
        prompt["image_embeds_position_mask"] = visual.long()
    if name == "mllama":
        prompt["cross_attention_mask"] = torch.ones(*visual.shape, 1, 2, dtype=torch.long)
    return prompt


def alone(prompt: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of two, without padding."""
    rows, real, found = len(prompt["input_ids"]), prompt["attention_mask"][row].bool(), {}
    for name, value in prompt.items():
        if value.shape == prompt["input_ids"].shape:
            found[name] = value[row : row + 1, real]
        elif name == "pixel_values" and "target_sizes" in prompt:  # MiniCPM-V: images side by side
            found[name] = value.chunk(rows, -1)[row]
        elif name == "pixel_values" and "image_grid_thw" in prompt:
            found[name] = value.split(prompt["image_grid_thw"].prod(1).tolist())[row]
        else:
            found[name] = value.chunk(rows)[row]
    return found


def visual_slots(name: str, prompt: Mapping[str, Tensor]) -> Tensor:
    """(B, S) bool: slots of the prompt that hold visual tokens."""
    placeholder = HANDMADE[name].placeholder if name in HANDMADE else _FAMILIES[name].get("placeholder", IMAGE)
    return prompt["input_ids"] == placeholder


def _tokens(model: Any, images: Mapping[str, Tensor], rows: int) -> list[int]:
    """Visual tokens of each image, asked of the model itself."""
    encode = getattr(model.base_model, "get_image_features", None) or model.get_image_features
    takes = inspect.signature(encode).parameters
    with torch.no_grad():
        found = encode(**{name: value for name, value in images.items() if name in takes}, return_dict=True)
    if model.config.model_type == "granite4_vision":  # one set of features for each decoder layer that they enter
        found = found.deepstack_features[0][1]
    found = getattr(found, "pooler_output", found)
    if isinstance(found, Tensor) and found.dim() == 2:
        return [found.shape[0] // rows] * rows
    return [part.shape[-2] if part.dim() >= 2 else part.shape[0] for part in found]
