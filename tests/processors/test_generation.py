"""The ways to generate, on families of different structure: beams, samples, candidates, streamers, pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import foveate
from tests.catalogue.count import Reference, differ
from tests.processors.build import STATEFUL, STRUCTURES, family, vlm
from tests.processors.media import asked, encoded

_WORDS = {"suppress_tokens": list(range(145, 200)), "pad_token_id": 0, "max_new_tokens": 6, "min_new_tokens": 6}
_DRAWS = {"do_sample": True, "temperature": 0.7, "top_k": 20}


def _prompt(name: str) -> dict[str, Tensor]:
    return encoded(vlm(name)[1], [asked("What is this?", "landscape")])


def _reducer() -> foveate.Reducer:
    return foveate.FastV(keep=0.5, layer=1)


def _scores(model: Any, prompt: dict[str, Tensor], **options: Any) -> Tensor:
    """(B, 6, V), by the same draws at every call."""
    torch.manual_seed(0)
    found = model.generate(**prompt, return_dict_in_generate=True, output_logits=True, **_WORDS, **options)
    return torch.stack(found.logits, 1)


@torch.no_grad()
def _held(name: str, ask: Callable[[], Tensor]) -> None:
    """What is asked of the reduced model equals what the reference says that never looks at a removed token."""
    model, prompt = vlm(name)[0], _prompt(name)
    plain = ask()
    with foveate.apply(model, _reducer()) as session:
        found = ask()
        trace = session.trace
    expected = Reference(model, trace, [], lambda _, row: prompt).asked(prompt, lambda _: ask())
    differ("scores", found, expected)
    assert plain.shape != expected.shape or (expected - plain).abs().max() > 1e-4, "the reference shows no effect"


@family(STRUCTURES, quick="llava")
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, _DRAWS, {**_DRAWS, "num_return_sequences": 2}, {"use_cache": False}],
    ids=["beams", "sampling", "two samples", "no cache"],
)
def test_ways_to_decode(name: str, options: dict[str, Any]):
    model, prompt = vlm(name)[0], _prompt(name)
    _held(name, lambda: _scores(model, prompt, **options))


@family([name for name in STRUCTURES if name not in STATEFUL])
def test_prompt_lookup(name: str):
    model, prompt = vlm(name)[0], _prompt(name)
    _held(name, lambda: _scores(model, prompt, prompt_lookup_num_tokens=3))


@torch.no_grad()
@family([name for name in STRUCTURES if name not in STATEFUL])
def test_assisted_decoding(name: str):
    """Candidates of another model change how often the reduced model runs, not what it says."""
    model, prompt = vlm(name)[0], _prompt(name)
    assistant = copy.deepcopy(model)
    for weight in assistant.parameters():
        weight.add_(0.1 * weight.std(correction=0), alpha=1.0)
    with foveate.apply(model, _reducer()) as session:
        greedy = _scores(model, prompt)
        kept = session.trace.kept(1)
        assisted = _scores(model, prompt, assistant_model=assistant)
        assert torch.equal(session.trace.kept(1), kept)
    differ("scores", assisted, greedy)


@torch.no_grad()
@family(STRUCTURES, quick="llava")
def test_a_streamer_in_a_thread(name: str):
    """Generation in another thread, as servers do it, under the session of this one."""
    model, processor = vlm(name)
    prompt = _prompt(name)
    with foveate.apply(model, _reducer()):
        ids = model.generate(**prompt, **_WORDS)[0, prompt["input_ids"].shape[1] :]
        streamer = hf.TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        thread = Thread(target=model.generate, kwargs={**prompt, **_WORDS, "streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == processor.tokenizer.decode(ids, skip_special_tokens=True)


@family(STRUCTURES)
def test_pipeline(name: str):
    model, processor = vlm(name)
    pipe = hf.pipeline("image-text-to-text", model=model, processor=processor)
    conversation = asked("What is this?", "landscape")
    with foveate.apply(model, _reducer()) as session:
        said = pipe(text=conversation, return_full_text=False, generate_kwargs=_WORDS)[0]["generated_text"]
        assert session.trace.visual_tokens[0, -1] < session.trace.visual_tokens[0, 0]
        ids = model.generate(**_prompt(name), **_WORDS)[0, _prompt(name)["input_ids"].shape[1] :]
    assert said == processor.tokenizer.decode(ids, skip_special_tokens=True)
