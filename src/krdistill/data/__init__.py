"""Data sets: where they come from, how they are cut, and what they are in memory.

Names are imported when first used, so that asking for the table of sources, or downloading one, does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .containers import DataBundle as DataBundle
    from .containers import Examples as Examples
    from .containers import FeatureData as FeatureData
    from .containers import ImageData as ImageData
    from .containers import LoadedImages as LoadedImages
    from .containers import TextData as TextData
    from .downloading import download as download
    from .inspection import inspect_data as inspect_data
    from .long_tail import largest_n_max as largest_n_max
    from .long_tail import long_tail_counts as long_tail_counts
    from .long_tail import long_tail_indices as long_tail_indices
    from .sources import SOURCES as SOURCES
    from .sources import SourceInfo as SourceInfo
    from .sources import data_root as data_root
    from .sources import list_sources as list_sources
    from .sources import load_images as load_images
    from .splits import carve_validation as carve_validation
    from .splits import cut_long_tail as cut_long_tail
    from .splits import load_data as load_data

_HOME = {
    "containers": ("DataBundle", "Examples", "FeatureData", "ImageData", "LoadedImages", "TextData"),
    "downloading": ("download",),
    "inspection": ("inspect_data",),
    "long_tail": ("largest_n_max", "long_tail_counts", "long_tail_indices"),
    "sources": ("SOURCES", "SourceInfo", "data_root", "list_sources", "load_images"),
    "splits": ("carve_validation", "cut_long_tail", "load_data"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULE:
        return getattr(import_module(f".{_MODULE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE})
