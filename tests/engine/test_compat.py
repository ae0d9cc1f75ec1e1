"""What differs between versions of transformers: each form is simulated here, whatever version is installed."""

import copy
import functools
import logging
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from tests import families
from tests.reference.checks import build_once, checkpoint
from tests.reference.plans import Fixed
from transformers.cache_utils import DynamicCache

import foveate
from foveate.engine.compat import (
    SUPPORTED,
    check_arguments,
    check_checkpointing,
    check_version,
    given_cache,
    returned_cache,
)
from foveate.engine.decoder.cache import LogicalLayer


@pytest.mark.parametrize("name", ["cache", "past_key_values", "some_other_name"])
def test_the_cache_is_found_under_whatever_name(name):
    cache = DynamicCache()
    assert given_cache((torch.zeros(1),), {"attention_mask": None, name: cache}) is cache
    assert given_cache((torch.zeros(1), cache), {}) is cache
    assert given_cache((torch.zeros(1),), {name: None}) is None


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_returned_cache_is_found(name):
    cache = DynamicCache()
    assert returned_cache(SimpleNamespace(**{name: cache})) is cache
    assert returned_cache(SimpleNamespace(**{name: None})) is None


@pytest.mark.parametrize("asked", [-2, 8])
def test_a_layer_is_cropped_by_a_number_to_remove_and_by_a_length_to_leave(asked):
    layer = LogicalLayer()
    layer.announce(torch.tensor([[0, 1, 5, 6, 7, 8, 9]]), None, 10)  # slots 2, 3 and 4 were removed
    layer.update(torch.arange(7.0).view(1, 1, 7, 1), torch.arange(7.0).view(1, 1, 7, 1))
    layer.crop(asked)
    assert layer.get_seq_length() == 8
    assert layer.kept.tolist() == [[0, 1, 5, 6, 7]]
    assert layer.keys.flatten().tolist() == [0, 1, 2, 3, 4]


def test_a_layer_is_not_cropped_where_rows_differ():
    """Row 1 has a filler in what would go: as many tokens leave both rows, but not as many columns."""
    layer = LogicalLayer()
    layer.announce(torch.tensor([[0, 1, 2, 7, 8, 9], [0, 1, 7, 8, -1, 9]]), None, 10)
    layer.update(torch.ones(2, 1, 6, 1), torch.ones(2, 1, 6, 1))
    for length in (7, 8):
        with pytest.raises(foveate.UnsupportedError, match="cropped"):
            layer.crop(length)
    layer.crop(9)
    assert layer.kept.tolist() == [[0, 1, 2, 7, 8], [0, 1, 7, 8, -1]]


def test_a_layer_that_is_shorter_already_stays():
    layer = LogicalLayer()
    layer.announce(torch.tensor([[0, 1, 4]]), None, 5)
    layer.update(torch.ones(1, 1, 3, 1), torch.ones(1, 1, 3, 1))
    layer.crop(9)
    assert layer.get_seq_length() == 5
    assert layer.physical_length() == 3


# ------------------------------------------------------------------------------------------------------- the range
def test_the_range_is_that_of_pyproject():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert re.search(r'"transformers([^"]+)"', text)[1] == SUPPORTED
    assert SUPPORTED.contains(transformers.__version__)


@pytest.mark.parametrize("version", ["5.18.0", "5.23.0", "5.24.3"])
def test_tested_versions_pass_in_silence(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_version(Version(version))


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.17.0"])
def test_an_older_version_is_refused(version):
    with pytest.raises(foveate.UnsupportedError, match=rf"transformers {version}.*>=5\.18"):
        check_version(Version(version))


@pytest.mark.parametrize("version", ["5.25.0.dev0", "5.25.0", "6.1.0"])
def test_a_newer_version_is_a_warning(version):
    with pytest.warns(UserWarning, match=rf"transformers {version}.*<5\.25"):
        check_version(Version(version))


@pytest.mark.parametrize("method", [foveate.Random(keep=0.5), foveate.PuMer()], ids=["decoder", "encoder"])
def test_apply_checks_the_version(monkeypatch, method):
    old = functools.partial(check_version, Version("5.9.0"))
    monkeypatch.setattr("foveate.engine.apply.check_version", old)
    with pytest.raises(foveate.UnsupportedError, match=r"5\.9\.0"):
        foveate.apply(build_once("llava"), method)


def test_checkpointed_layers_are_refused_before_5_23():
    model = copy.deepcopy(build_once("llava")).train()
    layers = model.get_decoder().layers
    check_checkpointing(layers, Version("5.22.2"))
    checkpoint(model)
    check_checkpointing(layers, Version("5.23.0"))
    with pytest.raises(foveate.UnsupportedError, match=r"checkpointing.*5\.23"):
        check_checkpointing(layers, Version("5.22.2"))
    with torch.no_grad():
        check_checkpointing(layers, Version("5.22.2"))
    check_checkpointing(model.eval().get_decoder().layers, Version("5.22.2"))


def test_a_checkpointed_vision_encoder_is_right_or_refused():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=4
    )
    model = transformers.ViTModel(config).train()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def gradients():
        model.zero_grad()
        with foveate.apply(model, foveate.ToMe(keep=0.5)):
            model(pixels).last_hidden_state.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    checkpoint(model)
    if Version(transformers.__version__) < Version("5.23"):
        with pytest.raises(foveate.UnsupportedError, match=r"checkpointing.*5\.23"):
            gradients()
    else:
        again = gradients()
        assert len(again) == len(plain)
        assert all(torch.equal(a, b) for a, b in zip(plain, again))


def test_deprecations_in_the_log_of_transformers_are_errors(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.WARNING)  # commands may have made it quiet
    logging.getLogger("transformers").manager._clear_cache()
    with pytest.raises(FutureWarning, match="deprecated"):
        logging.getLogger("transformers.some_module").warning("`this` is deprecated")


# ------------------------------------------------------------------------------- arguments that nobody knows
B, S = 2, 11


@pytest.mark.parametrize("value", [torch.zeros(B, S), torch.zeros(B, S, 3), torch.zeros(B, 4), 11, "11", None])
def test_arguments_that_can_be_shortened_or_have_no_tokens_pass(value):
    check_arguments({"extra": value}, B, S)


@pytest.mark.parametrize(
    "value",
    [torch.zeros(S), torch.zeros(S, B), torch.zeros(3, B, S), (torch.zeros(1), torch.zeros(B, 1, S, S))],
    ids=["(S,)", "(S, B)", "(3, B, S)", "in a tuple"],
)
def test_an_argument_that_follows_the_tokens_otherwise_is_refused_by_name(value):
    with pytest.raises(foveate.UnsupportedError, match="extra of shape"):
        check_arguments({"extra": value}, B, S)
    check_arguments({"extra": value}, B, S, known=("extra",))


def test_packed_samples_are_refused_by_name():
    with pytest.raises(foveate.UnsupportedError, match=r"cu_seq_lens_q.*packed"):
        check_arguments({"cu_seq_lens_q": torch.tensor([0, 4, 11])}, B, S)


@torch.no_grad()
@pytest.mark.parametrize("shape", ["(S,)", "(3, B, S)"])
def test_a_model_with_an_unknown_argument_is_refused(shape):
    """As a new transformers may bring one: it reaches the layers through the keyword arguments of the decoder."""
    model = build_once("llava")
    prompt = families.inputs("llava", model)
    rows, length = prompt["input_ids"].shape
    removed = families.visual_slots(prompt["input_ids"])
    extra = torch.zeros(length) if shape == "(S,)" else torch.zeros(3, rows, length)

    def add(module, args, kwargs):
        return args, {**kwargs, "brand_new": extra}

    handles = [layer.register_forward_pre_hook(add, with_kwargs=True) for layer in model.model.language_model.layers]
    try:
        with foveate.apply(model, Fixed({1: removed})), pytest.raises(foveate.UnsupportedError, match="brand_new"):
            model(**prompt)
    finally:
        for handle in handles:
            handle.remove()
