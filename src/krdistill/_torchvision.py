"""torchvision, wherever it can be imported at all; whatever imports it comes here first."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch


def import_torchvision() -> ModuleType:
    """torchvision, also one that was built for another torch.

    A wheel from the package index beside a CPU build of torch does not import: its compiled operators cannot load, and
    the shape rules that it registers for them have nothing to hold on to. Networks need none of these operators; with
    their signatures defined, everything that is written in Python works. Where the operators are there, nothing is
    done.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    module = import_module("torchvision")
    module._signatures = library  # type: ignore[attr-defined]  # they live as long as the object that defined them
    return module


def prepare_for_torchvision() -> None:
    """Call this before a package that imports torchvision by itself where it is installed, such as torchmetrics."""
    if find_spec("torchvision") is not None:
        import_torchvision()
