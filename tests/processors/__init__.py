"""transformers' own processors, photographs and videos, end to end: `make processors`, and a part of it in `make test`.

What needs torchvision skips where there is none.
"""

from tests.catalogue import _torchvision  # noqa: F401
