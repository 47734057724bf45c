"""Temperature scaling: one number for all classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .arrays import FloatArray, IntArray, softmax

LOWEST, HIGHEST = 0.05, 20.0


def fit(logits: FloatArray, labels: IntArray) -> dict[str, Any]:
    """The temperature of :func:`best_temperature`, every image counting the same."""
    return {"temperature": best_temperature(logits, labels)}


def apply(log_p: Any, parameters: Mapping[str, Any]) -> Any:
    r"""softmax(z / T), from log p ``(N, K)``; the order of the classes stays as it is."""
    return softmax(log_p / parameters["temperature"])


def best_temperature(logits: FloatArray, labels: IntArray, weights: FloatArray | None = None) -> float:
    r"""The temperature under which the labels are likeliest.

    .. math:: T^* = \arg\min_{T \in [0.05, 20]} \;
        \frac{1}{N} \sum_i \omega_i \, \operatorname{CE}(\operatorname{softmax}(z_i / T), y_i)

    The sum is convex in 1 / T, so the root of its derivative is found by bisection's faster kin (Brent), to float64's
    precision, and does not depend on a start. Images that are all right, or that say nothing, end at a bound.

    Args:
        logits: z, shape ``(N, K)``, float64, finite.
        labels: y, shape ``(N,)``, integers.
        weights: omega, shape ``(N,)``, not negative; by default all 1.

    Returns:
        T; 1 where every temperature is as good as any other.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv 1706.04599.
    Deviation: bounds, and a root in place of a descent.
    """
    from scipy.optimize import brentq

    z = logits - logits[np.arange(len(labels)), labels][:, None]  # the true class at 0
    omega = np.ones(len(z)) if weights is None else weights

    def slope(beta: float) -> float:
        return float(omega @ (softmax(beta * z) * z).sum(1))

    low, high = 1.0 / HIGHEST, 1.0 / LOWEST
    if slope(1.0) == 0.0 and slope(low) == 0.0:
        return 1.0
    if slope(low) >= 0:
        return HIGHEST
    if slope(high) <= 0:
        return LOWEST
    return 1.0 / float(brentq(slope, low, high, xtol=1e-14, rtol=1e-14))
