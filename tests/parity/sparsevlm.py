"""SparseVLM against Gumpest/SparseVLMs: raters, scores, rank rule, clusters, whole steps, and end to end."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import foveate
from foveate.engine.trace import Trace
from foveate.ops import attention, density_peaks, raters
from foveate.reducers.sparsevlm import Selection
from foveate.reduction import BEFORE_LAYERS, Decision, Tap, View

from . import Golden, answer, positions, tiny_llama, visual_slots

SCORES = {"atol": 1e-6, "rtol": 1e-4}
CORRECTED = {"atol": 1e-5, "rtol": 1e-3}
"""Where attention is divided by a weight that crosses zero."""
STATES = {"atol": 1e-4, "rtol": 1e-4}
THETA = 10000.0
_VERSIONS = {"1_0": "1.5", "2_0": "2.0", "v1_0rank": "1.0"}


def check(path: Path) -> None:
    """Compare everything in one file of `goldens/sparsevlm`; the kind of file is told by its name."""
    golden = Golden(path)
    kind = path.stem.partition("_")[0]
    checks: dict[str, Callable[[Golden], None]] = {
        "raters": _raters, "score": _score, "rank": _rank, "cluster": _cluster, "step": _step, "e2e": _end_to_end,
    }  # fmt: skip
    assert kind in checks, f"{path.name}: no check for this kind of file"
    checks[kind](golden)
    golden.finish()


class Recorded(foveate.SparseVLM):
    """Remembers what it saw and answered at each stage."""

    def prepare(self, anatomy: Any) -> None:
        super().prepare(anatomy)
        self.views: dict[int, View] = {}
        self.selections: dict[int, Selection] = {}
        self.decisions: dict[int, Decision] = {}

    def select(self, view: View) -> Selection:
        self.selections[view.stage] = super().select(view)
        return self.selections[view.stage]

    def decide(self, view: View) -> Decision | None:
        decision = super().decide(view)
        self.views[view.stage], self.decisions[view.stage] = view, decision
        return decision


# --------------------------------------------------------------------------------------------------- without a model
def _anatomy(heads: int, head_dim: int) -> Any:
    """As much of a model as SparseVLM asks for: LLaVA-1.5's depth and embedding."""

    def rotary(layer: int, hidden: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = raters.rope_table(int(at.max()) + 1, head_dim, THETA)
        return cos[at], sin[at]

    return SimpleNamespace(depth=32, heads=heads, head_dim=head_dim, mrope=False, rotary=rotary)


def _prompt(golden: Golden, length: int) -> tuple[Tensor, Tensor, int]:
    """Visual slots (1, S), all slots, and the first slot of the text behind the image."""
    start, n_visual = golden.scalar("v_token_start"), golden.scalar("n_visual")
    slots = torch.arange(length)
    return (
        ((slots >= start) & (slots < start + n_visual))[None],
        torch.ones(1, length, dtype=torch.bool),
        start + n_visual,
    )


def _read(golden: Golden, rows: Tensor, heads: str) -> Tap:
    """The attention rows of a layer with the queries and keys of the file."""
    query, key = golden["q"], golden["k"]
    seen = (torch.arange(query.shape[2]) <= rows[:, None])[None]
    weights = attention.attention_rows(query, key, rows[None], seen, None, query.shape[-1] ** -0.5, None)
    everything = torch.arange(query.shape[2])[None]
    weights = weights.mean(1) if heads == "mean" else weights
    return Tap(weights, torch.ones(1, len(rows), dtype=torch.bool), rows[None], everything)


def _run(
    golden: Golden, reducer: Recorded, layer: int, embeds: Tensor | None = None, states: Tensor | None = None
) -> View:
    """Let the reducer decide after `layer`; raters from `embeds` (1, S, C), or as the file names them."""
    length = golden["q"].shape[2]
    visual, tokens, text = _prompt(golden, length)
    assert golden.scalar("n_text") == length - text
    reducer.prepare(_anatomy(golden["q"].shape[1], golden["q"].shape[3]))
    given = torch.zeros(1, length, 4) if embeds is None else embeds
    view = View(BEFORE_LAYERS, given, tokens, visual, tokens)
    assert reducer.decide(view) is None
    if embeds is None:
        named = torch.zeros(1, length, dtype=torch.bool)
        named[0, golden["rater_idx"] + text] = True
        view.state["raters"], view.state["rows"] = named, {layer: named}
    else:
        golden.compare("rater_idx", view.state["raters"][0].nonzero()[:, 0] - text)
    wanted = reducer.taps[layer].queries(view.state)[0].nonzero()[:, 0]
    states = torch.zeros(1, length, 4) if states is None else states
    after = View(
        layer, states, tokens, visual, tokens, _read(golden, wanted, reducer.taps[layer].heads), state=view.state
    )
    reducer.decide(after)
    return after


def _kept(reducer: Recorded, layer: int, first: int) -> Tensor:
    """Numbers of the visual tokens that stay as they are."""
    return reducer.selections[layer].chosen[0].nonzero()[:, 0] - first


def _raters(golden: Golden) -> None:
    hidden, start, n_visual = golden["hidden_states"], golden.scalar("v_token_start"), golden.scalar("n_visual")
    visual, text = hidden[:, start : start + n_visual], hidden[:, start + n_visual :]
    valid = torch.ones(text.shape[:2], dtype=torch.bool)
    relevance = raters.text_relevance(visual, text, torch.ones(visual.shape[:2], dtype=torch.bool), valid)
    golden.compare("m_v_t", relevance, atol=1e-6)
    found, threshold = raters.rater_mask(relevance, valid, shared=True)
    assert (threshold == threshold[0]).all()
    golden.compare("threshold", threshold[0], atol=1e-7)
    golden.compare("min_margin", (relevance - threshold).abs().min(), atol=5e-8)
    golden.compare("rater_batch_idx", found.nonzero()[:, 0])
    golden.compare("rater_idx", found.nonzero()[:, 1])
    # Through the reducer too, which sees the whole batch.
    slots = torch.arange(hidden.shape[1])
    image = ((slots >= start) & (slots < start + n_visual)).expand(len(hidden), -1)
    reducer, tokens = Recorded(keep=192, faithful=True), torch.ones_like(image)
    reducer.prepare(_anatomy(16, 4))
    view = View(BEFORE_LAYERS, hidden, tokens, image, tokens)
    reducer.decide(view)
    golden.compare("rater_idx", view.state["raters"].nonzero()[:, 1] - start - n_visual)


def _gap(scores: Tensor, kept: int) -> Tensor:
    """How far the last kept token is above the first removed one, relative to itself."""
    best = scores.double().sort(descending=True).values
    return (best[kept - 1] - best[kept]) / best[kept - 1].abs()


def _score(golden: Golden) -> None:
    version, keep = re.fullmatch(r"score_topk_v(\d_\d)_(\d+)", golden.path.stem).groups()
    variant, first = _VERSIONS[version], golden.scalar("v_token_start")
    for layer in (2, 6, 15):
        reducer = Recorded(keep=int(keep), variant=variant, faithful=True)
        view = _run(golden, reducer, layer)
        scores = reducer.selections[layer].scores[view.visual]
        golden.compare("visual_score", scores[None], **(CORRECTED if variant == "2.0" else SCORES))
        kept = _kept(reducer, layer, first)
        golden.compare(f"kept_idx_L{layer}", kept)
        golden.compare(f"boundary_gap_L{layer}", _gap(scores, len(kept)), atol=1e-5)
        golden.compare(f"s_flag_L{layer}", len(kept) < int(view.visual.sum()))
    if variant == "2.0":
        length, dim = view.visual.shape[1], golden["q"].shape[-1]
        ones, slots = raters.rotated_ones(*raters.rope_table(length, dim, THETA), dim), torch.arange(length)[None]
        golden.compare("rope_weights_row_last", raters.gravity_weights(ones, slots[:, -1:], slots)[0, 0], atol=1e-6)
        gravity = raters.gravity_weights(ones, view.tap.query_slots, slots)[:, None]
        corrected = (view.tap.weights / gravity)[0, ..., view.visual[0]]
        golden.compare("gravity_corrected_P", corrected.mean(1), **CORRECTED)
        golden.compare("head_sums", corrected.sum((1, 2)), atol=1e-3, rtol=1e-3)
        golden.compare("selected_heads", reducer.select_heads(view)[1][0])


def _rank(golden: Golden) -> None:
    first, names = golden.scalar("v_token_start"), list(golden.arrays)
    rules = [re.fullmatch(r"kept_idx_scale([\d.]+)_bias([\d.-]+)", name) for name in names]
    cases = [(name.group()[9:], float(name[1]), float(name[2])) for name in rules if name]
    for suffix, scale, bias in [*cases, ("video", 1.0, 0.0)]:
        reducer = Recorded(variant="1.0", faithful=True, scale=scale, bias=bias)
        view = _run(golden, reducer, 2)
        kept = _kept(reducer, 2, first)
        golden.compare(f"kept_idx_{suffix}", kept)
        if suffix != "video":
            golden.compare(f"s_flag_{suffix}", len(kept) < int(view.visual.sum()))
    tap, visual = reducer.attention(view), view.visual
    golden.compare("P", tap.weights[..., visual[0]], **SCORES)
    rank, values, tolerance = raters.matrix_rank(tap.weights, tap.row_valid, visual)
    golden.compare("rank", rank)
    golden.compare("singular_values", values, atol=1e-5)
    golden.compare("tol_default", tolerance[0], atol=1e-8)
    golden.compare("visual_score", reducer.selections[2].scores[visual][None], **SCORES)
    for name in names:
        if name.startswith("paper_eq8_N_lambda"):
            golden.compare(name, float(name.rpartition("lambda")[2]) * (int(visual.sum()) - int(rank)), rtol=1e-6)


def _cluster(golden: Golden) -> None:
    tokens, count = golden["x"], golden["cluster_num"]
    valid = torch.ones(tokens.shape[:2], dtype=torch.bool)
    counts = count.expand(len(tokens))
    found = density_peaks.density_peaks(tokens, valid, counts, int(count), noise=golden["noise_uniform"], guarded=False)
    golden.compare("density", found.density, atol=1e-5)
    golden.compare("delta", found.delta, atol=1e-4)
    golden.compare("score", found.score, atol=1e-4)
    golden.compare("center_idx", found.centres)
    golden.compare("assignment", found.assignment)
    golden.compare("merged", density_peaks.merge_clusters(tokens, valid, found), **STATES)


def _step(golden: Golden) -> None:
    variant = _VERSIONS[re.fullmatch(r"step_(1_0|2_0|v1_0rank)_\d+", golden.path.stem)[1]]
    if variant == "1.0":
        options = {"scale": golden.scalar("scale"), "bias": golden.scalar("bias")}
    else:
        options = {"counts": tuple(golden["counts"].tolist())}
    reducer, layer = Recorded(variant=variant, faithful=True, **options), golden.scalar("layer_idx")
    states, first = golden["layer_hidden_out"], golden.scalar("v_token_start")
    view = _run(golden, reducer, layer, embeds=golden["h_embed"], states=states)
    selection, decision = reducer.selections[layer], reducer.decisions[layer]
    golden.compare("visual_score", selection.scores[view.visual][None], **(CORRECTED if variant == "2.0" else SCORES))
    golden.compare("kept_visual_idx", _kept(reducer, layer, first))
    if variant == "1.0":
        golden.compare("rank", reducer._rank(view, reducer.attention(view)))
    frame, keep = states.clone(), decision.keep[0]
    if variant != "2.0":
        golden.compare("cluster_num", selection.clusters[0])
        recycled = selection.members[0] - first
        golden.compare("recycled_visual_idx", recycled)
        pruned = (view.visual & ~selection.chosen)[0].nonzero()[:, 0] - first
        golden.compare("recycled_idx_in_pruned_list", torch.searchsorted(pruned, recycled))
        golden.compare("merged", reducer.merge_tokens(view, *selection[2:]).states, **STATES)
        frame[0, decision.slots[0]] = decision.values[0]
    golden.compare("hidden_out", frame[:, keep], **STATES)
    length = int(keep.sum())
    before, after = golden["position_ids_in"], reducer.positions == "renumber"
    assert torch.equal(before[0], torch.arange(before.shape[1]))
    golden.compare("position_ids_out", torch.arange(length)[None] if after else keep.nonzero()[:, 0][None])
    left = int((keep & view.visual[0]).sum())
    golden.compare("new_v_token_num", left)
    golden.compare("new_text_start", first + left)


# ------------------------------------------------------------------------------------------------------- end to end
def _end_to_end(golden: Golden) -> None:
    variant, rest = re.fullmatch(r"e2e_v(1_5|2_0|1_0)_(?:rank_)?(\w+)", golden.path.stem).groups()
    variant = variant.replace("_", ".")
    if variant == "1.0":
        options = {"scale": golden.scalar("scale"), "bias": golden.scalar("bias")}
    else:
        options = {"keep": int(rest)}
    model, visual = tiny_llama.load(golden.path.parent), visual_slots(golden.path.parent)
    reducer = Recorded(variant=variant, faithful=True, **options)
    with foveate.apply(model, reducer, visual=visual) as session:
        reducer = session.reducer
        ours = answer(model, golden["inputs_embeds"], steps=len(golden["decode_logits"]))
    first, text = int(visual[0].nonzero()[0]), int(visual[0].nonzero()[-1]) + 1
    prefill, layers = ours.passes[0], sorted(reducer.selections)
    golden.compare("raters", reducer.views[layers[0]].state["raters"][0].nonzero()[:, 0] - text)
    kept = [reducer.selections[layer].chosen.sum() for layer in layers]
    golden.compare("kept_counts", torch.stack(kept))
    golden.compare("layer_in_len", prefill.lengths)
    golden.compare("kv_len", ours.stored)
    golden.compare("kv_len", session.trace.kv_lengths)
    final = session.trace.active(layers[-1])[0]
    golden.compare("logits_all", ours.logits[final], **STATES)
    golden.compare("logits_last", ours.logits[-1], **STATES)
    golden.compare("greedy_tokens", ours.tokens)
    golden.compare("decode_logits", ours.decode_logits, **STATES)
    identity, ranks, gaps = torch.arange(visual.shape[1]) - first, [], []
    for layer in layers:
        view, selection, decision = reducer.views[layer], reducer.selections[layer], reducer.decisions[layer]
        here = view.active_visual[0]
        scores = selection.scores[0, here]
        golden.compare(f"score_L{layer}", scores, **(CORRECTED if variant == "2.0" else SCORES))
        golden.compare(f"kept_local_L{layer}", selection.chosen[0, here].nonzero()[:, 0])
        tap = reducer.attention(view)
        matrix = tap.to_slots(tap.weights, visual.shape[1])
        ranks.append(raters.matrix_rank(matrix, tap.row_valid, view.active_visual)[0])
        gaps.append(_gap(scores, int(selection.chosen.sum())))
        identity = _identities(identity, decision, selection, layer)
        after = decision.keep[0] & view.visual[0]
        golden.compare(f"visual_slots_after_L{layer}", identity[after])
        _check_trace(session.trace, layer, identity, after, first)
        if variant == "2.0":
            golden.compare(f"heads_L{layer}", reducer.select_heads(view)[1][0])
        else:
            merged = decision.values[0, int(selection.chosen.sum()) :]
            golden.compare(f"merged_L{layer}", merged, **STATES)
        if layer + 1 < len(prefill.hidden):
            entering = prefill.hidden[layer + 1][0, first : first + int(after.sum())]
            golden.compare(f"hidden_in_L{layer + 1}", entering, **STATES)
            at = positions(model, prefill.cosines[layer + 1])
            golden.compare(f"position_ids_L{layer + 1}", at)
    golden.compare("rank_P", torch.cat(ranks))
    golden.compare("boundary_gap", torch.stack(gaps), atol=3e-5)
    for step, decoded in enumerate(ours.passes[1:]):
        counted = [n + step if reducer.positions == "renumber" else visual.shape[1] + step for n in ours.stored]
        assert [int(positions(model, cosines)) for cosines in decoded.cosines] == counted


def _identities(before: Tensor, decision: Decision, selection: Selection, layer: int) -> Tensor:
    """(S,) which original patch is in each slot: its number, -(layer + 1) for a token merged after `layer`."""
    if decision.slots is None:
        return before
    kept = selection.chosen[0].nonzero()[:, 0]
    after = before.clone()
    after[decision.slots[0]] = -(layer + 1)
    after[decision.origin[0, kept]] = before[kept]
    return after


def _check_trace(trace: Trace, layer: int, identity: Tensor, after: Tensor, first: int) -> None:
    """What stays as it is stands for itself in the trace, and there is one mark for each token that is left."""
    assert int(trace.kept(layer).sum()) == int(after.sum())
    own = identity[after][identity[after] >= 0] + first
    assert torch.equal(trace.origins(layer)[0, own], own)
