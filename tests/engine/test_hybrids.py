"""Decoders whose layers are not all plain attention: recurrent layers, shared keys, copies of the hidden states.

What counts as exact: a recurrent layer runs on the shorter sequence, attention does not look at what was removed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from tests import catalogue
from tests.catalogue.count import Reference, judge, recorded
from tests.families import DECODER, spread_weights
from tests.reference.checks import footprint, largest
from tests.reference.masked import MaskedReference
from tests.reference.plans import Fixed, KeepAll, Watch
from tests.reference.short import ShortReference
from torch import Tensor

import foveate
from foveate.engine.compat import CACHE_NAME, returned_cache
from foveate.reduction import Decision, View

TOLERANCE = 1e-3
"""Of logits: a delta rule in a batch and alone differs by some 1e-4 in float32."""
SHARED = {"num_kv_shared_layers": 2}
MODELS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "qwen3_5": ("qwen3_5", {}),
    "qwen3_5_moe": ("qwen3_5_moe", {}),
    "minicpmv4_6": ("minicpmv4_6", {}),
    "lfm2_vl": ("lfm2_vl", {}),
    "lfm3_vl": ("lfm3_vl", {}),
    "nemotron_h_omni": ("nemotron_h_omni", {}),
    "gemma4_shared": ("gemma4", SHARED),
    "gemma4_shared_window": ("gemma4", {**SHARED, "sliding_window": 12}),
    "inkling": ("inkling_mm_model", {}),
    "inkling_window": ("inkling_mm_model", {"sliding_window_size": 12}),
    "inkling2": ("inkling2", {}),
    "inkling2_window": ("inkling2", {"sliding_window_size": 12}),
    "qwen4_exp": ("qwen4_exp", {}),
    "qwen4_exp_small_index": ("qwen4_exp", {"indexer_budget": 8}),
    "qwen4_exp_ngrams": ("qwen4_exp", {"ple_layer_ids": [1, 5], "eos_token_id": 2}),
    # Many heads, or the index would find many tokens equally good: none.
    "dots3_small_index": ("dots3_note", {"index_topk": 8, "index_n_heads": 32}),
    # An index over pools of neighbours, shared by layers, and several streams of hidden states.
    "glm5_next": ("glm5_next", {}),
    "glm5_next_small_index": ("glm5_next", {"index_topk": 8, "index_kpool": 2, "index_n_heads": 16}),
    "unlimited_ocr": ("unlimited_ocr", {}),
    "unlimited_ocr_window": ("unlimited_ocr", {"sliding_window": 4}),
}
SEVERAL_PLANS = ("qwen3_5", "lfm2_vl", "gemma4_shared", "gemma4_shared_window", "inkling_window", "inkling2_window")
PLANS: dict[str, Mapping[int, Sequence[float]]] = {
    "before and inside": {-1: [0.8, 0.7], 1: [0.6, 0.3]},
    "late, one row withdrawn": {3: [0.6, 0.3], 4: [0.3, 0]},
}
ASKED = ("qwen3_5", "minicpmv4_6", "lfm2_vl", "gemma4_shared")
"""Those that users ask for: twenty greedy tokens and a second turn."""
LONG = (
    *ASKED,
    "inkling_window",
    "inkling2_window",
    "qwen4_exp_small_index",
    "dots3_small_index",
    "glm5_next_small_index",
    "unlimited_ocr_window",
)
"""Twenty tokens and a second turn: as they are asked for, or as a window or an index comes into play."""
TWINS = {
    "qwen3_5_moe", "lfm3_vl", "gemma4_shared_window", "inkling", "inkling2", "qwen4_exp", "glm5_next", "unlimited_ocr",
    "dots3_small_index",
}  # fmt: skip
"""Of a kind with another one of `MODELS`."""


def _models(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow if name in TWINS else ()) for name in names]


@pytest.fixture(autouse=True)
def _transformers_own_deprecations(monkeypatch: pytest.MonkeyPatch):
    """Nemotron-H's code still asks its configuration for `torch_dtype`."""
    monkeypatch.setattr(hf.configuration_utils.logger, "warning_once", lambda *args, **kwargs: None)


@functools.cache
def _built(name: str) -> tuple[Any, dict[str, Tensor]]:
    key, text = MODELS[name]
    if not catalogue.known(key):
        pytest.skip(f"this transformers has no {key}")
    model = catalogue.build(key, text=text)
    return model, catalogue.inputs(key, model)


def _draw(visual: Tensor, shares: Mapping[int, Sequence[float]]) -> dict[int, Tensor]:
    """{stage: (B, S) bool, removed there}; `shares` of the visual tokens of each row are left after each stage."""
    generator, left, removed, all_of_them = torch.Generator().manual_seed(0), visual.clone(), {}, visual.sum(1)
    for stage in sorted(shares):
        gone = torch.zeros_like(left)
        for row, share in enumerate(shares[stage]):
            slots = left[row].nonzero()[:, 0]
            drawn = torch.randperm(len(slots), generator=generator)
            gone[row, slots[drawn[round(share * int(all_of_them[row])) :]]] = True
        removed[stage], left = gone, left & ~gone
    return removed


def _generate(model: Any, prompt: Mapping[str, Any], steps: int, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """New tokens (B, steps), their logits (B, steps, V), the whole output. No placeholder is said."""
    output = model.generate(
        **{name: value.clone() if isinstance(value, Tensor) else value for name, value in prompt.items()},
        max_new_tokens=steps, do_sample=False, pad_token_id=0, suppress_tokens=list(range(145, 200)),
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    return output.sequences[:, -steps:], torch.stack(output.logits, 1), output


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        pytest.param(name, plan, marks=pytest.mark.slow if name in TWINS or plan != "before and inside" else ())
        for name in MODELS
        for plan in list(PLANS)[: 2 if name in SEVERAL_PLANS else 1]
    ],
)
@torch.no_grad()
def test_a_ragged_padded_batch_is_its_rows_alone_on_shorter_sequences(name: str, plan: str):
    model, prompt = _built(name)
    before = footprint(model)
    removed = _draw(catalogue.visual_slots(MODELS[name][0], prompt), PLANS[plan])
    steps = 20 if name in LONG and plan == "before and inside" else 4
    rows = []
    for row in range(2):
        own = {stage: gone[row : row + 1, prompt["attention_mask"][row].bool()] for stage, gone in removed.items()}
        with ShortReference(model, own):
            rows.append(_generate(model, catalogue.alone(prompt, row), steps)[:2])
    tokens, logits = (torch.cat(parts) for parts in zip(*rows))
    plain = model(**prompt).logits
    assert largest(plain[:, -1] - logits[:, 0]) > 1e-2, "removal has no effect: the check would be vacuous"
    with foveate.apply(model, Fixed(removed)) as session:
        for cached in (True, False):
            forward = model(**prompt, use_cache=cached).logits[:, -1]
            assert largest(forward - logits[:, 0]) <= TOLERANCE, f"a forward pass with use_cache={cached}"
        actual_tokens, actual, _ = _generate(model, prompt, steps)
        assert largest(actual - logits) <= TOLERANCE
        assert torch.equal(actual_tokens, tokens)
        assert largest(_generate(model, prompt, 2, use_cache=False)[1] - logits[:, :2]) <= TOLERANCE
        assert [length == 0 for length in session.trace.kv_lengths] == _without_keys(name)
    assert torch.equal(model(**prompt).logits, plain)
    assert footprint(model).keys() == before.keys()


def _without_keys(name: str) -> list[bool]:
    """Layers that store no keys: recurrent ones, MLPs, readers of other layers' keys."""
    if name.startswith("gemma4"):
        return [False] * 4 + [True] * 2
    if name.startswith("lfm"):
        return [True, False] * 3
    if name == "nemotron_h_omni":
        return [True, True, False, True, True, False]
    if name.startswith(("inkling", "dots3", "unlimited")):
        return [False] * 6
    return [True, True, True, False, True, True]


# transformers reads the padding of Unlimited-OCR's prompt at the wrong slots once its window slides.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ASKED else pytest.mark.slow)
        for name in LONG
        if name != "unlimited_ocr_window"
    ],
)
@torch.no_grad()
def test_a_second_turn_goes_on_from_the_returned_cache(name: str):
    model, prompt = _built(name)
    removed = _draw(catalogue.visual_slots(MODELS[name][0], prompt), PLANS["late, one row withdrawn"])
    question = torch.randint(5, 140, (2, 6), generator=torch.Generator().manual_seed(1))

    def two_turns(prompt: Mapping[str, Tensor], question: Tensor) -> Tensor:
        output = _generate(model, prompt, 4)[2]
        ids = torch.cat([output.sequences, question], 1)
        added = torch.ones(len(ids), ids.shape[1] - prompt["attention_mask"].shape[1], dtype=torch.long)
        mask = torch.cat([prompt["attention_mask"], added], 1)
        turn = {"input_ids": ids, "attention_mask": mask, CACHE_NAME: returned_cache(output)}
        if "mm_token_type_ids" in prompt:
            turn["mm_token_type_ids"] = torch.nn.functional.pad(prompt["mm_token_type_ids"], (0, added.shape[1]))
        if "image_grid_thw" in prompt:
            turn["image_grid_thw"] = prompt["image_grid_thw"]
        return _generate(model, turn, 4)[1]

    expected = []
    for row in range(2):
        own = {stage: gone[row : row + 1, prompt["attention_mask"][row].bool()] for stage, gone in removed.items()}
        with ShortReference(model, own):
            expected.append(two_turns(catalogue.alone(prompt, row), question[row : row + 1]))
    with foveate.apply(model, Fixed(removed)):
        assert largest(two_turns(prompt, question) - torch.cat(expected)) <= TOLERANCE


@pytest.mark.parametrize("name", ["unlimited_ocr", *_models(["lfm2_vl", "inkling2_window", "dots3_small_index"])])
@torch.no_grad()
def test_candidates_that_are_taken_back_leave_no_trace_in_the_cache(name: str):
    model, prompt = _built(name)
    prompt = catalogue.alone(prompt, 1)
    removed = _draw(catalogue.visual_slots(MODELS[name][0], prompt), {-1: [0.7], 1: [0.4]})
    with foveate.apply(model, Fixed(removed)):
        tokens = _generate(model, prompt, 12)[0]
        assert torch.equal(_generate(model, prompt, 12, prompt_lookup_num_tokens=3)[0], tokens)


@pytest.mark.parametrize("name", _models(MODELS))
@torch.no_grad()
def test_keeping_everything_is_bitwise_the_plain_model(name: str):
    model, prompt = _built(name)
    plain, logits = model(**prompt).logits, _generate(model, prompt, 2)[1]
    with foveate.apply(model, KeepAll()):
        assert torch.equal(model(**prompt).logits, plain)
        assert torch.equal(_generate(model, prompt, 2)[1], logits)


@pytest.mark.parametrize("method", [foveate.FastV(keep=0.5), foveate.SparseVLM(keep=0.5)])
@pytest.mark.parametrize("name", ["lfm3_vl", "nemotron_h_omni", "gemma4_shared"])
@torch.no_grad()
def test_methods_treat_a_row_in_a_batch_as_the_row_alone(name: str, method: foveate.Reducer):
    model, prompt = _built(name)
    with foveate.apply(model, method):
        together = _generate(model, prompt, 3)[1]
        for row in range(2):
            assert largest(together[row : row + 1] - _generate(model, catalogue.alone(prompt, row), 3)[1]) <= TOLERANCE


@torch.no_grad()
def test_methods_see_the_whole_prompt_where_the_decoder_goes_on_with_its_end():
    """Layers that share keys are handed the tokens alone whose logits are wanted, unless a stage lies among them."""
    model, prompt = _built("gemma4_shared")
    shape, nothing = prompt["input_ids"].shape, torch.zeros_like(prompt["input_ids"], dtype=torch.bool)
    for stages in ((4,), (5,), (1, 4)):
        reducer = Watch({stage: nothing for stage in stages})
        with foveate.apply(model, reducer):
            _generate(model, prompt, 2)
        assert [view.hidden.shape[:2] for view in reducer.views] == [shape] * len(stages)


@torch.no_grad()
def test_attention_is_read_in_the_nearest_layer_that_has_some_and_the_trace_says_so():
    model, prompt = _built("qwen3_5")  # of its six layers, the fourth has attention
    with foveate.apply(model, foveate.FastV(keep=4)) as session:
        model(**prompt)
    assert session.trace.moved == {1: 3}
    assert session.trace.stages == [3]
    assert session.trace.visual_tokens[0].tolist() == [12] * 4 + [4] * 2
    assert session.trace.scores(1) is not None


@torch.no_grad()
def test_nothing_is_removed_between_a_layer_with_an_index_and_the_next_that_takes_it_over():
    if not catalogue.known("glm5_next"):
        pytest.skip("this transformers has no glm5_next")
    kinds = ["linear_attention", "indexed_attention", "indexed_attention"] * 2
    small = {"index_topk": 8, "index_kpool": 2, "index_n_heads": 16, "indexer_types": ["full", "full", "shared"] * 2}
    model = catalogue.build("glm5_next", text={**small, "layer_types": kinds})
    prompt = catalogue.inputs("glm5_next", model)
    judge("glm5_next", model, "fastv", {"keep": 0.5, "layer": 4}, prompt)
    judge("glm5_next", model, "sparsevlm", {"keep": 0.5, "layers": [1, 3]}, prompt)
    judge("glm5_next", model, "vtw", {"layer": 5}, prompt)
    for stage, place in ((1, 2), (4, 5)):  # the nearest layers that attend are 2, and 2 and 5
        with foveate.apply(model, foveate.FastV(keep=4, layer=stage + 1)) as session:
            model(**prompt)
        assert session.trace.moved == {stage: place}


def test_attention_that_no_later_layer_has_is_refused():
    model, _ = _built("qwen3_5")

    class Late(KeepAll):
        stages = (4, 5)
        taps = {5: foveate.reduction.TapSpec("last")}  # noqa: RUF012

    with pytest.raises(foveate.UnsupportedError, match=r"reads attention in decoder layer 5.*has none"):
        foveate.apply(model, Late())


def _gemma3n(shared: int) -> Any:
    """A text model: the tower needs timm. Hidden states are (2, B, S, D)."""
    config = hf.Gemma3nTextConfig(
        **DECODER, head_dim=16, vocab_size_per_layer_input=200, hidden_size_per_layer_input=8, sliding_window=64,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2, num_kv_shared_layers=shared,
        activation_sparsity_pattern=[0.0] * 6, altup_num_inputs=2, laurel_rank=8,
    )  # fmt: skip
    return spread_weights(hf.Gemma3nForCausalLM(config))


class TestCopiesOfTheHiddenStates:
    ids = torch.randint(5, 140, (2, 30), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(30) >= torch.tensor([[4], [0]])).long()
    visual = torch.zeros(2, 30, dtype=torch.bool).index_fill(1, torch.arange(8, 20), True)

    @pytest.mark.parametrize("shared", [0, 2])
    @torch.no_grad()
    def test_removed_tokens(self, shared: int):
        model, prompt = _gemma3n(shared), {"input_ids": self.ids, "attention_mask": self.mask}
        removed = _draw(self.visual, {-1: [0.8, 0.8], 1: [0.6, 0.4], 3: [0.3, 0]})
        plain = model(**prompt).logits
        with MaskedReference(model, removed):
            expected = _generate(model, prompt, 6)[1]
        with foveate.apply(model, Fixed(removed), visual=self.visual):
            states = model(**prompt, output_hidden_states=True).hidden_states
            assert states[0].shape == (2, 2, 30, 64), "recorded whole"
            assert largest(_generate(model, prompt, 6)[1] - expected) <= TOLERANCE
            assert largest(_generate(model, prompt, 2, use_cache=False)[1] - expected[:, :2]) <= TOLERANCE
        assert largest(plain[:, -1] - expected[:, 0]) > 1e-2
        assert torch.equal(model(**prompt).logits, plain)

    @torch.no_grad()
    def test_one_row_whose_steps_have_a_mask(self):
        """Eager attention always has one. The first axis of hidden states is not that of the samples."""
        model, prompt = _gemma3n(0), {"input_ids": self.ids[1:], "attention_mask": self.mask[1:]}
        model.set_attn_implementation("eager")
        removed = _draw(self.visual[1:], {1: [0.6]})
        with MaskedReference(model, removed):
            expected = _generate(model, prompt, 4)[1]
        with foveate.apply(model, Fixed(removed), visual=self.visual[1:]):
            assert largest(_generate(model, prompt, 4)[1] - expected) <= TOLERANCE

    @pytest.mark.parametrize("assigned", ["euclidean", "cosine"])
    @torch.no_grad()
    def test_tokens_are_merged_in_every_copy(self, assigned: str):
        model, prompt = _gemma3n(0), {"input_ids": self.ids, "attention_mask": self.mask}
        visual = self.visual.roll(2, 1) | self.visual.roll(-2, 1)  # 16, of which several are merged
        method = foveate.SparseVLM(
            keep=6, layers=[0, 2], details={"tau": 1.0, "assignment": assigned}, positions="keep"
        )
        merges: list[Any] = []
        with foveate.apply(model, method, visual=visual) as session, recorded(session, merges):
            actual = model(**prompt).logits
            trace = session.trace
        assert merges
        assert merges[0][2].shape[-1] == 2 * 64
        kept = trace.active(2)
        expected = Reference(model, trace, merges).forward(prompt)
        assert largest(actual[kept] - expected[kept]) <= TOLERANCE
        only_removed = Reference(model, trace, []).forward(prompt)
        assert largest(expected[:, -1] - only_removed[:, -1]) > 1e-3

    @torch.no_grad()
    def test_in_a_chain_the_last_of_a_layer_may_merge(self):
        model, prompt = _gemma3n(0), {"input_ids": self.ids, "attention_mask": self.mask}
        merging = foveate.SparseVLM(keep=4, layers=[0, 2], details={"tau": 1.0})
        dropping = Fixed({2: torch.zeros_like(self.visual).index_fill(1, torch.tensor([8, 9]), True)})
        with foveate.apply(model, foveate.Chain(dropping, merging), visual=self.visual) as session:
            model(**prompt)
        assert not session.trace.active(2)[:, [8, 9]].any()
        with (
            foveate.apply(model, foveate.Chain(merging, dropping), visual=self.visual),
            pytest.raises(foveate.UnsupportedError, match="cannot go on in the same layer"),
        ):
            model(**prompt)

    def test_a_method_that_merges_one_copy_is_refused(self):
        model = _gemma3n(0)

        class Mean(foveate.Reducer):
            stages = (1,)

            def decide(self, view: View) -> Decision:
                slots = torch.full((len(view.active), 1), 8)
                return Decision(slots=slots, values=view.hidden[:, 8:20].mean(1, keepdim=True))

        with (
            foveate.apply(model, Mean(), visual=self.visual),
            pytest.raises(foveate.UnsupportedError, match=r"2 hidden states of each token, and Mean merges one"),
        ):
            model(input_ids=self.ids, attention_mask=self.mask)


REFUSED = {
    "mistral_large4": "sparse attention that chooses keys",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_with_the_reason(name: str):
    if not catalogue.known(name):
        pytest.skip(f"this transformers has no {name}")
    model = catalogue.build(name)
    with pytest.raises(foveate.UnsupportedError, match=REFUSED[name]):
        foveate.apply(model, foveate.Random(keep=4))


@torch.no_grad()
def test_ragged_rows_that_would_go_on_from_a_recurrent_state_are_refused():
    """Fillers between an old state and new tokens would let the state decay."""
    model, prompt = _built("lfm2_vl")
    first = _generate(model, {**prompt}, 2)[2]
    visual = catalogue.visual_slots("lfm2_vl", prompt)
    again = {
        **prompt,
        "attention_mask": torch.cat([torch.ones(2, first.sequences.shape[1] - 1), prompt["attention_mask"]], 1),
    }
    with (
        foveate.apply(model, Fixed(_draw(visual, {-1: [0.7, 0.3]}))),
        pytest.raises(foveate.UnsupportedError, match="go on from a recurrent state"),
    ):
        model(**{**again, CACHE_NAME: returned_cache(first)})
