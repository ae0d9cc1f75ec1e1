"""PuMer against csarron/PuMer: matching, merge styles, attention, a block of ViLT and a layer of METER."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViltConfig, ViltModel

from foveate.engine.cross_modal.session import EncoderSession
from foveate.ops.bipartite import soft_matching
from foveate.ops.pumer import masked_softmax, reduce_image, reduce_text
from foveate.reducers import pumer

from . import Golden

RTOL, ATOL = 1e-4, 1e-5
PREFIX = "w_"


def check(path: Path) -> None:
    """Compare everything in one file of `goldens/pumer`."""
    golden = Golden(path)
    if "class_token" in golden:
        _matching(golden)
    elif "out_tip_sum" in golden or "out_diff_sum" in golden:
        _added(golden)
    elif "attn_in" in golden:
        golden.compare("out", masked_softmax(golden["attn_in"], golden["mask"]), ATOL, RTOL)
    elif "cross_attn" in golden:
        _meter_layer(golden)
    else:
        _vilt_block(golden)
    golden.finish()


def _close(golden: Golden, name: str, ours: Tensor) -> None:
    golden.compare(name, ours, ATOL, RTOL)


def _matching(golden: Golden) -> None:
    metric, x, r = golden["metric"], golden["x"], golden.scalar("r")
    protected = golden.scalar("class_token")
    merging = soft_matching(metric, r, protected)
    for suffix, size in (("", None), ("_sized", golden["size_in"])):
        mean, total = merging.mean(x, size)
        _close(golden, f"out{suffix}", mean)
        _close(golden, f"out{suffix}_size", total)
    golden.compare("source", merging.membership())
    if protected:  # the same through what the method itself calls
        share = min(r, (metric.shape[1] - 1) // 2) / metric.shape[1]
        ours = reduce_text(metric, torch.ones(metric.shape[:2]), share)
        assert ours is not None
        _close(golden, "out", ours.apply(x))


def _added(golden: Golden) -> None:
    x, metric, scores, r = golden["x"], golden["metric"], golden["attn"], golden.scalar("r")
    tokens = x.shape[1]
    everything = torch.ones(scores.shape, dtype=torch.bool)
    for style, most in (("tip", (tokens - 1) // 2), ("diff", tokens // 2)):
        reduction = reduce_image(scores, metric, everything, 0.0, min(r, most) / tokens, style, protect_class=False)
        _close(golden, f"out_{style}_sum", reduction.apply(x))


def _ratios(golden: Golden) -> dict[str, float]:
    return {name: golden.scalar(name) for name in ("prune_r", "merge_r", "merge_text")}


def _weights(golden: Golden) -> dict[str, Tensor]:
    return {name[len(PREFIX) :].replace("__", "."): golden[name] for name in golden.arrays if name.startswith(PREFIX)}


def _load(layer: nn.Module, state: dict[str, Tensor]) -> None:
    assert state.keys() == layer.state_dict().keys(), sorted(state.keys() ^ layer.state_dict().keys())
    layer.load_state_dict(state)


def _inputs_of(module: nn.Module, seen: list[Tensor]) -> Any:
    return module.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))


@torch.no_grad()
def _vilt_block(golden: Golden) -> None:
    x, weights = golden["x"], _weights(golden)
    heads, width = golden["attn"].shape[1], x.shape[2]
    config = ViltConfig(
        hidden_size=width, num_attention_heads=heads, num_hidden_layers=1, image_size=32, patch_size=16, vocab_size=9,
        intermediate_size=golden["w_mlp__fc1__weight"].shape[0], layer_norm_eps=1e-5,
    )  # fmt: skip
    model = ViltModel(config).eval()
    layer = model.encoder.layer[0]
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
    names |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    state = {}
    for name, value in weights.items():
        stem, _, kind = name.rpartition(".")
        if stem == "attn.qkv":
            for part, piece in zip(("query", "key", "value"), value.chunk(3)):
                state[f"attention.attention.{part}.{kind}"] = piece
        else:
            state[f"{names.get(stem, stem)}.{kind}"] = value
    _load(layer, state)

    mask, text_masks, length = golden["mask"], golden["text_masks"], golden.scalar("text_len")
    assert torch.equal(mask[:, :length], text_masks)
    method = pumer.PuMer(
        layers=[0], **_ratios(golden), sim_method=str(golden.arrays["sim_method"]),
        merge_style=str(golden.arrays["merge_style"]), faithful=True,
    )  # fmt: skip
    golden.unread -= {"sim_method", "merge_style"}
    full: list[Tensor] = []
    reduced: list[Tensor] = []
    _inputs_of(layer.layernorm_after, full)
    heads_of = {}
    attention = layer.attention.attention
    for name in ("key", "query"):
        getattr(attention, name).register_forward_hook(lambda m, a, out, name=name: heads_of.update({name: out}))
    with EncoderSession(model, method) as session:
        _inputs_of(layer.layernorm_after, reduced)
        session.begin(text_masks, mask[:, length:])
        out, probabilities = layer(x, None, True)
        left = session._pass
    _close(golden, "x_after_attn", full[0])
    _close(golden, "attn", probabilities)
    for name in ("key", "query"):
        _close(golden, f"{name[0]}_mean", heads_of[name].unflatten(2, (heads, -1)).mean(2))
    _close(golden, "reduced", reduced[0])
    _close(golden, "mask_out", torch.cat([left.text_mask.float(), left.image_mask.float()], 1))
    golden.compare("text_len_out", left.text_mask.shape[1])
    _close(golden, "block_out", out)


@torch.no_grad()
def _meter_layer(golden: Golden) -> None:
    from foveate.models.meter import MeterConfig, MeterModel

    text, image, weights = golden["text"], golden["image"], _weights(golden)
    heads, width = golden["cross_attn"].shape[1], text.shape[2]
    config = MeterConfig(
        hidden_size=width, num_attention_heads=heads, num_hidden_layers=1,
        intermediate_size=golden["w_intermediate__dense__weight"].shape[0],
        vision_config={"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16},
        text_config={"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9},
    )  # fmt: skip
    model = MeterModel(config).eval()
    layer, image_layer = model.cross_modal_text_layers[0], model.cross_modal_image_layers[0]
    _load(layer, weights)
    text_masks, image_masks = golden["text_masks"], golden["image_masks"]

    after: list[Tensor] = []
    reduced: list[Tensor] = []
    image_in: list[Tensor] = []
    keys = {}
    for name in ("attention", "crossattention"):
        projection = getattr(layer, name).self.key
        projection.register_forward_hook(lambda m, a, out, name=name: keys.update({name: out}))
    layer.crossattention.register_forward_hook(lambda m, a, out: after.append(out[0]))
    _inputs_of(layer.intermediate, reduced)
    method = pumer.PuMer(layers=[0], **_ratios(golden), faithful=True)
    maps: list[Tensor] = []
    with EncoderSession(model, method) as session:
        layer.crossattention.self.register_forward_hook(lambda m, a, out: maps.append(out[1]))
        _inputs_of(image_layer.attention, image_in)
        session.begin(text_masks, image_masks)
        out = layer(text, image)
        image_layer(image, text)
        left = session._pass
    _close(golden, "cross_attn", maps[0])
    for name, projection in (("txt_k_mean", "attention"), ("img_k_mean", "crossattention")):
        _close(golden, name, keys[projection].unflatten(2, (heads, -1)).mean(2))
    _close(golden, "text_after_cross", after[0])
    _close(golden, "text_reduced", reduced[0])
    _close(golden, "text_out", out)
    _close(golden, "text_masks_out", left.text_mask.float())
    _close(golden, "image_reduced", image_in[0])
    golden.compare("image_masks_out", left.image_mask.long())
