"""From a trained student to the file that runs on a device, and what runs there.

Names are imported when first used: what a device needs (:class:`DeviceModel`, :func:`predict`) imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exporting import export_network as export_network
    from .inputs import entries as entries
    from .onnx import export_onnx as export_onnx
    from .onnx import verify_onnx as verify_onnx
    from .predicting import predict as predict
    from .runtime import DeviceModel as DeviceModel

_LAZY = {
    "DeviceModel": ".runtime",
    "entries": ".inputs",
    "export_network": ".exporting",
    "export_onnx": ".onnx",
    "predict": ".predicting",
    "verify_onnx": ".onnx",
}

__all__ = ["DeviceModel", "entries", "export_network", "export_onnx", "predict", "verify_onnx"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'krdistill.deploy' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
