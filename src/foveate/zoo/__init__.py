"""Small trained models that ship inside the package, and the data they were trained on.

* `names()`, `path(name)`: which models there are and where they lie; `foveate` commands accept them as ``zoo:NAME``.
  "tiny-llava" answers; "tiny-clip" is its companion for methods that compare patches with the question (`clip=`);
  "tiny-vilt" answers in an encoder, "tiny-vilt-pumer" is its student with fewer tokens.
* `foveate.zoo.scenes`: the seeded scene renderer and question generator.
* `foveate.zoo.easyvqa`: easy-VQA, from its PyPI package.

What trained them is in ``recipes/`` of a checkout; it is not in the wheel.

Importing this module imports neither torch nor transformers.
"""

from pathlib import Path

__all__ = ["names", "path"]

_FOLDERS = {
    "tiny-llava": "tiny_llava",
    "tiny-clip": "tiny_clip",
    "tiny-vilt": "tiny_vilt",
    "tiny-vilt-pumer": "tiny_vilt_pumer",
}


def names() -> tuple[str, ...]:
    """The names of the models that ship in the package."""
    return tuple(_FOLDERS)


def path(name: str) -> Path:
    """The local folder of a shipped model, ready for ``from_pretrained``.

    Raises:
        ValueError: `name` is not a shipped model; the message lists the known ones.
    """
    if name not in _FOLDERS:
        raise ValueError(f"unknown zoo model {name!r}; known: {', '.join(_FOLDERS)}")
    return Path(__file__).parent / _FOLDERS[name]
