"""What differs between versions of transformers: each form is simulated here, whatever version is installed."""

from types import SimpleNamespace

import pytest
import torch
from transformers.cache_utils import DynamicCache

from foveate.engine.compat import given_cache, returned_cache
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


def test_a_layer_that_is_shorter_already_stays():
    layer = LogicalLayer()
    layer.announce(torch.tensor([[0, 1, 4]]), None, 5)
    layer.update(torch.ones(1, 1, 3, 1), torch.ones(1, 1, 3, 1))
    layer.crop(9)
    assert layer.get_seq_length() == 5
    assert layer.physical_length() == 3
