"""Weights of the official METER and PuMer codes under the names of our METER.

Layouts: zdou0830/METER @ f4f09345 (a Lightning checkpoint with `state_dict`; names begin with `vit_model.visual.`,
`text_transformer.`, `cross_modal_`) and csarron/PuMer @ 8a00d853 (a transformers folder; the same below `meter.`, the
tower at `meter.vit_model.`). Both MIT.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import interpolate

from .meter_config import MeterConfig

__all__ = ["convert_state_dict", "infer_config", "load_weights", "resize_positions"]

_TOWER = {
    "conv1.": "embeddings.patch_embedding.",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.": "pre_layrnorm.",
    "ln_post.": "post_layernorm.",
}
_BLOCK = {
    "attn.out_proj.": "self_attn.out_proj.",
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_HEADS = ("vqa_classifier.", "nlvr2_classifier.", "snli_classifier.", "ve_classifier.")
_UNUSED = ("mlm_score.", "itm_score.", "mpp_score.", "token_pruner.", "text_transformer.pooler.")
"""Heads of pre-training, a module without weights, a pooler that nothing reads."""


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint: a Lightning or plain torch file, a safetensors file, or a folder with either.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if path.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        found = [path / name for name in names if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"{path}: neither {' nor '.join(names)}")
        path = found[0]
    if path.suffix == ".safetensors":
        return load_file(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return loaded.get("state_dict", loaded)


def _is_meters_own(state: dict[str, Tensor]) -> bool:
    """METER's own layout, which keeps all of CLIP at `vit_model`, not PuMer's."""
    return any(name.startswith("vit_model.visual.") for name in state)


def _in_tower(name: str, value: Tensor) -> dict[str, Tensor]:
    block = re.match(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    if block is None:
        for old, new in _TOWER.items():
            if name.startswith(old):
                return {new + name[len(old) :]: value}
        raise KeyError(name)
    prefix, rest = f"encoder.layers.{block[1]}.", block[2]
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        return {f"{prefix}self_attn.{part}_proj.{kind}": piece for part, piece in zip("qkv", value.chunk(3))}
    for old, new in _BLOCK.items():
        if rest.startswith(old):
            return {prefix + new + rest[len(old) :]: value}
    raise KeyError(name)


def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official weights under our names, the base model at `meter.`.

    Left out: the text half of CLIP, the heads of pre-training, the pooler of RoBERTa, position ids. Where there is no
    head for retrieval, it is made of the one for image-text matching, as in the official codes.

    Raises:
        KeyError: a name of neither layout.
    """
    ours: dict[str, Tensor] = {}
    own = _is_meters_own(state)
    tower = "vit_model.visual." if own else "vit_model."
    for name, value in state.items():
        plain = name.removeprefix("meter.")
        text_of_clip = own and plain.startswith("vit_model.") and not plain.startswith(tower)
        if text_of_clip or plain.startswith(_UNUSED) or plain.endswith(("position_ids", "token_type_ids")):
            continue
        if plain.startswith(tower):
            inner = _in_tower(plain.removeprefix(tower), value)
            ours.update({f"meter.vision_model.{key}": part.clone() for key, part in inner.items()})
        elif plain.startswith("text_transformer."):
            ours["meter.text_model." + plain.removeprefix("text_transformer.")] = value
        elif plain.startswith(("cross_modal_", "token_type_embeddings.")):
            ours["meter." + plain] = value
        elif plain.startswith(_HEADS):
            ours["classifier." + plain.split(".", 1)[1]] = value
        elif plain.startswith("rank_output."):
            ours[plain] = value
        else:
            raise KeyError(name)
    if "rank_output.weight" not in ours and "itm_score.fc.weight" in state:
        ours |= {f"rank_output.{kind}": state[f"itm_score.fc.{kind}"][1:].clone() for kind in ("weight", "bias")}
    return ours


def resize_positions(weight: Tensor, tokens: int) -> Tensor:
    """Position embeddings of a square image for another size: (1 + n, C) -> (1 + tokens, C), bicubic."""
    before, after = round((len(weight) - 1) ** 0.5), round(tokens**0.5)
    if before == after:
        return weight
    grid = weight[1:].T.reshape(1, -1, before, before)
    grid = interpolate(grid, size=(after, after), mode="bicubic", align_corners=False)
    return torch.cat([weight[:1], grid.flatten(2)[0].T])


def infer_config(state: dict[str, Tensor], **options: Any) -> MeterConfig:
    """The configuration that fits official weights: sizes from shapes, heads of 64.

    Args:
        state: official weights, in either layout.
        options: fields that are not to be guessed; `vision_config` and `text_config` are dicts here.
    """
    ours = convert_state_dict(state)

    def depth(prefix: str) -> int:
        return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in ours if key.startswith(prefix))

    patches = ours["meter.vision_model.embeddings.patch_embedding.weight"]
    places = ours["meter.vision_model.embeddings.position_embedding.weight"]
    vision = {
        "hidden_size": patches.shape[0],
        "num_attention_heads": max(patches.shape[0] // 64, 1),
        "patch_size": patches.shape[-1],
        "image_size": round((len(places) - 1) ** 0.5) * patches.shape[-1],
        "num_hidden_layers": depth("meter.vision_model.encoder.layers."),
        "intermediate_size": len(ours["meter.vision_model.encoder.layers.0.mlp.fc1.weight"]),
    }
    words = ours["meter.text_model.embeddings.word_embeddings.weight"]
    text = {
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "num_attention_heads": max(words.shape[1] // 64, 1),
        "num_hidden_layers": depth("meter.text_model.encoder.layer."),
        "intermediate_size": len(ours["meter.text_model.encoder.layer.0.intermediate.dense.weight"]),
        "max_position_embeddings": len(ours["meter.text_model.embeddings.position_embeddings.weight"]),
        "type_vocab_size": len(ours["meter.text_model.embeddings.token_type_embeddings.weight"]),
    }
    kinds = ours["meter.token_type_embeddings.weight"]
    fields: dict[str, Any] = {
        "hidden_size": kinds.shape[1],
        "num_attention_heads": max(kinds.shape[1] // 64, 1),
        "num_hidden_layers": depth("meter.cross_modal_text_layers."),
        "intermediate_size": len(ours["meter.cross_modal_text_layers.0.intermediate.dense.weight"]),
        "modality_type_vocab_size": len(kinds),
        "image_sees_text": "before" if _is_meters_own(state) else "after",
    }
    if "classifier.3.weight" in ours:
        fields["num_labels"] = len(ours["classifier.3.weight"])
    fields["vision_config"] = {**vision, **options.pop("vision_config", {})}
    fields["text_config"] = {**text, **options.pop("text_config", {})}
    return MeterConfig(**{**fields, **options})
