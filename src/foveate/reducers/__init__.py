"""What to drop: one module per published method. Importing this package registers all of them."""

from .fastv import FastV
from .random import Random
from .sparsevlm import SparseVLM
from .vtw import VTW

__all__ = ["VTW", "FastV", "Random", "SparseVLM"]
