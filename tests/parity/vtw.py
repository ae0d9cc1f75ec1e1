"""VTW against lzhxmu/VTW: end to end on the tiny Llama, the search for the layer, and its KL expression."""

from __future__ import annotations

from pathlib import Path

import torch

import foveate
from foveate.tune import choose_layer, next_token_divergence, withdrawal_curve

from . import LOGIT_TOLERANCE, Golden, answer, positions, tiny_llama, visual_slots


def check(path: Path) -> None:
    """Compare everything in one file of `goldens/vtw`."""
    golden = Golden(path)
    if "kl_per_sample" in golden:
        _search(golden)
    elif "kl" in golden:
        _divergence(golden)
    else:
        _end_to_end(golden)
    golden.finish()


def _end_to_end(golden: Golden) -> None:
    model = tiny_llama.load(golden.path.parent)
    visual = visual_slots(golden.path.parent)
    if "K" in golden:
        layer = golden.scalar("K")
        shifted = golden.path.stem.endswith("shift")
        reducer = foveate.VTW(layer=layer, positions="renumber" if shifted else "keep", faithful=True)
    else:
        reducer = foveate.VTW(keep=1.0)
    with foveate.apply(model, reducer, visual=visual):
        ours = answer(model, golden["inputs_embeds"], steps=len(golden["decode_logits"]))
    prefill = ours.passes[0]
    golden.compare("layer_in_len", prefill.lengths)
    golden.compare("kv_len", ours.stored)
    golden.compare("logits_last", ours.logits[-1], atol=LOGIT_TOLERANCE)
    golden.compare("greedy_tokens", ours.tokens)
    golden.compare("decode_logits", ours.decode_logits, atol=LOGIT_TOLERANCE)
    if "K" in golden:
        golden.compare("logits_all", ours.logits[~visual[0]], atol=LOGIT_TOLERANCE)
        golden.compare("hidden_in_K", prefill.hidden[layer][0], atol=LOGIT_TOLERANCE)
        golden.compare("position_ids_at_K", positions(model, prefill.cosines[layer]))
        for step, decoded in enumerate(ours.passes[1:]):
            logical = visual.shape[1] + step
            expected = [
                logical - int(visual.sum()) if shifted and i >= layer else logical for i in range(len(ours.stored))
            ]
            assert [int(positions(model, cosines)) for cosines in decoded.cosines] == expected


def _search(golden: Golden) -> None:
    model = tiny_llama.load(golden.path.parent)
    visual = visual_slots(golden.path.parent)
    embeds, layers = golden["inputs_embeds"], golden["layers"].tolist()
    batches = [{"inputs_embeds": sample[None]} for sample in embeds]
    curve = withdrawal_curve(model, batches, first_layer=layers[0], visual=visual)
    golden.compare("layers", list(range(layers[0], layers[0] + curve.shape[1])))
    golden.compare("kl_per_sample", curve, atol=1e-4)
    golden.compare("kl_mean", curve.mean(0), atol=1e-4)
    chosen = [choose_layer(curve, eta, first_layer=layers[0]) for eta in golden["eta"].tolist()]
    golden.compare("selected_K", [-1 if layer is None else layer for layer in chosen])
    with torch.no_grad():
        full = model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits[:, -1]
        golden.compare("full_logits_last", full, atol=LOGIT_TOLERANCE)
        withdrawn = []
        for layer in layers:
            with foveate.apply(model, foveate.VTW(layer=layer, faithful=True), visual=visual.expand(len(embeds), -1)):
                withdrawn.append(model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits[:, -1])
    golden.compare("vtw_logits_last", torch.stack(withdrawn, 1), atol=LOGIT_TOLERANCE)


def _divergence(golden: Golden) -> None:
    full, withdrawn = golden["full_logits"], golden["vtw_logits"]
    ours = next_token_divergence(withdrawn, full[:, -1]).mean(1)
    golden.compare("kl", ours, atol=1e-3 if full.dtype == torch.float16 else 1e-5)
