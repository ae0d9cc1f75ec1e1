"""torchvision beside a torch of another build: its kernels do not load; with their schemas declared, the rest does.

Imported before transformers, which imports torchvision where there is one.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

if importlib.util.find_spec("torchvision") is not None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
