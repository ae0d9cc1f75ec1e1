"""What differs between the versions of transformers that Foveate runs on. All of it is here, and nothing else is.

* 5.24 calls the KV cache `cache` wherever it was `past_key_values` before: arguments of decoders and layers, outputs.
* Before 5.15 `crop(n)` of a cache is asked for the length to be left, since then (n < 0) for the number of tokens to
  remove; `LogicalLayer.crop` tells them apart by their sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from transformers.cache_utils import Cache

__all__ = ["CACHE_NAME", "given_cache", "returned_cache"]

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
_CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = _CACHE_NAMES[0] if VERSION >= (5, 24) else _CACHE_NAMES[1]
"""The argument by which this transformers hands a KV cache to models, decoders and layers."""


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
