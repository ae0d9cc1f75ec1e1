"""One thread, quiet libraries, and no deprecated call into transformers, for every test."""

import logging

import pytest
import torch
import transformers


class _Deprecations(logging.Handler):
    """What transformers says in its log instead of warning: an error, as `filterwarnings` in pyproject.toml."""

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecat" in record.getMessage():
            raise FutureWarning(record.getMessage())


TWINS = {
    "vipllava": "llava", "qwen2_vl": "qwen2_5_vl", "smolvlm": "idefics3", "aya_vision": "internvl",
    "gemma3": "gemma3_window", "mistral3": "llava_next", "glm4v": "qwen2_5_vl",
}  # fmt: skip
"""Families that go the way of another one through all of our code: their tests are slow ones."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for value in getattr(getattr(item, "callspec", None), "params", {}).values():
            names = value if isinstance(value, tuple) else (value,)
            if any(isinstance(name, str) and name in TWINS for name in names):
                item.add_marker(pytest.mark.slow)


torch.set_num_threads(1)
transformers.logging.set_verbosity_warning()
transformers.logging.disable_default_handler()
transformers.logging.add_handler(_Deprecations())
transformers.logging.disable_progress_bar()
