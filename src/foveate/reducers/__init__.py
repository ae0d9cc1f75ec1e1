"""What to drop: one module per published method. Importing this package registers all of them."""

from .cdpruner import CDPruner
from .chain import Chain
from .dart import DART
from .divprune import DivPrune
from .dycoke import DyCoke
from .evs import EVS
from .fastv import FastV
from .fastvid import FastVID
from .fopru import FoPru
from .pitome import PiToMe
from .pooling import AveragePool, Downsample
from .prumerge import PruMerge, PruMergePlus
from .pumer import PuMer
from .pyramiddrop import PyramidDrop
from .random import Random
from .recoverable import Recoverable
from .sparsevlm import SparseVLM, SparseVLMDetails
from .tome import ToMe
from .vidcom2 import VidCom2
from .visionzip import VisionZip
from .vispruner import VisPruner
from .vtw import VTW

__all__ = [
    "DART",
    "EVS",
    "VTW",
    "AveragePool",
    "CDPruner",
    "Chain",
    "DivPrune",
    "Downsample",
    "DyCoke",
    "FastV",
    "FastVID",
    "FoPru",
    "PiToMe",
    "PruMerge",
    "PruMergePlus",
    "PuMer",
    "PyramidDrop",
    "Random",
    "Recoverable",
    "SparseVLM",
    "SparseVLMDetails",
    "ToMe",
    "VidCom2",
    "VisPruner",
    "VisionZip",
]
