"""From a trained student to the file that runs on a device."""

from .onnx import export_onnx, verify_onnx

__all__ = ["export_onnx", "verify_onnx"]
