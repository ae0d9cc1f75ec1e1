"""What differs between the versions of transformers that Foveate runs on, and which versions these are.

* 5.24 calls the KV cache `cache` wherever it was `past_key_values` before: arguments of decoders and layers, outputs.
* 5.23 checkpoints a layer's `forward`; before, its whole `__call__`, so that hooks of the layer run again backwards.
* 5.20 takes no positive number in `crop` of a cache. Before 5.15 that was the only way, and said what is to be left; a
  negative one says how many tokens go. `LogicalLayer.crop` takes both.
* 5.18 lets `generate` encode images beforehand and hands them on as `mm_encoder_outputs`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import Tensor
from transformers.cache_utils import Cache

from ..reduction import UnsupportedError

try:  # private: asked only whether somebody collects hidden states in this call
    from transformers.utils.output_capturing import _active_collector as active_collector
except ImportError:  # a version too old; `check_version` says so
    active_collector: Any = None  # type: ignore[no-redef]

__all__ = [
    "CACHE_NAME",
    "SUPPORTED",
    "active_collector",
    "check_arguments",
    "check_checkpointing",
    "check_version",
    "given_cache",
    "returned_cache",
]

SUPPORTED = SpecifierSet(">=5.18,<5.25")
"""The same as in pyproject.toml; `make test-oldest` and `make test-newest` run the engine's tests at both ends."""

_VERSION = Version(transformers.__version__)
_CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = _CACHE_NAMES[0] if _VERSION.release >= (5, 24) else _CACHE_NAMES[1]
"""The argument by which this transformers hands a KV cache to models, decoders and layers."""

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


def check_version(version: Version = _VERSION) -> None:
    """Refuse a transformers older than the range, warn of a newer one. Raises `UnsupportedError`."""
    if SUPPORTED.contains(version, prereleases=True):
        return
    found = f"transformers {version} is installed; Foveate is tested with transformers{SUPPORTED}"
    if all(version < Version(bound.version) for bound in SUPPORTED):
        raise UnsupportedError(f"{found}, and older versions give wrong answers: pip install -U transformers")
    warnings.warn(f"{found}. What changed since may give errors or wrong answers.", UserWarning, stacklevel=3)


def check_checkpointing(modules: Iterable[Any], version: Version = _VERSION) -> None:
    """Refuse checkpointed layers whose hooks would run again in the backward pass. Raises `UnsupportedError`."""
    if version.release >= (5, 23) or not torch.is_grad_enabled():
        return
    if any(module.training and getattr(module, "gradient_checkpointing", False) for module in modules):
        raise UnsupportedError(
            f"gradient checkpointing under a reduction needs transformers>=5.23, and {version} is installed; "
            "upgrade it, or switch checkpointing off"
        )


def given_cache(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments of a decoder or of one of its layers, under whatever name; None without one."""
    for name in _CACHE_NAMES:
        if kwargs.get(name) is not None:
            return kwargs[name]
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def returned_cache(output: Any) -> Any:
    """The KV cache in what a model or `generate` returned; None without one."""
    name = next((name for name in _CACHE_NAMES if hasattr(output, name)), None)  # the new name first: the old one warns
    return None if name is None else getattr(output, name)


def check_arguments(arguments: Mapping[str, Any], rows: int, length: int, known: Collection[str] = ()) -> None:
    """Refuse an argument of a decoder layer that follows the tokens in a way that cannot be shortened with them.

    Served are tensors of shape (B, S, ...), which are shortened with the hidden states, and tensors that have no axis
    of length S.

    Args:
        arguments: what the layer is called with, by name.
        rows: B.
        length: S, tokens of this pass.
        known: arguments that somebody else takes care of.

    Raises:
        UnsupportedError: names the argument.
    """
    for name, value in arguments.items():
        if name in known or value is None:
            continue
        if name in _PACKED:
            raise UnsupportedError(f"{name}: several samples packed into one row cannot be reduced; pad them instead")
        for tensor in _tensors(value):
            if length in tensor.shape and tensor.shape[:2] != (rows, length):
                raise UnsupportedError(
                    f"the decoder hands its layers {name} of shape {tuple(tensor.shape)}, which seems to follow the "
                    f"{length} tokens of the prompt; only (batch, tokens, ...) can be shortened with them"
                )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
