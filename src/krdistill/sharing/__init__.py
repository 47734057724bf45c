"""A student as others find it: a folder in the Hugging Face layout, and the mixin that reads and writes it.

Names are imported when first used: huggingface_hub is needed for :class:`HubNetwork` alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .folder import save_shared as save_shared
    from .folder import share_run as share_run
    from .hub import HubNetwork as HubNetwork

_LAZY = {"HubNetwork": ".hub", "save_shared": ".folder", "share_run": ".folder"}

__all__ = ["HubNetwork", "save_shared", "share_run"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'krdistill.sharing' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
