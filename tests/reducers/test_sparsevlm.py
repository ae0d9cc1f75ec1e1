"""SparseVLM in whole models: against attention maps of the unpatched model, row by row, and at its edges."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import foveate
from foveate.reducers import sparsevlm
from foveate.reduction import View
from tests import families
from tests.reference.checks import assert_exact, build_once, greedy, largest
from tests.reference.masked import MaskedReference
from tests.reference.renumbered import decoder_inputs

VARIANTS = ["1.5", "1.0", "2.0", "paper"]


def llama(layers: int = 6, heads: int = 4, kv_heads: int = 2, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=50, max_position_embeddings=4096, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompt(visual_tokens: int, before: int = 3, after: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Embeddings (1, S, 64) and visual slots (1, S)."""
    length = before + visual_tokens + after
    slots = torch.arange(length)[None]
    embeds = torch.randn(1, length, 64, generator=torch.Generator().manual_seed(seed))
    return embeds, (slots >= before) & (slots < before + visual_tokens)


def prefill(model, reducer: foveate.Reducer, embeds: Tensor, visual: Tensor, **kwargs) -> tuple[Tensor, foveate.Trace]:
    with foveate.apply(model, reducer, visual=visual) as session, torch.no_grad():
        logits = model(inputs_embeds=embeds, **kwargs).logits
    return logits, session.trace


# ------------------------------------------------------------------------------------------ what is chosen, and why
@torch.no_grad()
def expected_scores(name: str, inputs: dict, layer: int) -> Tensor:
    """(B, S): attention of the raters, mean of heads and raters, row by row from the maps of the unpatched model."""
    model = build_once(name, "eager")
    embeds = decoder_inputs(model, inputs)
    maps = model(**inputs, output_attentions=True).attentions[layer].mean(1)
    visual, scores = families.visual_slots(inputs["input_ids"]), torch.zeros(inputs["input_ids"].shape)
    for b, row in enumerate(visual):
        image, text = row.nonzero()[:, 0], torch.arange(int(row.nonzero()[-1]) + 1, len(row))
        relevance = (embeds[b, image] @ embeds[b, text].T).softmax(-1).mean(0)
        scores[b] = maps[b, text[relevance > relevance.mean()]].mean(0)
    return scores


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_5_vl", "gemma3"])
def test_it_keeps_what_the_raters_look_at(name: str):
    model = build_once(name)
    inputs = families.inputs(name, model, batch=2)
    visual = families.visual_slots(inputs["input_ids"])
    reducer = foveate.SparseVLM(counts=(5,), layers=(1,), recycle=False)
    scores = expected_scores(name, inputs, 1)
    removed = visual.clone()
    for row in range(2):
        best = scores[row].masked_fill(~visual[row], -1).argsort(descending=True)[:5]
        removed[row, best] = False
    trace = assert_exact(model, inputs, {1: removed}, reducer)
    torch.testing.assert_close(trace.scores(1)[visual], scores[visual], atol=1e-5, rtol=1e-3)


def test_merged_tokens_are_what_a_hook_would_have_written():
    """Engine and reducer together, against the unpatched model in which two slots are overwritten by hand."""
    model = build_once("llava")
    inputs = families.inputs("llava", model, batch=2)
    seen: dict[str, Tensor] = {}

    class Watched(foveate.SparseVLM):
        def decide(self, view: View) -> foveate.Decision | None:
            decision = super().decide(view)
            if decision is not None:
                seen.update(keep=decision.keep, slots=decision.slots, values=decision.values, origin=decision.origin)
                seen.update(hidden=view.hidden.clone(), chosen=self.select(view).chosen)
            return decision

    reducer = Watched(counts=(6,), layers=(1,), details={"tau": 0.9, "theta": 0.2})
    with foveate.apply(model, reducer) as session, torch.no_grad():
        model(**inputs)
    visual = families.visual_slots(inputs["input_ids"])
    # 10 of 16 removed, 10 clustered, 3 clusters.
    assert (seen["keep"] & visual).sum(1).tolist() == [9, 9]
    for row in range(2):
        for slot, value in zip(seen["slots"][row].tolist(), seen["values"][row]):
            members = (seen["origin"][row] == slot).nonzero()[:, 0]
            assert slot in members.tolist()
            assert not seen["chosen"][row, members].any()
            torch.testing.assert_close(seen["hidden"][row, members].mean(0), value, atol=1e-5, rtol=1e-5)
    assert torch.equal(session.trace.kept(1), seen["keep"] & visual)

    def merge(hidden: Tensor) -> Tensor:
        return hidden.scatter(1, seen["slots"][..., None].expand_as(seen["values"]), seen["values"])

    removed = {1: visual & ~seen["keep"]}
    assert_exact(model, inputs, removed, reducer, MaskedReference(model, removed, {1: merge}))


def test_2_0_is_exact_too():
    model = build_once("llava")
    inputs = families.inputs("llava", model, batch=2)
    reducer = foveate.SparseVLM(keep=0.4, variant="2.0")
    with foveate.apply(model, reducer) as session, torch.no_grad():
        model(**inputs)
    visual = families.visual_slots(inputs["input_ids"])
    kept = {stage: session.trace.kept(stage) for stage in session.reducer.stages[1:]}
    stages = list(kept)
    before = [visual, *kept.values()]
    removed = {stage: before[i] & ~kept[stage] for i, stage in enumerate(stages)}
    assert_exact(model, inputs, removed, reducer)


# ------------------------------------------------------------------------------------------------ batches and images
def singles(inputs: dict, row: int) -> dict:
    start = int(inputs["attention_mask"][row].argmax())
    one = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    return {name: value[row : row + 1, start:] for name, value in one.items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("images", [[1, 1, 1], [2, 1, 3]])
def test_batch_equals_singles(variant: str, images: list[int]):
    model = build_once("llava")
    inputs = families.inputs("llava", model, batch=3, images=images)
    pixels = inputs["pixel_values"].split(images)
    reducer = foveate.SparseVLM(keep=0.45, variant=variant, details={"tau": 0.6, "theta": 0.3})
    with foveate.apply(model, reducer) as session, torch.no_grad():
        together = model(**inputs).logits[:, -1]
        trace = session.trace
        for row in range(3):
            alone = model(**singles(inputs, row), pixel_values=pixels[row]).logits[0, -1]
            assert torch.equal(session.trace.visual_tokens[0], trace.visual_tokens[row])
            length = session.trace.visual.shape[1]
            for stage in session.reducer.stages:
                assert torch.equal(session.trace.kept(stage)[0], trace.kept(stage)[row, -length:])
            torch.testing.assert_close(alone, together[row], atol=5e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_of_different_size(variant: str):
    model = build_once("qwen2_5_vl")
    inputs = families.inputs("qwen2_5_vl", model, batch=3)
    tokens = families.visual_slots(inputs["input_ids"]).sum(1)
    assert len(set(tokens.tolist())) > 1
    with foveate.apply(model, foveate.SparseVLM(keep=0.5, variant=variant)) as session, torch.no_grad():
        model(**inputs)
    if variant in ("1.5", "2.0"):  # the others have a rank that is a floor for so few tokens
        torch.testing.assert_close(session.trace.mean_visual_tokens_after, 0.5 * tokens.double(), atol=0.3, rtol=0.02)
    assert (session.trace.visual_tokens[:, -1] < tokens).all()


def test_a_count_is_per_image():
    model = build_once("llava")
    inputs = families.inputs("llava", model, batch=2, images=[1, 2])
    with foveate.apply(model, foveate.SparseVLM(keep=8)) as session, torch.no_grad():
        model(**inputs)
    assert session.trace.mean_visual_tokens_after.tolist() == pytest.approx([8, 16], abs=0.3)


def test_a_row_without_image():
    model = build_once("llava")
    inputs = families.inputs("llava", model, batch=2, images=[0, 1])
    untouched = model(**inputs).logits
    with foveate.apply(model, foveate.SparseVLM(keep=0.3)) as session, torch.no_grad():
        logits = model(**inputs).logits
    assert session.trace.visual_tokens[0].tolist() == [0] * families.N_LAYERS
    tokens = inputs["attention_mask"][0].bool()
    assert largest((logits - untouched)[0, tokens]) <= 2e-5


@pytest.mark.slow
# -------------------------------------------------------------------------------------------------- every model
@pytest.mark.parametrize("name", families.FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs_on_every_family(name: str, variant: str):
    model = build_once(name)
    inputs = families.inputs(name, model, batch=2)
    with foveate.apply(model, foveate.SparseVLM(keep=0.4, variant=variant)) as session:
        _, logits = greedy(model, inputs, steps=2)
    assert logits.isfinite().all()
    last = session.trace.visual_tokens[:, -1]
    assert ((last >= 1) & (last < session.trace.visual_tokens[:, 0])).all()


def test_eager_attention_and_sdpa_agree():
    inputs = families.inputs("llava", build_once("llava"))
    logits = []
    for implementation in ("sdpa", "eager"):
        model = build_once("llava", implementation)
        with foveate.apply(model, foveate.SparseVLM(keep=0.4)), torch.no_grad():
            logits.append(model(**inputs).logits[:, -1])
    torch.testing.assert_close(*logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_kept_is_bitwise_the_model(variant: str):
    model = build_once("llava")
    inputs = families.inputs("llava", model)
    expected = greedy(model, inputs, steps=3)
    for keep in (1.0, 16, 1000):
        with foveate.apply(model, foveate.SparseVLM(keep=keep, variant=variant)):
            actual = greedy(model, inputs, steps=3)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def test_it_can_be_trained_through():
    model, (embeds, visual) = llama(), prompt(40)
    embeds.requires_grad_(True)
    labels = torch.full(visual.shape, -100)
    labels[:, -4:] = 7
    with foveate.apply(model, foveate.SparseVLM(keep=0.3), visual=visual):
        model(inputs_embeds=embeds, labels=labels).loss.backward()
    assert embeds.grad.isfinite().all()
    assert (embeds.grad[0, visual[0]].abs().sum(1) > 0).any()


# --------------------------------------------------------------------------------------------------------- schedule
@pytest.mark.parametrize(
    ("variant", "left"), [("1.5", [[309, 204, 113], [82, 32, 18]]), ("2.0", [[300, 200, 118], [66, 34, 20]])]
)
def test_the_official_counts_on_32_layers(variant: str, left: list[list[int]]):
    model, (embeds, visual) = llama(32), prompt(576)
    for keep, counts in ((192, left[0]), (1 / 3, left[0]), (64, left[1])):
        _, trace = prefill(model, foveate.SparseVLM(keep=keep, variant=variant), embeds, visual)
        first, second, third = counts
        assert trace.visual_tokens[0].tolist() == [576] * 3 + [first] * 4 + [second] * 9 + [third] * 16


@pytest.mark.parametrize(("layers", "tokens", "keep"), [(16, 2880, 64), (24, 1280, 192), (28, 144, 0.2), (40, 576, 96)])
@pytest.mark.parametrize("variant", ["1.5", "2.0"])
def test_the_budget_is_met_in_models(variant: str, layers: int, tokens: int, keep: int | float):
    _, trace = prefill(llama(layers), foveate.SparseVLM(keep=keep, variant=variant), *prompt(tokens))
    target = keep if isinstance(keep, int) else keep * tokens
    assert trace.mean_visual_tokens_after.item() == pytest.approx(target, rel=0.02)


@pytest.mark.parametrize("variant", ["1.0", "paper"])
@pytest.mark.parametrize("keep", [64, 192, 0.5])
def test_rank_rules_come_near_the_budget(variant: str, keep: int | float):
    _, trace = prefill(llama(16), foveate.SparseVLM(keep=keep, variant=variant), *prompt(576))
    target = keep if isinstance(keep, int) else keep * 576
    assert trace.mean_visual_tokens_after.item() == pytest.approx(target, rel=0.05)


def test_the_paper_deletes_a_share_of_what_exceeds_the_rank():
    reducer = foveate.SparseVLM(variant="paper", lam=0.5, layers=(1,), recycle=False, details={"rank_rows": "raters"})
    model, (embeds, visual) = llama(), prompt(60)
    _, trace = prefill(model, reducer, embeds, visual)
    text = embeds[0, 63:]
    relevance = (embeds[0, 3:63] @ text.T).softmax(-1).mean(0)
    rank = int((relevance >= relevance.mean()).sum())
    assert trace.visual_tokens[0, -1] == 60 - int(0.5 * (60 - rank))


def test_faithful_layers_and_counts_at_any_depth():
    model, (embeds, visual) = llama(6), prompt(576)
    reducer = foveate.SparseVLM(keep=192, faithful=True)
    _, trace = prefill(model, reducer, embeds, visual)
    assert trace.stages == [-1, 2]
    assert trace.visual_tokens[0].tolist() == [576] * 3 + [309] * 3
    # Fewer visual tokens than the table wants: one goes, and comes back merged.
    _, trace = prefill(model, reducer, *prompt(50))
    assert trace.visual_tokens[0].tolist() == [50] * 6
    assert trace.kv_lengths == [65] * 6
    _, trace = prefill(model, foveate.SparseVLM(keep=192, faithful=True, variant="1.0", scale=2.0), embeds, visual)
    assert trace.visual_tokens[0, -1] < 50
    _, trace = prefill(llama(20), foveate.SparseVLM(keep=192, faithful=True, variant="1.0"), *prompt(50))
    assert trace.stages == [-1, 2, 6, 15, 19]


def test_a_command_line_makes_the_variant_a_number():
    for number in (1.0, 1.5, 2.0):
        assert foveate.SparseVLM(keep=64, variant=number).variant == str(number)


def test_faithful_2_0_needs_14_heads():
    embeds, visual = prompt(576)
    with pytest.raises(foveate.UnsupportedError, match="14 heads"):
        foveate.apply(llama(), foveate.SparseVLM(keep=192, variant="2.0", faithful=True), visual=visual)
    _, trace = prefill(
        llama(heads=16, kv_heads=4), foveate.SparseVLM(keep=192, variant="2.0", faithful=True), embeds, visual
    )
    assert trace.visual_tokens[0].tolist() == [576] * 3 + [300] * 3


def test_renumbering_is_refused_with_multi_axis_positions():
    with pytest.raises(foveate.UnsupportedError, match="positions"):
        foveate.apply(build_once("qwen2_5_vl"), foveate.SparseVLM(keep=192, faithful=True))


# ------------------------------------------------------------------------------------------------------------ edges
def test_no_rater_and_no_text_behind_the_image():
    model, (embeds, visual) = llama(), prompt(40)
    same = embeds.clone()
    same[:, 43:] = same[:, 43:44]  # all words alike
    for given, slots in ((same, visual), (embeds[:, :43], visual[:, :43]), (embeds[:, :44], visual[:, :44])):
        logits, trace = prefill(model, foveate.SparseVLM(keep=0.3), given, slots)
        assert logits.isfinite().all()
        assert trace.active(5)[0, -1]
        assert trace.mean_visual_tokens_after.item() == pytest.approx(12, abs=0.3)


def test_gravity_beyond_the_change_of_sign():
    model, (embeds, visual) = llama(4), prompt(2500)
    _, trace = prefill(model, foveate.SparseVLM(keep=0.2, variant="2.0"), embeds, visual)
    scores = trace.scores(2)[visual]
    assert scores.isfinite().all()
    assert (scores >= 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {"details": {"merge": "sum"}},
        {"details": {"assignment": "cosine"}},
        {"details": {"isolation": "token"}},
        {"details": {"normalise": False}},
        {"details": {"neighbours": 3}},
        {"details": {"rater_threshold": "greater_equal"}},
        {"details": {"score_rows": "text"}},
        {"variant": "1.0", "details": {"rank_rows": "text"}, "bias": 2},
        {"variant": "2.0", "recycle": True, "details": {"head_share": 0.25, "gravity_floor": 0.2}},
        {"positions": "renumber"},
        {"layers": (0.2, 3)},
        {"layers": "1,3", "counts": "20,10"},
        {"variant": 1.5},
    ],
)
def test_every_option_does_something_sane(options: dict):
    model, (embeds, visual) = llama(), prompt(60)
    logits, trace = prefill(model, foveate.build("sparsevlm", keep=0.4, **options), embeds, visual)
    assert logits.isfinite().all()
    assert 1 <= trace.visual_tokens[0, -1] < 60


@pytest.mark.parametrize(
    ("name", "value"), [("neighbours", 3), ("normalise", False), ("isolation", "token"), ("assignment", "cosine")]
)
def test_a_detail_of_the_clusters_reaches_them(name: str, value: object, monkeypatch: pytest.MonkeyPatch):
    asked, real = [], sparsevlm.density_peaks
    monkeypatch.setattr(sparsevlm, "density_peaks", lambda *args, **how: asked.append(how) or real(*args, **how))
    prefill(llama(), foveate.SparseVLM(keep=0.4, details={name: value}), *prompt(60))
    assert asked
    assert all(how[name] == value for how in asked)


def test_options_stay_as_given():
    reducer = foveate.SparseVLM(keep=0.3)
    before = dataclasses.asdict(reducer)
    results = [prefill(llama(depth), reducer, *prompt(60))[1].visual_tokens[0, -1] for depth in (6, 12, 6)]
    assert dataclasses.asdict(reducer) == before
    assert results[0] == results[2]
    assert reducer == foveate.SparseVLM(keep=0.3)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"variant": "3.0"}, "variant='3.0'"),
        ({"faithful": "yes"}, "faithful='yes'"),
        ({"faithful": True, "keep": 100}, "keep=100.*192, 128, 96, 64"),
        ({"faithful": True, "variant": "1.0", "keep": 96}, "keep=96.*192, 128, 64"),
        ({"faithful": True, "variant": "paper"}, "paper"),
        ({"faithful": True, "keep": 192, "layers": (3,)}, "layers"),
        ({"faithful": True, "keep": 192, "details": {"merge": "sum"}}, "merge='sum'"),
        ({"faithful": True, "keep": 192, "details": {"head_share": 0.9}}, "head_share=0.9"),
        ({"faithful": True, "keep": 192, "positions": "keep"}, "positions='keep'"),
        ({"layers": ()}, "layers"),
        ({"layers": (1, "x")}, "layers='x'"),
        ({"layers": "1,x"}, "layers='1,x'"),
        ({"counts": (0,)}, "counts"),
        ({"counts": (5,), "variant": "paper"}, "counts"),
        ({"details": {"tau": 0}}, "tau=0"),
        ({"details": {"theta": 1.5}}, "theta=1.5"),
        ({"details": {"neighbours": 0}}, "neighbours=0"),
        ({"details": {"merge": "max"}}, "merge='max'"),
        ({"details": {"taw": 0.3}}, "details has no 'taw'; it has: tau, theta"),
        ({"details": "tau"}, "details='tau': give a mapping"),
        ({"tau": 0.5}, r"no option 'tau', it belongs to details: details=\{tau: \.\.\.\}"),
        ({"recycle": 1}, "recycle=1"),
        ({"scale": 2.0}, "scale"),
        ({"lam": 0.5}, "lam"),
        ({"variant": "paper", "lam": 2}, "lam=2"),
        ({"details": {"head_share": 0.0}}, "head_share=0.0"),
        ({"details": {"gravity_floor": -1}}, "gravity_floor=-1"),
        ({"positions": "compact"}, "positions='compact'"),
    ],
)
def test_bad_options(options: dict, culprit: str):
    with pytest.raises(foveate.OptionError, match=culprit):
        foveate.build("sparsevlm", **options)


@pytest.mark.parametrize("keep", [0, 1.01, "abc", None, True])
def test_bad_budgets(keep: object):
    with pytest.raises(foveate.BudgetError, match="keep"):
        foveate.SparseVLM(keep=keep)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"layers": (2, 40)}, "layers=40.*6 decoder layers"),
        ({"keep": 0.3, "layers": (2,)}, "keep=0.3.*first 2"),
        ({"counts": (5, 4)}, "counts"),
    ],
)
def test_what_does_not_fit_the_model(options: dict, culprit: str):
    with pytest.raises(foveate.OptionError, match=culprit):
        foveate.apply(build_once("llava"), foveate.SparseVLM(**options))
