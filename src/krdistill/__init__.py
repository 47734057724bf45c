"""krdistill: knowledge distillation for long-tailed data.

A teacher trained on long-tailed data leans to the head classes. krdistill rectifies what it knows with balanced class
priors and distils that into a small student (Knowledge Rectification Distillation, arXiv 2409.07694; our formulation).

Importing the package imports no torch; the names below load what they need when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "ClassGroups": ".priors",
    "ClassPrior": ".priors",
    "DataBundle": ".data",
    "Distiller": ".distiller",
    "HubNetwork": ".sharing",
    "ImageData": ".data",
    "KrdistillError": ".errors",
    "Network": ".models.network",
    "RunConfig": ".config",
    "Teacher": ".models.teacher",
    "TrainConfig": ".config",
    "create_model": ".models",
    "list_models": ".models",
    "list_recipes": ".recipes",
    "load_config": ".config",
    "load_data": ".data",
    "load_network": ".models.network",
}

if TYPE_CHECKING:
    from .config import RunConfig as RunConfig
    from .config import TrainConfig as TrainConfig
    from .config import load_config as load_config
    from .data import DataBundle as DataBundle
    from .data import ImageData as ImageData
    from .data import load_data as load_data
    from .distiller import Distiller as Distiller
    from .errors import KrdistillError as KrdistillError
    from .models import create_model as create_model
    from .models import list_models as list_models
    from .models.network import Network as Network
    from .models.network import load_network as load_network
    from .models.teacher import Teacher as Teacher
    from .priors import ClassGroups as ClassGroups
    from .priors import ClassPrior as ClassPrior
    from .recipes import list_recipes as list_recipes
    from .sharing import HubNetwork as HubNetwork

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'krdistill' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
