"""PuMer inside ViLT, METER and BridgeTower: fewer tokens, the same in a batch as alone, nothing left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate
from foveate.engine.cross_modal.parts import EncoderMethod, resolve_encoder
from foveate.engine.cross_modal.session import EncoderSession
from foveate.ops.bipartite import soft_matching
from foveate.ops.pumer import masked_softmax
from foveate.reducers.pumer import PuMer
from foveate.reduction import OptionError, UnsupportedError, build
from tests.families import build as build_vlm
from tests.reducers.encoders import ENCODERS, LENGTHS, TOKENS, answer, encoder, inputs, one_row
from tests.reference.checks import footprint, largest
from tests.reference.pumer import image_groups, pooled, text_groups

TOLERANCE = 1e-4
SETTING = {"layers": [1, 2], "prune_r": 0.2, "merge_r": 0.3, "merge_text": 0.2}
LEFT = [37, 37, 19, 9]
WORDS = [[11, 11, 9, 7], [6, 6, 5, 4], [9, 9, 7, 6]]


def pumer(**options: Any) -> PuMer:
    return PuMer(**{**SETTING, **options})


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_fewer_tokens_and_nothing_left_behind(name: str) -> None:
    model = encoder(name)
    prompt = inputs(model)
    full, before = answer(model, prompt), footprint(model)
    joint = name.startswith("Vilt")
    base = model.base_model
    last = base.encoder.layer[3].output if joint else base.cross_modal_image_layers[3].intermediate
    lengths: list[int] = []
    with EncoderSession(model, pumer()) as session:
        hook = last.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1]))
        reduced = answer(model, prompt)
        hook.remove()
    passes = 2 if "ImagesAndText" in name else 1
    assert len(session.traces) == passes
    for trace in session.traces:
        assert trace.visual_tokens[:, :4].tolist() == [LEFT] * 3
        assert trace.text_tokens[:, :4].tolist() == WORDS
        assert trace.mean_visual_tokens[0] == trace.visual_tokens[0].double().mean()
        assert bool((trace.places[2][:, 0] == 0).all()), "class token"
        assert [len(set(row) - {-1}) for row in trace.places[2].tolist()] == [LEFT[3]] * 3
        kept, places = trace.kept(2), trace.places[2]
        assert bool(kept[:, 0].all()), "the class token is one"
        for mine, place in zip(kept, places):
            assert mine.nonzero()[:, 0].tolist() == sorted(place.tolist().index(p) for p in place[place >= 0].unique())
        with pytest.raises(ValueError, match="nothing is reduced up to layer -1"):
            trace.kept(-1)
    computed = LEFT[3] + (max(words[3] for words in WORDS) if joint else 0)
    assert lengths == [computed] * passes
    assert reduced.shape == full.shape
    assert largest(reduced - full) > 1e-4, "the reduction has no effect: the check would be vacuous"
    assert footprint(model) == before
    assert torch.equal(answer(model, prompt), full)


@pytest.mark.parametrize("options", [{}, {"sim_method": "qk", "merge_style": "diff"}, {"merge_text": 0}], ids=str)
@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_batch_equals_singles(name: str, options: dict[str, Any]) -> None:
    model = encoder(name)
    prompt = inputs(model)
    with EncoderSession(model, pumer(**options)):
        together = answer(model, prompt)
        for row in range(len(LENGTHS)):
            alone = answer(model, one_row(prompt, row))
            if "Contrastive" in name:  # compares the rows with each other only in its loss
                alone = alone[:1]
            assert largest(alone[0] - together[row]) <= TOLERANCE, row


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_ratios_of_zero_are_bitwise_the_model(name: str, faithful: bool) -> None:
    model = encoder(name)
    prompt = inputs(model)
    full = answer(model, prompt)
    with EncoderSession(model, PuMer(prune_r=0, merge_r=0, merge_text=0, faithful=faithful)) as session:
        assert torch.equal(answer(model, prompt), full)
        assert session.trace.visual_tokens.unique().tolist() == [TOKENS]


@pytest.mark.parametrize("name", ["ViltModel", "MeterModel", "BridgeTowerModel"])
@torch.no_grad()
def test_attention_alone_changes_nothing(name: str) -> None:
    """Ratios too small to remove a token: SDPA under our masks computes what the model does."""
    model = encoder(name)
    prompt = inputs(model)
    full = answer(model, prompt)
    with EncoderSession(model, pumer(prune_r=0.001, merge_r=0.001, merge_text=0.001)) as session:
        assert largest(answer(model, prompt) - full) <= TOLERANCE
        torch.manual_seed(3)
        maps = model(**prompt, output_attentions=True).attentions
    assert session.trace.visual_tokens.unique().tolist() == [TOKENS]
    torch.manual_seed(3)
    expected = model(**prompt, output_attentions=True).attentions
    for ours, theirs in zip(maps, expected):
        pairs = zip(ours, theirs) if isinstance(ours, tuple) else [(ours, theirs)]
        for a, b in pairs:
            assert b is None or largest(a - b) <= TOLERANCE


@torch.no_grad()
def test_images_of_several_sizes() -> None:
    """ViLT pads images in a batch; the padding is neither counted nor kept."""
    model = encoder("ViltForQuestionAnswering")
    prompt = inputs(model)
    mask = torch.zeros(3, 48, 48, dtype=torch.long)
    sizes = [(48, 48), (32, 40), (48, 24)]
    for row, (height, width) in enumerate(sizes):
        mask[row, :height, :width] = 1
    prompt["pixel_values"] = prompt["pixel_values"] * mask[:, None]
    with EncoderSession(model, pumer()) as session:
        together = answer(model, {**prompt, "pixel_mask": mask})
        counts = session.trace.visual_tokens
        for row, (height, width) in enumerate(sizes):
            alone = one_row(prompt, row)
            alone["pixel_values"] = alone["pixel_values"][:, :, :height, :width]
            alone["pixel_mask"] = torch.ones(1, height, width, dtype=torch.long)
            assert largest(answer(model, alone)[0] - together[row]) <= TOLERANCE
            assert torch.equal(session.trace.visual_tokens[0], counts[row])
            assert session.trace.patches.shape == (1, height * width // 64, 2)


@torch.no_grad()
def test_the_image_that_looks_at_merged_words_sees_no_padding() -> None:
    model = encoder("MeterForQuestionAnswering")
    prompt = inputs(model)
    model.config.image_sees_text = "after"
    try:
        with EncoderSession(model, pumer()):
            together = answer(model, prompt)
            alone = torch.cat([answer(model, one_row(prompt, row)) for row in range(len(LENGTHS))])
    finally:
        model.config.image_sees_text = "before"
    assert largest(together - alone) <= TOLERANCE


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("name", ["ViltForQuestionAnswering", "MeterForQuestionAnswering", "BridgeTowerModel"])
@torch.no_grad()
def test_half_precision(name: str, faithful: bool) -> None:
    model = copy.deepcopy(encoder(name)).bfloat16()
    prompt = inputs(model)
    prompt["pixel_values"] = prompt["pixel_values"].bfloat16()
    with EncoderSession(model, pumer(faithful=faithful)) as session:
        out = answer(model, prompt)
    assert out.dtype == torch.bfloat16
    assert bool(out.isfinite().all())
    assert session.trace.visual_tokens[:, :4].tolist() == [LEFT] * 3


# ------------------------------------------------------------------------------------------- against the slow twin
def _scores(method: PuMer, maps: Tensor, key: Tensor, query: Tensor, words: int) -> Tensor:
    if method.sim_method == "km":
        return key[words:] @ key[:words].mean(0)
    if method.sim_method == "qk":
        return key[words:] @ query.mean(0)
    heads = maps[:1] if method.sim_method == "first_head" else maps
    return heads[:, :words, words:].mean((0, 1))


def _slow_vilt(model: nn.Module, prompt: dict[str, Tensor], method: PuMer) -> Tensor:
    """One pair, with the model's own attention and token-by-token reductions."""
    torch.manual_seed(3)
    pixels = prompt["pixel_values"]
    x, _ = model.embeddings(
        prompt["input_ids"], prompt["attention_mask"], None, pixels, torch.ones_like(pixels[:, 0]), None, None
    )
    words = prompt["input_ids"].shape[1]
    for i, layer in enumerate(model.encoder.layer):
        normed = layer.layernorm_before(x)
        out, maps = layer.attention(normed, None, True)
        x = x + out
        if i in method.layers:
            self_attention = layer.attention.attention
            key = self_attention.key(normed)[0].unflatten(1, (4, -1)).mean(1)
            query = self_attention.query(normed)[0, :words].unflatten(1, (4, -1)).mean(1)
            scores = _scores(method, maps[0], key, query, words)
            groups, average = image_groups(scores, key[words:], method.prune_r, method.merge_r, method.merge_style)
            text = pooled(x[0, :words], text_groups(key[:words], method.merge_text))
            x = torch.cat([text, pooled(x[0, words:], groups, average)])[None]
            words = len(text)
        x = layer.output(layer.intermediate(layer.layernorm_after(x)), x)
    return model.layernorm(x)


@pytest.mark.parametrize("style", ["tome", "tip", "diff"])
@pytest.mark.parametrize("sim_method", ["mean_head", "first_head", "km", "qk"])
@torch.no_grad()
def test_vilt_is_its_slow_twin(sim_method: str, style: str) -> None:
    model = encoder("ViltModel")
    method = pumer(sim_method=sim_method, merge_style=style)
    prompt = one_row(inputs(model), 0)
    expected = _slow_vilt(model, prompt, method)
    with EncoderSession(model, method):
        torch.manual_seed(3)
        actual = model(**prompt).last_hidden_state
    assert actual.shape == expected.shape
    assert largest(actual - expected) <= TOLERANCE


def _slow_cross(
    layer: Any, text: Tensor, image: Tensor, heads: int = 4, sim_method: str = "mean_head"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Text after it looked at the image, scores of the image, keys of text and image; plain matrices."""

    def look(attention: Any, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = attention.self
        q, k, v = (
            p(y)[0].unflatten(1, (heads, -1)).transpose(0, 1)
            for p, y in ((parts.query, x), (parts.key, other), (parts.value, other))
        )
        maps = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        return attention.output((maps @ v).transpose(0, 1).flatten(1)[None], x), maps, k.mean(0)

    text, _, text_key = look(layer.attention, text, text)
    words, parts = text, layer.crossattention.self
    text, maps, image_key = look(layer.crossattention, text, image)
    scores = maps[: 1 if sim_method == "first_head" else heads].mean((0, 1))
    if sim_method in ("km", "qk"):
        asks = (parts.key if sim_method == "km" else parts.query)(words)[0]
        scores = image_key @ asks.unflatten(1, (heads, -1)).mean((0, 1))
    return text, scores, text_key, image_key


@pytest.mark.parametrize(
    ("sees", "sim_method"),
    [("before", "mean_head"), ("after", "mean_head"), ("after", "first_head"), ("before", "km"), ("before", "qk")],
)
@torch.no_grad()
def test_meter_is_its_slow_twin(sees: str, sim_method: str) -> None:
    model = encoder("MeterModel")
    method, prompt = pumer(sim_method=sim_method), one_row(inputs(model), 0)
    model.config.image_sees_text = sees
    try:
        states = model(**prompt, output_hidden_states=True).hidden_states
        text, image = states[0]
        for i, (one, other) in enumerate(zip(model.cross_modal_text_layers, model.cross_modal_image_layers)):
            entered = text
            text, scores, text_key, image_key = _slow_cross(one, text, image, sim_method=sim_method)
            if i in method.layers:
                groups, _ = image_groups(scores, image_key, method.prune_r, method.merge_r)
                text = pooled(text[0], text_groups(text_key, method.merge_text))[None]
                image = pooled(image[0], groups)[None]
            text = one.output(one.intermediate(text), text)
            image = _slow_cross(other, image, entered if sees == "before" else text)[0]
            image = other.output(other.intermediate(image), image)
        with EncoderSession(model, method):
            output = model(**prompt)
    finally:
        model.config.image_sees_text = "before"
    assert output.image_features.shape == image.shape == (1, LEFT[3], 32)
    assert largest(output.text_features - text) <= TOLERANCE
    assert largest(output.image_features - image) <= TOLERANCE


@torch.no_grad()
def test_bridges_follow_what_was_merged() -> None:
    """States that BridgeTower's own towers add are reduced like the tokens they are added to."""
    model = encoder("BridgeTowerModel")
    prompt, seen = one_row(inputs(model), 0), []
    tower = model.cross_modal_image_link_tower[1]  # before co-attention layer 2, so behind the reduction in layer 1
    hook = tower.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with EncoderSession(model, pumer(merge_r=0, merge_text=0)) as session:
        # This hook runs after the session's own, and sees what the bridge computes on.
        later = tower.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        model(**prompt)
        later.remove()
    hook.remove()
    full, reduced = seen
    places = session.trace.places[1][0]
    assert reduced.shape[1] == int((places >= 0).sum()) == 30
    for token, place in enumerate(places.tolist()):
        if place >= 0:
            assert torch.equal(reduced[0, place], full[0, token])


# -------------------------------------------------------------------------------------------------------- faithful
@torch.no_grad()
def test_official_masks_travel_through_the_layers() -> None:
    """Padded rows, two reductions: what the golden files show for one block, for the whole model."""
    model = encoder("ViltModel")
    method, prompt = pumer(faithful=True), inputs(model)
    words = prompt["attention_mask"].float()
    torch.manual_seed(3)
    pixels = prompt["pixel_values"]
    x, mask = model.embeddings(prompt["input_ids"], words, None, pixels, torch.ones_like(pixels[:, 0]), None, None)
    for i, layer in enumerate(model.encoder.layer):
        parts, normed, length = layer.attention.attention, layer.layernorm_before(x), words.shape[1]
        q, k, v = (p(normed).unflatten(2, (4, -1)).transpose(1, 2) for p in (parts.query, parts.key, parts.value))
        maps = masked_softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, mask)
        x = x + layer.attention.output((maps @ v).transpose(1, 2).flatten(2), x)
        if i in method.layers:
            key, image, tokens = k.mean(1), x[:, length:], x.shape[1] - length
            scores = maps[:, :, :length, length:].mean(1).sum(1)
            best = scores.topk(tokens - round(0.2 * tokens), dim=1).indices[..., None]
            merging = soft_matching(
                key[:, length:].gather(1, best.expand(-1, -1, 8)), round(0.3 * tokens), class_token=True
            )
            image = merging.mean(image.gather(1, best.expand(-1, -1, 32)))[0]
            merging = soft_matching(key[:, :length], round(0.2 * length), class_token=True)
            words = merging.mean(words[..., None])[0][..., 0]
            x = torch.cat([merging.mean(x[:, :length])[0], image], 1)
            mask = torch.cat([words, torch.ones(image.shape[:2])], 1)
        x = layer.output(layer.intermediate(layer.layernorm_after(x)), x)
    assert bool(((words > 0) & (words < 1)).any()), "no word merged with padding: the check would be weaker"
    with EncoderSession(model, method):
        torch.manual_seed(3)
        actual = model(**prompt).last_hidden_state
    assert largest(actual - model.layernorm(x)) <= TOLERANCE


@pytest.mark.parametrize("name", ["ViltForQuestionAnswering", "MeterForQuestionAnswering", "BridgeTowerModel"])
@torch.no_grad()
def test_the_official_reading_differs_and_still_runs(name: str) -> None:
    model = encoder(name)
    prompt = inputs(model)
    with EncoderSession(model, pumer(faithful=True)) as official:
        theirs = answer(model, prompt)
    with EncoderSession(model, pumer()):
        ours = answer(model, prompt)
    assert official.trace.visual_tokens[:, :4].tolist() == [LEFT] * 3, "the same number of tokens"
    assert largest(theirs - ours) > 1e-3
    assert not bool((official.trace.places[2][:, 0] == 0).all()), "the class token has no privilege"


@torch.no_grad()
def test_ratios_work_alone_only_in_the_sane_reading() -> None:
    model = encoder("MeterModel")
    prompt = inputs(model)
    for options, official, ours in (
        ({"merge_r": 0}, TOKENS, 24),
        ({"prune_r": 0}, TOKENS, 18),
    ):
        for faithful, expected in ((True, official), (False, ours)):
            with EncoderSession(model, pumer(**options, faithful=faithful)) as session:
                model(**prompt)
            assert session.trace.visual_tokens[0, 3] == expected, (options, faithful)


# ---------------------------------------------------------------------------------------------- settings, refusals
@pytest.mark.parametrize(
    ("name", "task", "layers", "ratios"),
    [
        ("ViltModel", "vqav2", {1, 2, 4}, [0.1, 0.3, 0.2]),
        ("ViltModel", "snli-ve", {1, 2, 3, 4}, [0.1, 0.3, 0.2]),
        ("MeterModel", "vqav2", {0, 1, 2}, [0.2, 0.2, 0.2]),
        ("MeterModel", "nlvr2", {0, 1, 2}, [0.3, 0.5, 0.2]),
        ("MeterModel", "snli-ve", {0, 1, 2}, [0.3, 0.5, 0.2]),
    ],
)
def test_settings_of_the_paper_scale_with_depth(name: str, task: str, layers: set[int], ratios: list[float]) -> None:
    method, anatomy = PuMer(task=task), resolve_encoder(encoder(name))
    assert method.encoder_layers(anatomy) == layers
    assert method._settings(anatomy)[1] == ratios


def test_settings_at_full_depth() -> None:
    anatomy = resolve_encoder(encoder("ViltModel"))
    deep = type(anatomy)(anatomy.model, anatomy.base, anatomy.text_layers * 2, ())
    for task, layers in (("vqav2", {2, 5, 8}), ("nlvr2", {2, 5, 8}), ("snli-ve", {2, 4, 6, 8})):
        assert PuMer(task=task).encoder_layers(deep) == PuMer(task=task, faithful=True).encoder_layers(deep) == layers
        assert PuMer(task=task)._settings(deep)[1] == [0.1, 0.3, 0.2]
    anatomy = resolve_encoder(encoder("MeterModel"))
    text, image = ((side * 2)[:6] for side in (anatomy.text_layers, anatomy.image_layers))
    deep = type(anatomy)(anatomy.model, anatomy.base, text, image)
    for task, layers in (("vqav2", {0, 1, 2, 3}), ("nlvr2", {1, 2, 3}), ("snli-ve", {0, 1, 2, 3})):
        assert PuMer(task=task).encoder_layers(deep) == layers


@pytest.mark.parametrize(
    "options",
    [{"task": "captions"}, {"sim_method": "cosine"}, {"merge_style": "mean"}, {"prune_r": 1.0}, {"merge_r": -0.1},
     {"merge_text": "0.2"}, {"prune_r": True}, {"layers": [-1]}, {"layers": "2"}, {"layers": [1.5]}],
    ids=str,
)  # fmt: skip
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        PuMer(**options)


def test_refusals() -> None:
    with pytest.raises(OptionError, match="no option 'keep'"):
        build("pumer", keep=3)
    with pytest.raises(OptionError, match="layer 9 does not exist"):
        EncoderSession(encoder("ViltModel"), pumer(layers=[9]))
    with pytest.raises(OptionError, match="retrieval"):
        EncoderSession(encoder("MeterModel"), PuMer(task="retrieval"))
    with pytest.raises(OptionError, match="official"):
        EncoderSession(encoder("MeterModel"), pumer(sim_method="qk", faithful=True))
    vlm = build_vlm("llava", "sdpa")
    with pytest.raises(UnsupportedError, match="ViLT, METER"):
        EncoderSession(vlm, pumer())
    with pytest.raises(UnsupportedError, match="ViLT, METER"):
        foveate.apply(vlm, pumer())
    with EncoderSession(encoder("ViltModel"), pumer()), pytest.raises(UnsupportedError, match="already"):
        EncoderSession(encoder("ViltModel"), pumer())


def test_heads_that_need_every_word() -> None:
    model = encoder("ViltForMaskedLM")
    before = footprint(model)
    with pytest.raises(UnsupportedError, match="merge_text=0"):
        EncoderSession(model, pumer())
    assert footprint(model) == before
    prompt = inputs(model)
    with EncoderSession(model, pumer(merge_text=0)):
        assert answer(model, prompt).shape == (3, 11, 50)


def test_undone_after_an_error() -> None:
    for name in ("ViltForQuestionAnswering", "MeterForQuestionAnswering", "BridgeTowerModel"):
        model = encoder(name)
        prompt, before = inputs(model), footprint(model)
        full = answer(model, prompt)
        broken = {**prompt, "pixel_values": prompt["pixel_values"][..., :5]}
        with pytest.raises((RuntimeError, ValueError)), EncoderSession(model, pumer()) as session:
            model(**broken)
        assert session._pass is None
        assert footprint(model) == before
        assert torch.equal(answer(model, prompt), full)


def test_gradients_and_checkpointing() -> None:
    for name in ("ViltForQuestionAnswering", "MeterForQuestionAnswering"):
        model = encoder(name)
        with EncoderSession(model, pumer()):
            answer(model, inputs(model)).square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)
        base = model.base_model
        layers = base.encoder.layer if name.startswith("Vilt") else base.cross_modal_text_layers
        assert largest(layers[0].attention.output.dense.weight.grad) > 0, "through the merges"
        model.zero_grad(set_to_none=True)
    model = encoder("ViltForQuestionAnswering")
    layers = model.vilt.encoder.layer
    for layer in layers:
        layer.gradient_checkpointing = True
    try:
        with EncoderSession(model.train(), pumer()), pytest.raises(UnsupportedError, match="checkpointing"):
            answer(model, inputs(model))
    finally:
        model.eval()
        for layer in layers:
            layer.gradient_checkpointing = False


def test_it_is_a_method_of_encoders() -> None:
    assert isinstance(pumer(), EncoderMethod)
    assert not isinstance(foveate.FastV(keep=3), EncoderMethod)
