"""Isotonic regression, one class against the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .arrays import FloatArray, IntArray, like, namespace, normalised, softmax

PLAIN = 1e-3  # share of the plain probability that is added: no class becomes impossible, and ties are broken by it


def fit(logits: FloatArray, labels: IntArray) -> dict[str, Any]:
    r"""For every class the rising function of its probability that is nearest to "it was this class".

    .. math:: g_k = \arg\min_{g \text{ rising}} \sum_i (g(p_{ik}) - [y_i = k])^2, \qquad
        q_k \propto g_k(p_k) + 10^{-3} p_k

    By pool adjacent violators; between its knots a function is linear.

    Args:
        logits: z, shape ``(N, K)``, float64, finite; p is its softmax.
        labels: y, shape ``(N,)``, integers.

    Returns:
        ``knots``: for every class its places and values; both empty for a class without an image, which keeps its
        plain probability.

    Source: Zadrozny, Elkan, "Transforming Classifier Scores into Accurate Multiclass Probability Estimates", KDD 2002.
    Deviation: the share of the plain probability. Without it a class's probability is exactly 0 below its first image.
    """
    from sklearn.isotonic import IsotonicRegression

    p = softmax(logits)
    knots: list[dict[str, list[float]]] = []
    for k in range(p.shape[1]):
        hit = labels == k
        if not hit.any():
            knots.append({"at": [], "value": []})
            continue
        found = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(p[:, k], hit.astype(np.float64))
        knots.append({"at": found.X_thresholds_.tolist(), "value": found.y_thresholds_.tolist()})
    return {"knots": knots}


def apply(log_p: Any, parameters: Mapping[str, Any]) -> Any:
    """The functions and the plain share, scaled to sum to 1, from log p ``(N, K)``."""
    xp = namespace(log_p)
    p = xp.exp(log_p)
    columns = [_between(p[:, k], knots["at"], knots["value"]) for k, knots in enumerate(parameters["knots"])]
    return normalised(xp.stack(columns, axis=1) + PLAIN * p)


def _between(p: Any, at: list[float], value: list[float]) -> Any:
    """Linear between the knots, constant beyond them."""
    xp = namespace(p)
    if not at:
        return p
    if len(at) == 1:
        return value[0] + 0.0 * p
    x, y = like(at, p), like(value, p)
    i = xp.clip(
        xp.searchsorted(x, xp.ascontiguousarray(p) if xp is np else p.contiguous(), side="right") - 1, 0, len(at) - 2
    )
    share = (p - x[i]) / (x[i + 1] - x[i])
    return y[i] + xp.clip(share, 0.0, 1.0) * (y[i + 1] - y[i])
