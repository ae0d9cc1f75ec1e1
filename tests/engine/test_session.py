"""A session comes and goes without a trace, and refuses what it cannot serve, by name and before it is too late."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from tests.families import DECODER, inputs, visual_slots
from tests.reference.checks import build_once, footprint
from tests.reference.plans import Fixed, KeepAll, draw_removed
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

import foveate
from foveate.engine.compat import CACHE_NAME, returned_cache
from foveate.reduction import Decision, Reducer, View

NAMES = ["llava", "qwen3_vl", "gemma3_window", "idefics3", "mistral3"]
COUNTS = {-1: [8, 9], 1: [4, 7], 3: [2, 0]}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in NAMES])
def model(request: pytest.FixtureRequest):
    """A model that must look and compute afterwards as it did before."""
    model = build_once(request.param)
    model.family = request.param
    prompt = inputs(request.param, model)
    before = footprint(model)
    with torch.no_grad():
        logits = model(**prompt).logits
    yield model
    assert footprint(model) == before
    with torch.no_grad():
        assert torch.equal(model(**prompt).logits, logits)
    del model.family


def _prompt(model: nn.Module, **options) -> dict[str, torch.Tensor]:
    return inputs(model.family, model, **options)


def _fixed(prompt: dict[str, torch.Tensor]) -> Fixed:
    return Fixed(draw_removed(prompt["input_ids"], COUNTS))


# ------------------------------------------------------------------------------------------------ coming and going
@torch.no_grad()
def test_after_leaving_the_model_is_as_before(model: nn.Module):
    prompt = _prompt(model)
    keys = model.state_dict().keys()
    with foveate.apply(model, _fixed(prompt)) as session:
        assert model.state_dict().keys() == keys
        model.generate(**prompt, max_new_tokens=3, pad_token_id=0)
    session.remove()  # a second time does nothing


@torch.no_grad()
def test_without_with(model: nn.Module):
    prompt = _prompt(model)
    session = foveate.apply(model, _fixed(prompt))
    reduced = model(**prompt).logits
    session.remove()
    assert not torch.equal(model(**prompt).logits, reduced)


@torch.no_grad()
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_in_a_layer_leaves_no_state(model: nn.Module, error: type[BaseException]):
    prompt = _prompt(model)

    def fail(*call: object) -> None:
        raise error

    with foveate.apply(model, _fixed(prompt)):
        expected = model(**prompt).logits
        handle = model.get_decoder().layers[4].mlp.register_forward_pre_hook(fail)
        for run in (model.forward, model.__call__, lambda **kw: model.generate(**kw, max_new_tokens=2, pad_token_id=0)):
            with pytest.raises(error):
                run(**prompt)
        handle.remove()
        assert torch.equal(model(**prompt).logits, expected)
    with pytest.raises(error), foveate.apply(model, _fixed(prompt)):
        raise error


@torch.no_grad()
def test_an_exception_in_a_method_leaves_no_state(model: nn.Module):
    prompt = _prompt(model)
    words = _only_words(prompt)
    untouched = model(**words).logits

    class Fails(Reducer):
        stages = (2,)

        def decide(self, view: View) -> Decision:
            raise LookupError("no idea")

    with foveate.apply(model, Fails()):
        with pytest.raises(LookupError):
            model(**prompt)
        assert torch.equal(model(**words).logits, untouched)


@torch.no_grad()
def test_one_method_serves_many_sessions(model: nn.Module):
    prompt = _prompt(model)
    reducer, results = _fixed(prompt), []
    for _ in range(2):
        with foveate.apply(model, reducer):
            results.append(model(**prompt).logits)
    assert torch.equal(*results)


@torch.no_grad()
def test_the_model_without_its_head(model: nn.Module):
    prompt = _prompt(model)
    with foveate.apply(model, _fixed(prompt)):
        expected = model.model(**prompt).last_hidden_state
    with foveate.apply(model.model, _fixed(prompt)):
        assert torch.equal(model.model(**prompt).last_hidden_state, expected)


@torch.no_grad()
def test_labels_of_one_call_do_not_reach_the_next(model: nn.Module):
    """The label rule keeps tokens; a later call of the inner model has no labels."""
    prompt = _prompt(model)
    labels = prompt["input_ids"].masked_fill(visual_slots(prompt["input_ids"]) | (prompt["attention_mask"] == 0), -100)
    removed = draw_removed(prompt["input_ids"], {1: [0, 0]})
    with foveate.apply(model, Fixed(removed)) as session:
        with torch.enable_grad():
            model(**prompt, labels=labels)
        model.model(**prompt)
    assert session.trace.visual_tokens[:, -1].tolist() == [0, 0]


# ------------------------------------------------------------------------------------------------- nothing to reduce
def _only_words(prompt: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = prompt["input_ids"].masked_fill(visual_slots(prompt["input_ids"]), 7)
    extra = {"token_type_ids": torch.zeros_like(ids)} if "token_type_ids" in prompt else {}
    return {"input_ids": ids, "attention_mask": prompt["attention_mask"], **extra}


@torch.no_grad()
def test_a_prompt_without_image_is_untouched(model: nn.Module):
    prompt = _prompt(model)
    words = _only_words(prompt)
    expected, generated = model(**words).logits, model.generate(**words, max_new_tokens=5, pad_token_id=0)
    with foveate.apply(model, _fixed(prompt)) as session:
        assert torch.equal(model(**words).logits, expected)
        assert torch.equal(model.generate(**words, max_new_tokens=5, pad_token_id=0), generated)
        assert session.trace is None


@torch.no_grad()
@pytest.mark.parametrize("answer", [lambda view: None, lambda view: Decision(), lambda view: Decision(view.tokens)])
def test_a_decision_that_removes_nothing_is_bitwise_nothing(
    model: nn.Module, answer: Callable[[View], Decision | None]
):
    """Not even padding is dropped."""
    prompt = _prompt(model)

    class Idle(Reducer):
        stages = (-1, 0, 3)
        decide = staticmethod(answer)

    expected = model(**prompt).logits
    with foveate.apply(model, Idle()) as session:
        assert torch.equal(model(**prompt).logits, expected)
    length = prompt["input_ids"].shape[1]
    assert set(session.trace.kv_lengths) <= {length, 11}
    assert (session.trace.visual_tokens == visual_slots(prompt["input_ids"]).sum(1, keepdim=True)).all()


# --------------------------------------------------------------------------------------------------------- refusals
def test_a_second_session_is_refused(model: nn.Module):
    with foveate.apply(model, KeepAll()):
        within = footprint(model)
        for target in (model, model.model):
            with pytest.raises(foveate.UnsupportedError, match="already"):
                foveate.apply(target, KeepAll())
        assert footprint(model) == within


@torch.no_grad()
def test_a_static_cache_is_refused(model: nn.Module):
    prompt = _prompt(model)
    with foveate.apply(model, _fixed(prompt)):
        expected = model(**prompt).logits
        with pytest.raises(foveate.UnsupportedError, match="dynamic"):
            model.generate(**prompt, max_new_tokens=4, pad_token_id=0, cache_implementation="static")
        assert torch.equal(model(**prompt).logits, expected), "still usable"


@torch.no_grad()
def test_a_cache_of_another_kind_is_refused(model: nn.Module):
    """As a quantised one: a dynamic cache whose layers are something else."""

    class Quantised(DynamicLayer):
        pass

    prompt = _prompt(model)
    cache = DynamicCache()
    cache.layers = [Quantised() for _ in range(6)]
    with foveate.apply(model, _fixed(prompt)), pytest.raises(foveate.UnsupportedError, match="Quantised"):
        model(**prompt, **{CACHE_NAME: cache})


@torch.no_grad()
def test_a_reduced_cache_needs_its_session(model: nn.Module):
    prompt = _prompt(model)
    with foveate.apply(model, _fixed(prompt)):
        cache = returned_cache(model(**prompt, use_cache=True))
    with pytest.raises(RuntimeError, match="cache"):
        model(input_ids=prompt["input_ids"][:, -1:], **{CACHE_NAME: cache})


@torch.no_grad()
def test_a_cache_that_is_reset_starts_anew(model: nn.Module):
    prompt, cache = _prompt(model), DynamicCache(config=model.config.get_text_config())
    with foveate.apply(model, _fixed(prompt)):
        first = model(**prompt, **{CACHE_NAME: cache}).logits
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(model(**prompt, **{CACHE_NAME: cache}).logits, first)


@torch.no_grad()
def test_a_method_of_the_model_held_beyond_the_session_is_the_plain_one(model: nn.Module):
    prompt, options = _prompt(model), {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**prompt, **options)
    with foveate.apply(model, _fixed(prompt)) as session:
        model(**prompt)
        held, trace = model.generate, session.trace
    assert torch.equal(held(**prompt, **options), expected)
    assert session.trace is trace, "of the last call under the session"


def test_a_stage_beyond_the_depth_is_refused(model: nn.Module):
    removed = torch.zeros(1, 4, dtype=torch.bool)
    for stage in (6, 40, -2):
        with pytest.raises(foveate.OptionError, match=str(stage)):
            foveate.apply(model, Fixed({stage: removed}))


def test_a_method_may_refuse_the_model(model: nn.Module):
    class Choosy(KeepAll):
        def prepare(self, anatomy: object) -> None:
            raise foveate.UnsupportedError("not this one")

    with pytest.raises(foveate.UnsupportedError, match="not this one"):
        foveate.apply(model, Choosy())


@torch.no_grad()
def test_impossible_decisions_are_refused(model: nn.Module):
    prompt = _prompt(model)

    class Answers(Reducer):
        stages = (1,)

        def __init__(self, answer: Callable[[View], Decision]):
            self.decide = answer

    def without_last(view: View) -> Decision:
        keep = view.active.clone()
        keep[:, -1] = False
        return Decision(keep)

    wrong = {
        "last token": without_last,
        "keep": lambda view: Decision(view.active[:, 1:]),
        "BoolTensor": lambda view: Decision(view.active.long()),
        "values": lambda view: Decision(slots=torch.zeros(2, 1, dtype=torch.long)),
    }
    for message, answer in wrong.items():
        with foveate.apply(model, Answers(answer)), pytest.raises(ValueError, match=message):
            model(**prompt)


def test_labels_on_images_are_refused(model: nn.Module):
    prompt = _prompt(model)
    with foveate.apply(model, _fixed(prompt)), pytest.raises(ValueError, match="-100"):
        model(**prompt, labels=prompt["input_ids"])


@torch.no_grad()
def test_an_image_without_placeholder_is_transformers_own_error(model: nn.Module):
    prompt = _prompt(model)
    prompt["input_ids"] = prompt["input_ids"].masked_fill(visual_slots(prompt["input_ids"]), 7)
    try:
        model(**prompt)
        pytest.skip("this transformers says nothing")
    except (RuntimeError, ValueError, IndexError) as error:
        expected = error
    with foveate.apply(model, _fixed(_prompt(model))), pytest.raises(type(expected)) as raised:
        model(**prompt)
    assert str(raised.value) == str(expected)


@pytest.mark.parametrize(
    "other",
    [
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)),
        lambda: hf.LlamaModel(hf.LlamaConfig(**DECODER)),
        lambda: hf.BertModel(hf.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)),
        lambda: nn.Linear(2, 2),
    ],
    ids=["LlamaForCausalLM", "LlamaModel", "BertModel", "Linear"],
)
def test_a_model_without_images_is_refused(other: Callable[[], nn.Module]):
    model = other()
    before = footprint(model)
    with pytest.raises(foveate.UnsupportedError, match=type(model).__name__):
        foveate.apply(model, KeepAll())
    assert footprint(model) == before


def test_an_encoder_decoder_is_refused():
    config = hf.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=9)
    with pytest.raises(foveate.UnsupportedError, match="T5"):
        foveate.apply(hf.T5ForConditionalGeneration(config), KeepAll())


def test_only_a_reducer_is_a_reducer():
    with pytest.raises(foveate.OptionError, match="Reducer"):
        foveate.apply(build_once("llava"), object())
