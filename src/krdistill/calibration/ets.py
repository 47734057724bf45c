"""Ensemble temperature scaling: softened, plain and uniform predictions, mixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .arrays import FloatArray, IntArray, namespace, softmax
from .temperature import best_temperature


def fit(logits: FloatArray, labels: IntArray) -> dict[str, Any]:
    r"""Temperature T of temperature scaling, then the shares under which the labels are likeliest.

    .. math:: \min_{w \ge 0, \, \sum w = 1} \; - \sum_i \log \Big( w_1 \operatorname{softmax}(z_i / T)_{y_i}
        + w_2 \operatorname{softmax}(z_i)_{y_i} + w_3 / K \Big)

    Convex; by sequential least squares with its gradient.

    Args:
        logits: z, shape ``(N, K)``, float64, finite.
        labels: y, shape ``(N,)``, integers.

    Returns:
        ``temperature``, and three ``weights`` that sum to 1.

    Source: Zhang et al., "Mix-n-Match: Ensemble and Compositional Methods for Uncertainty Calibration in Deep
        Learning", ICML 2020, arXiv 2003.07329.
    """
    from scipy.optimize import minimize

    N, K = logits.shape
    T, rows = best_temperature(logits, labels), np.arange(N)
    parts = np.stack([softmax(logits / T)[rows, labels], softmax(logits)[rows, labels], np.full(N, 1.0 / K)], axis=1)

    def loss(w: FloatArray) -> tuple[float, FloatArray]:
        p = np.maximum(parts @ w, 1e-300)
        return float(-np.log(p).mean()), -(parts / p[:, None]).mean(0)

    found = minimize(
        loss, np.full(3, 1.0 / 3.0), jac=True, method="SLSQP", bounds=[(0.0, 1.0)] * 3,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1.0, "jac": lambda w: np.ones(3)},
        options={"maxiter": 1000, "ftol": 1e-14},
    )  # fmt: skip
    w = np.maximum(found.x, 0.0)
    return {"temperature": T, "weights": (w / w.sum()).tolist()}


def apply(log_p: Any, parameters: Mapping[str, Any]) -> Any:
    """The mixture, from log p ``(N, K)``; the order of the classes stays as it is."""
    softened, plain, uniform = parameters["weights"]
    p = softened * softmax(log_p / parameters["temperature"]) + plain * namespace(log_p).exp(log_p)
    return p + uniform / log_p.shape[1]
