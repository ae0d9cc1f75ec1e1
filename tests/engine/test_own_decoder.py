"""Bring your own VLM: any Hugging Face decoder, fed with embeddings, and a mask that says which slots are visual."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from tests.families import DECODER, spread_weights
from tests.reference.checks import STEPS, TOLERANCE, footprint, greedy, largest
from tests.reference.masked import MaskedReference
from tests.reference.plans import Fixed, KeepAll, TopOfLast

import foveate

DECODERS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, head_dim=16)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**DECODER, head_dim=16, sliding_window=12)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**{k: v for k, v in DECODER.items() if k != "num_key_value_heads"})
    ),
}
LENGTH = 30


@pytest.fixture(scope="module", params=DECODERS)
def model(request: pytest.FixtureRequest):
    model = spread_weights(DECODERS[request.param]())
    with torch.no_grad():
        model(inputs_embeds=torch.zeros(1, 2, 64), output_hidden_states=True)
        greedy(model, {"inputs_embeds": torch.zeros(1, 2, 64)}, steps=2)
    return model


@pytest.fixture
def prompt() -> dict[str, torch.Tensor]:
    states = torch.randn(2, LENGTH, 64, generator=torch.Generator().manual_seed(0)) * 0.5
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    return {"inputs_embeds": states, "attention_mask": mask}


@pytest.fixture
def visual() -> torch.Tensor:
    visual = torch.zeros(2, LENGTH, dtype=torch.bool)
    visual[0, 5:20] = True
    visual[1, 2:20] = True
    return visual


@torch.no_grad()
@pytest.mark.parametrize("stages", [(1,), (-1,), (0, 3)])
def test_exact(model: hf.PreTrainedModel, prompt: dict, visual: torch.Tensor, stages: tuple[int, ...]):
    before, given = footprint(model), prompt["inputs_embeds"].clone()
    generator, removed, left = torch.Generator().manual_seed(1), {}, visual
    for stage in stages:
        removed[stage] = left & (torch.rand(visual.shape, generator=generator) < 0.6)
        left = left & ~removed[stage]
    kept = prompt["attention_mask"].bool() & (left | ~visual)
    untouched = model(**prompt).logits
    with MaskedReference(model, removed):
        expected, steps = model(**prompt).logits, greedy(model, prompt)
    with foveate.apply(model, Fixed(removed), visual=visual) as session:
        actual, actual_steps = model(**prompt).logits, greedy(model, prompt)
    assert largest((expected - untouched)[kept]) >= 1e-2
    assert largest((actual - expected)[kept]) <= TOLERANCE
    assert largest(actual_steps[1] - steps[1]) <= TOLERANCE
    assert torch.equal(actual_steps[0][:, -STEPS:], steps[0][:, -STEPS:])
    assert torch.equal(session.trace.kept(stages[-1]), left)
    assert torch.equal(prompt["inputs_embeds"], given), "the caller's embeddings are not written to"
    assert footprint(model) == before


@torch.no_grad()
def test_everything_kept_is_bitwise_nothing(model: hf.PreTrainedModel, prompt: dict, visual: torch.Tensor):
    expected = model(**prompt).logits
    with foveate.apply(model, KeepAll(), visual=visual):
        assert torch.equal(model(**prompt).logits, expected)


@torch.no_grad()
def test_taps_work_without_a_vision_tower(model: hf.PreTrainedModel, prompt: dict, visual: torch.Tensor):
    with foveate.apply(model, TopOfLast(4), visual=visual) as session:
        model(**prompt)
    assert session.trace.visual_tokens.tolist() == [[15, 15, 4, 4, 4, 4], [18, 18, 4, 4, 4, 4]]


@torch.no_grad()
def test_beams(model: hf.PreTrainedModel, prompt: dict, visual: torch.Tensor):
    removed = {1: visual & (torch.arange(LENGTH) % 3 > 0)}
    with MaskedReference(model, removed):
        expected = greedy(model, prompt, num_beams=2)[0]
    with foveate.apply(model, Fixed(removed), visual=visual):
        assert torch.equal(greedy(model, prompt, num_beams=2)[0], expected)


@torch.no_grad()
def test_a_mask_that_does_not_fit_is_refused(prompt: dict, visual: torch.Tensor):
    model = spread_weights(DECODERS["llama"]())
    for wrong in (visual.int(), visual.float(), -visual.long(), visual[0], visual.tolist()):
        with pytest.raises(foveate.OptionError, match="visual"):
            foveate.apply(model, KeepAll(), visual=wrong)
    longer = torch.zeros(2, LENGTH + 1, dtype=torch.bool)
    with foveate.apply(model, KeepAll(), visual=longer), pytest.raises(foveate.UnsupportedError, match=str(LENGTH)):
        model(**prompt)
