"""Every method on videos, in every family that takes them. A new one needs one row in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import foveate
from foveate.cli.grid import listed_recipes
from foveate.evaluate.grid import expand
from foveate.reduction import Reducer, info
from tests import families, videos
from tests.reducers.test_matrix import Recorded, reference
from tests.reference.checks import TOLERANCE, build_once, footprint, greedy, largest

METHODS: dict[str, Callable[[int | float], Reducer]] = {
    "dycoke": lambda keep: foveate.DyCoke(keep),
    "evs": lambda keep: foveate.EVS(keep),
    "fastvid": lambda keep: foveate.FastVID(keep, segments=2),
    "vidcom2": lambda keep: foveate.VidCom2(keep),
}
EXACT_BUDGET = ["fastvid", "vidcom2"]
"""Methods that promise exactly `keep` patches of a video, however few."""
QUICK = ["qwen2_5_vl", "llava_onevision"]
FAMILIES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in videos.FAMILIES]
ATTENTIVE = [p for p in FAMILIES if p != "qwen3_5" and "qwen3_5" not in getattr(p, "values", ())]
"""A recurrent layer has no mask to hide tokens behind: `tests/engine/test_hybrids.py`."""


def test_every_method_on_videos_has_a_row():
    assert set(METHODS) == {name for name in foveate.names() if "on videos" in info(name).acts}


def applied(name: str, model: Any, reducer: Reducer, prompt: dict[str, Tensor]) -> Any:
    return foveate.apply(model, reducer, **videos.numbers(name, prompt["input_ids"]))


@pytest.mark.parametrize("family", ATTENTIVE)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_exact(method: str, family: str):
    """The layers compute what the full model computes when it may not look at what the method removed."""
    model, prompt = videos.build(family), videos.prompt(family)
    before = footprint(model)
    recorded = Recorded(METHODS[method](0.4))
    with applied(family, model, recorded, prompt) as session:
        actual = model(**prompt).logits
        trace, decisions = session.trace, dict(recorded.decisions)
    assert footprint(model) == before
    with reference(model, trace, decisions):
        expected = model(**prompt).logits
    assert largest((actual - expected)[trace.active(trace.n_layers)]) <= TOLERANCE
    with applied(family, model, recorded, prompt) as session:
        tokens, steps = greedy(model, prompt, 3)
        trace, decisions = session.trace, dict(recorded.decisions)
    with reference(model, trace, decisions):
        expected_tokens, expected_steps = greedy(model, prompt, 3)
    assert largest(steps - expected_steps) <= TOLERANCE
    assert torch.equal(tokens, expected_tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_batch_equals_singles(method: str, family: str):
    """A video gets in a left-padded, ragged batch what it gets alone."""
    model, prompt = videos.build(family), videos.prompt(family)
    with applied(family, model, METHODS[method](0.4), prompt) as session:
        together, batch = greedy(model, prompt, 3)[1], session.trace
    for row in range(2):
        single = videos.prompt(family, [row])
        with applied(family, model, METHODS[method](0.4), single) as session:
            alone = greedy(model, single, 3)[1]
            tokens = prompt["attention_mask"][row].bool()
            assert torch.equal(session.trace.kept(-1)[0], batch.kept(-1)[row, tokens])
            assert largest(alone[0] - together[row]) <= TOLERANCE


@pytest.mark.parametrize("keep", [1.0, 1000])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_all_tokens_kept_is_bitwise_the_model(method: str, family: str, keep: int | float):
    model, prompt = videos.build(family), videos.prompt(family)
    expected = model(**prompt).logits
    with applied(family, model, METHODS[method](keep), prompt):
        assert torch.equal(model(**prompt).logits, expected)


@pytest.mark.parametrize("keep", [2, 7, 0.25, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", EXACT_BUDGET)
@torch.no_grad()
def test_the_budget_is_hit(method: str, family: str, keep: int | float):
    """Per video; class tokens of frames and row ends come on top."""
    model, prompt = videos.build(family), videos.prompt(family)
    with applied(family, model, METHODS[method](keep), prompt) as session:
        model(**prompt)
    for row, (video,) in enumerate(session.trace.layout.images):
        patches = sum(int((block.slots >= 0).sum()) for block in video.blocks)
        promised = keep if isinstance(keep, int) else round(keep * patches)
        assert session.trace.visual_tokens[row, 0] == promised + len(video.newline)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_images_are_left_alone(method: str):
    model = build_once("qwen2_vl")
    image = families.inputs("qwen2_vl", model, batch=1)
    video = videos.prompt("qwen2_vl", [0])
    ids = torch.cat([image["input_ids"], video["input_ids"]], 1)
    both = {**image, **video, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    both |= families.token_types("qwen2_vl", ids)
    untouched = model(**image).logits
    with foveate.apply(model, METHODS[method](0.5)) as session:
        assert torch.equal(model(**image).logits, untouched)
        model(**both)
    kept, is_image = session.trace.kept(-1), ids == families.IMAGE_TOKEN
    assert bool(kept[is_image].all())
    assert int(kept[ids == families.VIDEO_TOKEN].sum()) == 6


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_several_videos_in_a_row_and_none(method: str):
    """Each has the budget, and gets what it gets alone."""
    model, alone = videos.build("qwen2_vl"), []
    for row in range(3):
        prompt = videos.prompt("qwen2_vl", [row])
        with foveate.apply(model, METHODS[method](7)) as session:
            model(**prompt)
        alone.append(session.trace.kept(-1)[0][prompt["input_ids"][0] == families.VIDEO_TOKEN])
    parts = [videos.prompt("qwen2_vl", [row]) for row in range(3)]
    rows = [[*parts[0]["input_ids"][0].tolist(), *parts[1]["input_ids"][0].tolist()], parts[2]["input_ids"][0].tolist()]
    rows.append([5, 6, 7])
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    together = {"input_ids": ids, "attention_mask": (ids != 0).long(), **families.token_types("qwen2_vl", ids)}
    together |= {name: torch.cat([part[name] for part in parts]) for name in ("pixel_values_videos", "video_grid_thw")}
    with foveate.apply(model, METHODS[method](7)) as session:
        model(**together)
    kept, is_video = session.trace.kept(-1), ids == families.VIDEO_TOKEN
    assert torch.equal(kept[0, is_video[0]], torch.cat(alone[:2]))
    assert torch.equal(kept[1, is_video[1]], alone[2])
    if method in EXACT_BUDGET:
        assert session.trace.visual_tokens[:, 0].tolist() == [14, 7, 0]


@pytest.mark.parametrize("method", METHODS)
def test_models_without_videos_are_refused(method: str):
    with pytest.raises(foveate.UnsupportedError, match=r"takes no videos.*visual=LongTensor"):
        foveate.apply(build_once("llava"), METHODS[method](0.2))
    with pytest.raises(foveate.UnsupportedError, match="takes no videos"):  # a mask numbers nothing
        foveate.apply(build_once("llava"), METHODS[method](0.2), visual=torch.ones(1, 3, dtype=torch.bool))


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_video_whose_frames_are_not_known_is_refused(method: str, monkeypatch: pytest.MonkeyPatch):
    """Never the full model without a word."""
    model, prompt = videos.build("qwen2_vl"), videos.prompt("qwen2_vl")
    monkeypatch.setattr("foveate.engine.layout.plan", lambda prompt: [])
    with foveate.apply(model, METHODS[method](0.2)), pytest.raises(foveate.UnsupportedError, match="which frame"):
        model(**prompt)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "fastvid"])  # which needs a tower
@torch.no_grad()
def test_a_decoder_without_a_tower(method: str):
    """Numbered runs between which text stands are the frames of a video; a single run cannot be told apart."""
    model = LlamaForCausalLM(LlamaConfig(**families.DECODER)).eval()
    states = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(0))
    several = torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0]])
    with foveate.apply(model, METHODS[method](0.5), visual=several) as session:
        model(inputs_embeds=states)
    assert session.trace.visual_tokens[0, 0] == 6
    one = torch.tensor([[0, *[1] * 12, *[0] * 7]])
    with (
        foveate.apply(model, METHODS[method](0.5), visual=one),
        pytest.raises(foveate.UnsupportedError, match="which frame"),
    ):
        model(inputs_embeds=states)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_frames_in_tiles_are_refused(method: str):
    model = build_once("llava_next")
    prompt = families.inputs("llava_next", model, batch=1, images=2)
    numbers = families.visual_slots(prompt["input_ids"]).long()
    with (
        foveate.apply(model, METHODS[method](0.2), visual=numbers),
        pytest.raises(foveate.UnsupportedError, match="cut into tiles"),
    ):
        model(**prompt)


@pytest.mark.parametrize("keep", [0, 1.5, "many"])
@pytest.mark.parametrize("method", METHODS)
def test_bad_budgets(method: str, keep: Any):
    with pytest.raises(foveate.BudgetError, match="keep"):
        METHODS[method](keep)


@torch.no_grad()
def test_the_papers_settings_for_videos():
    """`benchmarks/video.yaml`: 4 frames of 16 patches and a class token, 6 layers."""
    file = Path(__file__).parents[2] / "benchmarks" / "video.yaml"
    listed, _ = listed_recipes(None, (), file, "")
    model, prompt = videos.build("video_llava"), videos.prompt("video_llava")
    seen = {}
    for recipe in expand(listed, [0.5], [0]):
        with foveate.apply(model, recipe.build()) as session:
            model(**prompt)
        seen[recipe.id] = session.trace.visual_tokens[0].tolist()
    sparse, *others = seen.values()
    assert sparse[:2] == [68, 68]
    assert 0 < sparse[2] == sparse[5] < 20  # the question has 9 words, and some tokens come back merged
    fewer = [[68, 68, 68, 0, 0, 0], *([n + 4] * 6 for n in (32, 16, 16, 10, 16 + 3 * 4, 6))]
    assert others == fewer
