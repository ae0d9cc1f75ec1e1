"""FastV against pkunlp-icler/FastV (KV-cache version): end to end on the tiny Llama."""

from __future__ import annotations

from pathlib import Path

import torch

import foveate

from . import LOGIT_TOLERANCE, Golden, answer, positions, tiny_llama, visual_slots


class _Row(foveate.Reducer):
    """Reads the attention of the last token, head by head, and removes nothing."""

    def __init__(self, layer: int):
        self.stages, self.taps = (layer,), {layer: foveate.TapSpec(queries="last", heads="none")}

    def decide(self, view: foveate.View) -> None:
        self.weights = view.tap.per_slot(view.active.shape[1])[0]


def check(path: Path) -> None:
    """Compare everything in one file of `goldens/fastv`."""
    golden = Golden(path)
    model = tiny_llama.load(path.parent)
    visual = visual_slots(path.parent)
    embeds, layer = golden["inputs_embeds"], golden.scalar("K")
    with foveate.apply(model, _Row(layer - 1), visual=visual) as session, torch.no_grad():
        model(inputs_embeds=embeds, use_cache=False)
    golden.compare("attention_row", session.reducer.weights, atol=1e-5)

    reducer = foveate.FastV(keep=golden.scalar("ratio"), layer=layer, faithful=True)
    with foveate.apply(model, reducer, visual=visual) as session:
        ours = answer(model, embeds, steps=len(golden["decode_logits"]))
    prefill, trace = ours.passes[0], session.trace
    golden.compare("n_kept_visual", trace.kept(layer - 1).sum())
    golden.compare("keep_idx", trace.active(layer - 1)[0].nonzero()[:, 0])
    golden.compare("keep_idx", positions(model, prefill.cosines[layer]))
    golden.compare("layer_in_len", prefill.lengths)
    # The official code runs layer K - 1 twice, the first time for its attention only, and caches its keys both times.
    doubled = [2 * stored if i == layer - 1 else stored for i, stored in enumerate(ours.stored)]
    assert ours.stored[layer - 1] == embeds.shape[1]
    golden.compare("kv_len", doubled)
    golden.compare("logits_last", ours.logits[-1], atol=LOGIT_TOLERANCE)
    golden.compare("greedy_tokens", ours.tokens)
    golden.compare("decode_logits", ours.decode_logits, atol=LOGIT_TOLERANCE)
    golden.compare("decode_position_last_layer", positions(model, ours.passes[-1].cosines[-1]))
    golden.finish()
