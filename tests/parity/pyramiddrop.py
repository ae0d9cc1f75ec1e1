"""PyramidDrop against Cooperx521/PyramidDrop: end to end on the tiny Llama."""

from __future__ import annotations

from pathlib import Path

import foveate
from foveate.reducers.pyramiddrop import PyramidDrop

from . import LOGIT_TOLERANCE, Golden, answer, positions, tiny_llama, visual_slots


def check(path: Path) -> None:
    """Compare everything in one file of `goldens/pyramiddrop`."""
    golden = Golden(path)
    model = tiny_llama.load(path.parent)
    visual = visual_slots(path.parent)
    start, tokens = golden.scalar("image_start"), golden.scalar("image_tokens")
    assert visual[0].nonzero()[:, 0].tolist() == list(range(start, start + tokens))
    assert int((~visual).sum()) == golden.scalar("prompt_len")
    layers, ratios = golden["layer_list"].tolist(), golden["ratio_list"].tolist()
    reducer = PyramidDrop(layers=layers, ratios=ratios, faithful=True)
    with foveate.apply(model, reducer, visual=visual) as session:
        ours = answer(model, golden["inputs_embeds"], steps=len(golden["decode_logits"]))
    assert sum(name.startswith("kept_stage") for name in golden.arrays) == len(layers)
    for stage, layer in enumerate(layers):
        golden.compare(f"kept_stage{stage}", session.trace.active(layer - 1)[0].nonzero()[:, 0])
    # The ranking itself passes the norm of each of these layers once, with all tokens, before the layer does.
    lengths = iter(ours.passes[0].lengths)
    before_layer = [(next(lengths) if layer in layers else None, next(lengths)) for layer in range(len(ours.stored))]
    assert next(lengths, None) is None
    golden.compare("layer_in_len", [entered for _, entered in before_layer])
    golden.compare("kv_len", ours.stored)
    golden.compare("logits_last", ours.logits[-1], atol=LOGIT_TOLERANCE)
    golden.compare("greedy_tokens", ours.tokens)
    golden.compare("decode_logits", ours.decode_logits, atol=LOGIT_TOLERANCE)
    golden.compare("decode_position_last_layer", positions(model, ours.passes[-1].cosines[-1]))
    golden.finish()
