"""One thread, quiet libraries, and no deprecated call into transformers, for every test."""

import logging

import torch
import transformers


class _Deprecations(logging.Handler):
    """What transformers says in its log instead of warning: an error, as `filterwarnings` in pyproject.toml."""

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecat" in record.getMessage():
            raise FutureWarning(record.getMessage())


torch.set_num_threads(1)
transformers.logging.set_verbosity_warning()
transformers.logging.disable_default_handler()
transformers.logging.add_handler(_Deprecations())
transformers.logging.disable_progress_bar()
