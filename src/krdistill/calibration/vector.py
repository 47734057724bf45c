"""Vector scaling: a factor and an offset for every class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .arrays import FloatArray, IntArray, like, log_softmax, softmax
from .temperature import best_temperature


def fit(logits: FloatArray, labels: IntArray) -> dict[str, Any]:
    r"""Factors and offsets under which the labels are likeliest.

    .. math::
        \min_{w \ge 0, \, b} \; \sum_i \operatorname{CE}(\operatorname{softmax}(w \odot \log p_i + b), y_i)
        + \frac12 \sum_k (T w_k - 1)^2 + \frac12 \sum_k b_k^2

    with T of temperature scaling; convex, by L-BFGS-B with its gradient.

    Args:
        logits: z, shape ``(N, K)``, float64, finite; log p is its log-softmax.
        labels: y, shape ``(N,)``, integers.

    Returns:
        ``scale`` w and ``offset`` b, K numbers each.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv 1706.04599.
    Deviation: fitted on log p, so that a constant added to an image's logits changes nothing, and an exported file's
    probabilities suffice to apply it. The penalty (a unit Gaussian around temperature scaling, worth about one image)
    keeps classes with few images, or none, near temperature scaling; without it a class without an image is never
    answered again.
    """
    from scipy.optimize import minimize

    N, K = logits.shape
    x, rows = log_softmax(logits), np.arange(N)
    T = best_temperature(logits, labels)

    def loss(v: FloatArray) -> tuple[float, FloatArray]:
        w, b = v[:K] / T, v[K:]  # in units of 1 / T, so that all numbers are of one size
        log_q = log_softmax(x * w + b)
        g = np.exp(log_q)
        g[rows, labels] -= 1.0
        value = -log_q[rows, labels].sum() + 0.5 * ((v[:K] - 1) ** 2).sum() + 0.5 * (b**2).sum()
        return float(value), np.concatenate([(g * x).sum(0) / T + v[:K] - 1, g.sum(0) + b])

    found = minimize(
        loss, np.concatenate([np.ones(K), np.zeros(K)]), jac=True, method="L-BFGS-B",
        bounds=[(0, None)] * K + [(None, None)] * K, options={"maxiter": 10_000, "ftol": 1e-15, "gtol": 1e-7},
    )  # fmt: skip
    return {"scale": (found.x[:K] / T).tolist(), "offset": found.x[K:].tolist()}


def apply(log_p: Any, parameters: Mapping[str, Any]) -> Any:
    r"""softmax(w log p + b), from log p ``(N, K)``; the predicted class may change."""
    return softmax(log_p * like(parameters["scale"], log_p) + like(parameters["offset"], log_p))
