"""Histogram binning, one class against the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .arrays import FloatArray, IntArray, like, namespace, normalised, softmax
from .isotonic import PLAIN

BINS = 15


def fit(logits: FloatArray, labels: IntArray, *, bins: int = BINS) -> dict[str, Any]:
    r"""For every class and every bin of its probability, how often it was this class.

    .. math:: g_{kb} = \operatorname{mean}_{i : p_{ik} \in b} [y_i = k], \qquad q_k \propto g_k(p_k) + 10^{-3} p_k

    Args:
        logits: z, shape ``(N, K)``, float64, finite; p is its softmax.
        labels: y, shape ``(N,)``, integers.
        bins: of equal width over [0, 1].

    Returns:
        ``values``, K rows of ``bins`` numbers. A bin without an image holds its own middle; a class without an image
        has an empty row, and keeps its plain probability.

    Source: Zadrozny, Elkan, "Obtaining Calibrated Probability Estimates from Decision Trees and Naive Bayesian
        Classifiers", ICML 2001; for several classes as in Guo et al., ICML 2017, arXiv 1706.04599.
    Deviation: the share of the plain probability, as for isotonic regression.
    """
    p = softmax(logits)
    middles = (np.arange(bins) + 0.5) / bins
    values: list[list[float]] = []
    for k in range(p.shape[1]):
        hit = labels == k
        if not hit.any():
            values.append([])
            continue
        place = np.clip((p[:, k] * bins).astype(np.int64), 0, bins - 1)
        count = np.bincount(place, minlength=bins)
        hits = np.bincount(place, weights=hit.astype(np.float64), minlength=bins)
        values.append(np.where(count > 0, hits / np.maximum(count, 1), middles).tolist())
    return {"values": values}


def apply(log_p: Any, parameters: Mapping[str, Any]) -> Any:
    """The bins' values and the plain share, scaled to sum to 1, from log p ``(N, K)``."""
    xp = namespace(log_p)
    p = xp.exp(log_p)
    columns = [_looked_up(p[:, k], row) for k, row in enumerate(parameters["values"])]
    return normalised(xp.stack(columns, axis=1) + PLAIN * p)


def _looked_up(p: Any, row: list[float]) -> Any:
    if not row:
        return p
    xp = namespace(p)
    known = xp.where(p == p, p, xp.zeros_like(p))  # NaN has no bin; the plain share carries it on
    place = xp.clip(xp.floor(known * len(row)), 0, len(row) - 1)
    return like(row, p)[place.astype(np.int64) if xp is np else place.long()]
