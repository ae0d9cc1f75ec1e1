"""How many kernels a method's choice takes, how often the host waits for it, and how much memory it holds."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import foveate
from foveate.measure.launches import Launches, launches_of_choosing
from foveate.ops.attention import attention_received
from foveate.ops.determinantal import determinantal_points
from foveate.ops.diversity import farthest_points
from foveate.ops.merging import energy_pairs, merge_to_counts, soft_pairs
from foveate.ops.vispruner import remove_duplicates
from tests import devices, videos
from tests.families import build
from tests.launching import METHODS, on_pretended_device
from tests.reducers.test_on_videos import METHODS as ON_VIDEOS
from tests.reference.meters import peak_memory

LAYOUT = 1
"""Waits for where the images are: the engine's, the same for every method that asks."""
KERNELS = {"pitome": 170, "recoverable": 190, "fastvid": 215, "vidcom2": 165}
"""Where 150 are not enough: rounds of merging with an energy; four choices, two merges; density peaks; Gaussians."""
STAGES = {"chain": 2, "pyramiddrop": 3, "sparsevlm": 3, "sparsevlm, 1.0": 4, "sparsevlm, 2.0": 3}
"""Methods that choose several times in a prefill: the limit is for each time."""
WAITS = {"chain": 2, "pyramiddrop": 4, "sparsevlm": 7, "sparsevlm, 1.0": 9, "sparsevlm, 2.0": 7}
"""Of those: once to plan, and at each stage for the rows that are read and for what is left."""


@functools.cache
def counted(method: str, rows: int = 1, side: int = 24) -> Launches:
    return on_pretended_device(METHODS[method](), rows, side)


def test_every_method_is_counted():
    """PuMer works in encoders, in whose layers it has no stage."""
    assert set(foveate.names()) - {"pumer"} <= METHODS.keys() | ON_VIDEOS.keys()


@pytest.mark.parametrize("method", ON_VIDEOS)
def test_few_kernels_on_videos(method: str):
    prompt = videos.prompt("llava_onevision")
    videos.build("llava_onevision")
    with devices.Devices(), torch.no_grad():
        model = devices.shard(build("llava_onevision"), 99)
        there = {name: devices.Tagged(value, "meta:0") for name, value in prompt.items()}
        found = launches_of_choosing(model, ON_VIDEOS[method](0.4), lambda: model(**there), device="meta")
    assert found.kernels.total() <= KERNELS.get(method, 150), found.kernels.most_common()
    assert found.waits.total() <= 1 + LAYOUT, found.waits


@pytest.mark.parametrize("method", METHODS)
def test_few_kernels_and_one_wait(method: str):
    found = counted(method)
    limit = KERNELS.get(method, 150) * STAGES.get(method, 1)
    assert found.kernels.total() <= limit, found.kernels.most_common()
    assert found.waits.total() <= WAITS.get(method, 1) + LAYOUT, found.waits


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_ragged_batch_takes_no_more_waits(method: str):
    found, alone = counted(method, rows=3), counted(method)
    assert found.waits.total() <= alone.waits.total(), found.waits
    assert found.kernels.total() <= 1.25 * alone.kernels.total() + 20, found.kernels - alone.kernels


@pytest.mark.parametrize("method", METHODS)
def test_kernels_do_not_grow_with_the_tokens(method: str):
    """Of 144 tokens three quarters are to go, of 576 two thirds: as many rounds of merging."""
    small = on_pretended_device(METHODS[method](50), side=12)
    assert counted(method).kernels.total() <= small.kernels.total() + 8


def test_kernels_do_not_grow_with_what_stays():
    for method in ("cdpruner", "dart", "divprune", "vispruner"):
        few = on_pretended_device(METHODS[method](20)).kernels.total()
        assert abs(few - counted(method).kernels.total()) <= 8, method


# ------------------------------------------------------------------------------------------------------ the meter
def test_the_meter_counts_what_computes_and_what_waits():
    x = torch.randn(4, 6)
    with Launches() as found:
        y = x.view(24)[:12].reshape(3, 4)  # views
        torch.empty(3)
        y = y + 1
        y.sum().item()
        (y > 0).nonzero()
        y[y > 0]
        y.tolist()
        y.cpu()
    assert found.kernels == {"add": 1, "sum": 1, "gt": 2, "nonzero": 1, "index": 1}
    assert found.waits == {"_local_scalar_dense": 1, "nonzero": 1, "index": 1, "tolist": 1, "cpu": 1}


def test_on_a_device_host_arithmetic_is_free_and_uploads_wait():
    with devices.Devices():
        x = devices.Tagged(torch.ones(3), "meta:0")
        with Launches("meta") as found:
            torch.ones(3) + 1
            y = x * torch.tensor([1.0, 2.0, 3.0], device="meta:0")
            y.to("cpu")
            torch.ones(3).to("meta:0", non_blocking=True)
    assert found.kernels == {"copy": 3, "mul": 1}
    assert found.waits == {"tensor": 1, "to": 1}


# ------------------------------------------------------------------------------------------------------ memory
WIDTH = 32
TOKENS = 8192


def _choose(name: str, tokens: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, WIDTH, generator=generator)
    valid, counts = torch.ones(1, tokens, dtype=torch.bool), torch.tensor([tokens // 16])

    def merged(match: Callable) -> object:
        return merge_to_counts(x, valid.long(), valid, torch.tensor([tokens // 2]), match)

    order = torch.arange(tokens)[None]
    every: dict[str, Callable[[], object]] = {
        "cdpruner": lambda: determinantal_points(x, x[..., 0].abs(), valid, counts),
        "divprune": lambda: farthest_points(x, valid, counts),
        "pitome": lambda: merged(functools.partial(energy_pairs, margin=0.45)),
        "received": lambda: attention_received(x[:, None], x[:, None], 0.1),
        "tome": lambda: merged(soft_pairs),
        "vispruner": lambda: remove_duplicates(x, order, torch.tensor([tokens]), counts, (tokens + 71) // 72),
    }
    return every[name]


@pytest.mark.parametrize("name", ["cdpruner", "divprune", "pitome", "received", "tome", "vispruner"])
def test_memory_is_linear_in_the_tokens(name: str):
    """Far below one map of all pairs, which at 8,192 tokens is 268 MB; blocks of it are at most 34."""
    held = peak_memory(_choose(name, TOKENS))
    assert held <= 140e6, held
    assert held <= 2.2 * peak_memory(_choose(name, TOKENS // 2)) + 2e6


def _largest_tensor(run: Callable[[], object]) -> int:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Sizes(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.most = max(self.most, *(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)), 0)
            return result

    with Sizes() as sizes:
        run()
    return sizes.most


@pytest.mark.parametrize("name", ["cdpruner", "divprune", "pitome", "tome", "vispruner"])
def test_no_map_of_all_pairs(name: str):
    assert _largest_tensor(_choose(name, TOKENS)) <= 1024 * TOKENS
