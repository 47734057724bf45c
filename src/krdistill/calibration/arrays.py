"""The few array operations that calibrators need, on NumPy arrays and on tensors alike."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

TINY = float(np.finfo(np.float32).smallest_subnormal)  # a probability that float32 rounded to 0 is not impossible

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
IntArray = np.ndarray[Any, np.dtype[np.int64]]


def namespace(x: Any) -> Any:
    """The module of an array's functions: torch for a tensor, else NumPy. Imports neither."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(x, torch.Tensor) else np


def as_float64(x: Any) -> Any:
    """The values in float64; a tensor on a device without float64 in float32."""
    xp = namespace(x)
    if xp is np:
        return np.asarray(x, dtype=np.float64)
    return x.float() if x.device.type == "mps" else x.double()


def like(values: Any, x: Any) -> Any:
    """Numbers as an array of the kind, type and device of ``x``."""
    xp = namespace(x)
    return np.asarray(values, dtype=x.dtype) if xp is np else xp.as_tensor(values, dtype=x.dtype, device=x.device)


def log_softmax(z: Any) -> Any:
    """Row by row, shape ``(N, K)``; huge logits stay finite."""
    xp = namespace(z)
    z = z - xp.amax(z, axis=1, keepdims=True)
    return z - xp.log(xp.exp(z).sum(axis=1, keepdims=True))


def softmax(z: Any) -> Any:
    """Row by row, shape ``(N, K)``."""
    return namespace(z).exp(log_softmax(z))


def normalised(q: Any) -> Any:
    """Rows that sum to 1."""
    return q / q.sum(axis=1, keepdims=True)
