"""A tiny model of every image-text-to-text class of transformers, and the count of what Foveate does with it.

`python -m tests.catalogue` counts. No weights, no processors, no network.
"""

from tests.catalogue import _torchvision  # noqa: F401
from tests.catalogue.build import NAMES, alone, build, class_name, inputs, known, missing, visual_slots
from tests.catalogue.handmade import HANDMADE

__all__ = ["HANDMADE", "NAMES", "alone", "build", "class_name", "inputs", "known", "missing", "visual_slots"]
