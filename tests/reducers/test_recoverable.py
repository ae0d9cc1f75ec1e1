"""Recoverable Compression against loops; its scorers, with tiny companions, against the companions' own outputs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.nn.functional import normalize

import foveate
from foveate.engine.families.parts import resolve
from foveate.engine.families.pixels import unfold_stream
from foveate.ops.outliers import THRESHOLD, local_outlier_factor
from foveate.ops.recoverable import apportion
from foveate.reducers.recoverable import Recoverable
from foveate.reducers.similarity import CompanionSimilarity, llm_similarity, questions
from foveate.reduction import View, bind
from tests import families
from tests.parity import _tower as synthetic
from tests.reducers import tower
from tests.reference.checks import build_once


# ------------------------------------------------------------------------------------------------------- the method
def outliers(values: list[float], neighbours: int) -> int:
    return int((local_outlier_factor(torch.tensor([values]), neighbours) > THRESHOLD).sum()) if values else 0


def similarity(view: View) -> Tensor:
    """Something with outliers that depends on the words."""
    return llm_similarity(view).pow(3) * 20


def twin(view: View, block: int, budget: int):
    low, high = min(view.vision), max(view.vision)
    a, alive = tower.attention(view, high, block), tower.tokens(view, block)
    patches = view.vision[high]
    s = similarity(view)[patches.rows[block], patches.slots[block].clamp_min(0)].tolist()
    x, _ = tower.states(view, low, block)

    def steps(counts: list[int] | None) -> tuple[list[int], list[int], list[int], list[int]]:
        n = outliers([a[j] for j in alive], 20) if counts is None else counts[0]
        visual = tower.best(alive, a, n)
        left = [j for j in alive if j not in visual]
        n = outliers([s[j] for j in left], 20) if counts is None else counts[1]
        text = tower.best(left, s, n)
        rest = [j for j in left if j not in text]
        n = outliers([a[j] for j in rest], 10) if counts is None else counts[2]
        centres = tower.best(rest, a, n)
        return visual, text, centres, [j for j in rest if j not in centres]

    visual, text, centres, rest = steps(None)
    pooled = bool(rest)
    if budget >= 0:
        pooled = 1 < budget < len(alive)
        weights = torch.tensor([[len(visual), len(text), len(centres)]])
        counts = apportion(weights, torch.tensor([budget - pooled]))[0].tolist()
        visual, text, centres, rest = steps(counts if budget < len(alive) else [budget, 0, 0])
    groups = {}
    for c in centres:
        near = tower.nearest(patches.key[block].flatten(1), c, rest, 5, [1.8 * value for value in s])
        groups[c] = (near, tower.weighted_group(x, a, [c, *near]))
    if pooled:
        groups[rest[-1]] = (rest, tower.weighted_group(x, a, rest))
    return visual + text, groups


@pytest.mark.parametrize("keep", [7, 0.4, 1, None])
@pytest.mark.parametrize("name", tower.FAMILIES)
def test_recoverable(name: str, keep: int | float | None):
    trace = tower.check(name, Recoverable(keep=keep, similarity=similarity, neighbours=5), twin, keep)
    if isinstance(keep, int):
        assert trace.visual_tokens[:, 0].tolist() == [keep, 2 * keep]


@pytest.mark.parametrize("make", [lambda: Recoverable(keep=5), Recoverable])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_next"])
def test_batch_equals_singles(name: str, make):
    tower.assert_batch_equals_singles(name, make)


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_keeping_everything(name: str):
    tower.assert_keeping_everything_changes_nothing(name, lambda: Recoverable(keep=1.0))


@pytest.mark.parametrize("keep", [None, 20, 0.1])
def test_the_question_gets_patches_back(keep: int | float | None):
    """Patches that stand out by nothing but their similarity to the question stay."""
    generator = torch.Generator().manual_seed(0)
    features, scores = torch.randn(1, 144, 16, generator=generator), torch.rand(1, 144, generator=generator)
    attention = torch.rand(1, 1, 144, generator=generator)
    attention[0, 0, [5, 80]], attention[0, 0, [40, 100]] = 9.0, 0.01
    scores[0, [40, 100]] = 7.0

    def scorer(view: View) -> Tensor:
        return torch.zeros(view.active.shape).index_copy(1, synthetic.BEFORE + torch.arange(144), scores)

    read = synthetic.patches(144, 1, attention=attention, key=features[:, :, None], features=features)
    decision, left = synthetic.decide(Recoverable(keep=keep, similarity=scorer), {-1: read, -2: read}, features)
    kept = decision.keep[0, synthetic.BEFORE : synthetic.BEFORE + 144]
    assert bool(kept[[5, 80, 40, 100]].all())
    assert all(bool((left[0] == features[0, j]).all(1).any()) for j in (5, 80, 40, 100)), "as they were"
    assert len(left[0]) == {None: len(left[0]), 20: 20, 0.1: 14}[keep]


# ------------------------------------------------------------------------------------------------------- companions
WORDS = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "what", "is", "this", "?", *map(str, range(140))])}


def tokenizer() -> hf.PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel(WORDS, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


TEXT = {
    "vocab_size": 160, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 12, "projection_size": 24, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
SIGHT = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}


def clip(size: int = 32) -> hf.CLIPModel:
    config = hf.CLIPConfig(text_config=TEXT, vision_config={**SIGHT, "image_size": size}, projection_dim=20)
    return families.spread_weights(hf.CLIPModel(config))


def siglip(size: int = 32) -> hf.SiglipModel:
    return families.spread_weights(
        hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config={**SIGHT, "image_size": size}))
    )


def scores_of(name: str, scorer: CompanionSimilarity, batch: int = 2) -> tuple[Tensor, dict, View]:
    model = build_once(name)
    inputs = families.inputs(name, model, batch=batch)
    reducer = Recoverable(keep=5, similarity=scorer)
    view = tower.look(model, inputs, reducer)
    return bind(scorer, resolve(model))(view), inputs, view


@torch.no_grad()
def test_clip_scores_are_cosines_of_its_own_embeddings():
    companion, asked = clip(), ["what is this ? </s>", "is 1 this </s>"]
    scores, inputs, _ = scores_of("llava", CompanionSimilarity((companion, tokenizer()), question=asked))
    words = tokenizer()(asked, return_tensors="pt", padding=True)
    text = normalize(
        companion.text_projection(
            companion.text_model(input_ids=words["input_ids"], attention_mask=words["attention_mask"]).pooler_output
        ),
        dim=-1,
    )
    states = companion.vision_model(inputs["pixel_values"]).last_hidden_state[:, 1:]
    sight = normalize(companion.visual_projection(companion.vision_model.post_layernorm(states)), dim=-1)
    expected = (sight @ text[..., None])[..., 0]
    visual = families.visual_slots(inputs["input_ids"])
    torch.testing.assert_close(scores[visual].view(2, 16), expected)
    assert not bool(scores[~visual].any())


@torch.no_grad()
def test_the_official_text_vector():
    """First line of the prompt, padded, last place; patches without the last norm; cosine / sqrt(width)."""
    companion = clip()
    decoder = SimpleNamespace(decode=lambda ids, skip_special_tokens: "what is\nthis ?")
    scorer = CompanionSimilarity((companion, tokenizer()), tokenizer=decoder, official=True)
    scores, inputs, _ = scores_of("llava", scorer)
    words = tokenizer()(["what is"] * 2, return_tensors="pt", padding="max_length", max_length=12)
    last = companion.text_model(input_ids=words["input_ids"]).last_hidden_state[:, -1]
    text = normalize(companion.text_projection(last), dim=-1)
    states = companion.vision_model(inputs["pixel_values"]).last_hidden_state[:, 1:]
    sight = normalize(companion.visual_projection(states), dim=-1)
    expected = (sight @ text[..., None])[..., 0] * 20**-0.5
    torch.testing.assert_close(scores[families.visual_slots(inputs["input_ids"])].view(2, 16), expected)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("name", [*tower.FAMILIES, "idefics3", "llava_onevision"])
def test_companions_of_any_resolution_serve_any_family(name: str, kind: str):
    companion = (clip if kind == "clip" else siglip)(48)
    reducer = Recoverable(keep=5, question="what is this ?", **{kind: (companion, tokenizer())})
    assert tower.counts(name, reducer, batch=2) == [5, 5]


def test_beams_see_their_own_image():
    model = build_once("llava")
    inputs = families.inputs("llava", model, batch=2)
    reducer = Recoverable(keep=5, question="what", clip=(clip(), tokenizer()))
    with foveate.apply(model, reducer) as session, torch.no_grad():
        model(**inputs)
        kept = session.trace.kept(-1)
        model.generate(**inputs, max_new_tokens=1, num_beams=3, do_sample=False, pad_token_id=0)
    assert torch.equal(session.trace.kept(-1), kept.repeat_interleave(3, 0))


def test_a_local_folder(tmp_path: Path):
    clip().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    counts = tower.counts("llava", Recoverable(keep=5, clip=str(tmp_path), question="what"), batch=2)
    assert counts == [5, 5]


def test_a_companion_that_is_not_there(tmp_path: Path):
    reducer = Recoverable(keep=5, clip=str(tmp_path / "nothing"), question="what")
    with pytest.raises(foveate.OptionError, match=r"clip='.*nothing' cannot be loaded") as error:
        foveate.apply(build_once("llava"), reducer)
    assert "\n" not in str(error.value)
    with pytest.raises(foveate.OptionError, match="clip=LlavaForConditionalGeneration"):
        foveate.apply(
            build_once("llava"), Recoverable(keep=5, clip=(build_once("llava"), tokenizer()), question="what")
        )
    for kind, other, companion in (("clip", "siglip", siglip()), ("siglip", "clip", clip())):
        method = Recoverable(keep=5, question="what", **{kind: (companion, tokenizer())})
        with pytest.raises(foveate.OptionError, match=f"{kind}=.*: give it as {other}="):
            foveate.apply(build_once("llava"), method)


def test_pictures_come_back_from_a_stream_of_patches():
    grid, merge, p = (4, 6), 2, 8
    picture = torch.randn(3, 32, 48)
    patches = [
        picture[:, y * p : y * p + p, x * p : x * p + p]
        for top in range(0, grid[0], merge) for left in range(0, grid[1], merge)
        for y in (top, top + 1) for x in (left, left + 1)
    ]  # fmt: skip
    stream = torch.stack([patch[:, None].expand(-1, 2, -1, -1).flatten() for patch in patches])
    config = SimpleNamespace(spatial_merge_size=merge, patch_size=p, temporal_patch_size=2)
    (found,) = unfold_stream(stream, torch.tensor([[1, 4, 6]]), config)
    assert torch.equal(found, picture)


# ------------------------------------------------------------------------------------------------------ the question
class Letters:
    """A tokenizer for which every id is a letter."""

    def decode(self, ids: Tensor, skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids.tolist()))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("system USER: ", "\nWhat is it?\nAnswer in one word. ASSISTANT:", "What is it?\nAnswer in one word."),
        ("", "What is it?<|im_end|>\n<|im_start|>assistant\n", "What is it?"),
        ("USER: What is it? ", "", "USER: What is it?"),
    ],
)
def test_the_question_is_what_follows_the_image(before: str, after: str, expected: str):
    ids = torch.tensor([[0, *map(ord, before), 7, 7, *map(ord, after)]])
    visual, tokens = ids == 7, ids != 0
    view = View(-1, torch.zeros(*ids.shape, 2), tokens, visual, tokens, info={"input_ids": ids})
    assert questions(view, None, Letters()) == [expected]
    assert questions(view, "other", None) == ["other"]
    assert questions(view, lambda view: ["mine"], None) == ["mine"]
    first = questions(view, None, Letters(), official=True)
    assert first == [(before + after).split("\n")[0]]
    with pytest.raises(foveate.OptionError, match="2 questions for 1 rows"):
        questions(view, ["a", "b"], None)
    with pytest.raises(foveate.UnsupportedError, match="input_ids"):
        questions(View(-1, view.hidden, tokens, visual, tokens), None, Letters())


# ----------------------------------------------------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"similarity": "clip"}, "similarity='clip' needs a companion"),
        ({"similarity": "siglip"}, "siglip= a hub id"),
        ({"similarity": "words"}, "similarity='words'"),
        ({"clip": "somewhere"}, "clip= must read the question: give tokenizer="),
        ({"clip": 3, "question": "what"}, "clip= takes a hub id"),
        ({"clip": "a", "siglip": "b"}, "clip= and siglip="),
        ({"clip": "a", "similarity": "llm"}, "needs no companion"),
        ({"neighbours": 0}, "neighbours=0"),
        ({"text_weight": "much"}, "text_weight='much'"),
        ({"variant": "third"}, "variant='third'"),
        ({"variant": "union"}, "variant='union'"),
        ({"faithful": True, "keep": 4}, "keep=4"),
        ({"faithful": True}, "faithful=True needs the official companion"),
    ],
)
def test_bad_options(options: dict, culprit: str):
    with pytest.raises(foveate.OptionError, match=culprit):
        Recoverable(**options)


def test_bad_budgets():
    with pytest.raises(foveate.BudgetError, match="keep"):
        Recoverable(keep=0)


def test_faithful_runs_in_a_batch():
    official = Recoverable(faithful=True, similarity=similarity)
    counts = tower.counts("llava", official, batch=3)
    assert all(0 <= n <= 16 for n in counts)
    with pytest.raises(foveate.UnsupportedError, match="CLS token"):
        tower.counts("paligemma", Recoverable(faithful=True, similarity=similarity))
