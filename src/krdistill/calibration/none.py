"""No calibration: the network's own softmax, for comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .arrays import FloatArray, IntArray, namespace


def fit(logits: FloatArray, labels: IntArray) -> dict[str, Any]:
    """Nothing is fitted."""
    return {}


def apply(log_p: Any, parameters: Mapping[str, Any]) -> Any:
    r"""p = softmax(z), from log p ``(N, K)``."""
    return namespace(log_p).exp(log_p)
