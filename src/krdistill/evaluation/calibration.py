"""How far probabilities can be taken at their word: calibration errors and proper scores, over all and by group."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .._checks import check_integer, check_labels
from ..errors import ArgumentError
from ..priors import ClassGroups
from .metrics import _ece, reliability_curve

MEASURES = ("ece", "balanced_ece", "adaptive_ece", "classwise_ece", "brier", "nll")
_TINY = float(np.finfo(np.float32).smallest_subnormal)


def evaluate_calibration(probabilities: Any, labels: Any, groups: ClassGroups, *, bins: int = 15) -> dict[str, Any]:
    r"""Calibration of a set of probabilities.

    With confidence :math:`c_i = \max_k p_{ik}`, :math:`r_i = 1` where the prediction is right and else 0, bins B of N
    images:

    .. math::
        \text{ECE} = \sum_b \frac{1}{N} \Big| \sum_{i \in B_b} (r_i - c_i) \Big|, \qquad
        \text{class-wise ECE} = \operatorname{mean}_k \sum_b \frac{1}{N}
        \Big| \sum_{i : p_{ik} \in B_b} ([y_i = k] - p_{ik}) \Big|

    .. math:: \text{Brier} = \frac{1}{N} \sum_i \sum_k (p_{ik} - [y_i = k])^2, \qquad
        \text{NLL} = -\frac{1}{N} \sum_i \log p_{i y_i}

    - ``ece``: bins of equal width over [0, 1];
    - ``balanced_ece``: the same with every image weighted so that its class counts as much as any other class with
      images; equal to ``ece`` on a balanced set;
    - ``adaptive_ece``: bins of equally many images by confidence (equal confidences share their mean accuracy, so that
      the order of the images does not matter);
    - ``classwise_ece``: bins of equal width of each class's probability, over the classes with images;
    - ``brier``: in [0, 2]; ``nll``: in nats, a probability of 0 read as float32's smallest number.

    A group's row is about the images of its classes; its ``classwise_ece`` is the mean over its classes, of all images,
    since a class's probability matters most where it is given in error.

    Args:
        probabilities: array or tensor of shape ``(N, K)``, rows that sum to 1.
        labels: shape ``(N,)``, integers in [0, K).
        groups: the groups of the K classes.
        bins: of every error.

    Returns:
        ``images``, ``top1``, ``confidence`` (mean), the six above, ``reliability``
        (:func:`~krdistill.evaluation.reliability_curve`), and ``groups``: name to the same, None where a group has no
        image.

    Raises:
        ArgumentError: shapes that do not fit, no images, labels out of range, rows that are no probabilities.

    Source: ECE: Guo et al., 2017, arXiv 1706.04599; equal mass: Nguyen, O'Connor, "Posterior calibration and
        exploratory analysis for natural language processing models", 2015, arXiv 1508.05154; class-wise: Kull et al.,
        "Beyond temperature scaling", 2019, arXiv 1910.12656; Brier, "Verification of forecasts expressed in terms of
        probability", 1950.
    """
    p, y = _checked(probabilities, labels)
    N, K = p.shape
    check_integer("bins", bins, at_least=1)
    if groups.index.shape != (K,):
        raise ArgumentError(f"Expected groups of {K} classes, got groups of {groups.index.numel()}.")
    by_class = _class_errors(p, y, bins)
    found = _row(p, y, np.ones(N, dtype=bool), by_class, bins)
    index = groups.index.numpy()
    rows = {}
    for g, name in enumerate(groups.names):
        mine = index[y] == g
        rows[name] = _row(p, y, mine, by_class[index == g], bins) if mine.any() else None
    return {**found, "groups": rows}


def adaptive_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Top-label calibration error over bins of equally many images (their numbers differ by one at most)."""
    order = np.argsort(confidence, kind="stable")
    c = confidence[order]
    _, start, count = np.unique(c, return_index=True, return_counts=True)
    r = np.repeat(np.add.reduceat(correct[order].astype(np.float64), start) / count, count)
    return float(sum(abs((part_r - part_c).sum()) for part_r, part_c in _parts(r, c, bins)) / len(c))


def _parts(r: np.ndarray, c: np.ndarray, bins: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(zip(np.array_split(r, bins), np.array_split(c, bins), strict=True))


def _row(p: np.ndarray, y: np.ndarray, mine: np.ndarray, by_class: np.ndarray, bins: int) -> dict[str, Any]:
    p, y = p[mine], y[mine]
    N, rows = len(p), np.arange(len(p))
    confidence = np.minimum(p.max(1), 1.0)
    correct = p.argmax(1) == y
    images = np.bincount(y, minlength=p.shape[1])
    weight = 1.0 / ((images > 0).sum() * images[y])
    return {
        "images": N,
        "top1": float(correct.mean()),
        "confidence": float(confidence.mean()),
        "ece": _ece(torch.from_numpy(confidence), torch.from_numpy(correct), bins),
        "balanced_ece": _error(confidence, weight * (correct - confidence), bins),
        "adaptive_ece": adaptive_error(confidence, correct, bins),
        "classwise_ece": float(np.nanmean(by_class)),
        "brier": float(((p**2).sum(1) - 2 * p[rows, y] + 1.0).mean()),
        "nll": float(-np.log(np.maximum(p[rows, y], _TINY)).mean()),
        "reliability": reliability_curve(confidence, correct, bins),
    }


def _class_errors(p: np.ndarray, y: np.ndarray, bins: int) -> np.ndarray:
    """Every class's calibration error over all images, ``(K,)``; NaN for a class without an image."""
    found = np.full(p.shape[1], np.nan)
    for k in np.unique(y):
        found[k] = _error(np.minimum(p[:, k], 1.0), ((y == k) - p[:, k]) / len(y), bins)
    return found


def _error(confidence: np.ndarray, gap: np.ndarray, bins: int) -> float:
    """Sum over equal-width bins (the edges of a reliability curve) of the absolute sum of the gaps in it."""
    edges = np.linspace(0.0, 1.0, bins + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    return float(np.abs(np.bincount(index, weights=gap, minlength=bins)).sum())


def _checked(probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    p = probabilities.detach().cpu().double().numpy() if isinstance(probabilities, torch.Tensor) else probabilities
    p = np.asarray(p, dtype=np.float64)
    if p.ndim != 2 or p.shape[1] < 2 or not len(p):
        raise ArgumentError(f"probabilities: expected shape (N, K) with N >= 1 and K >= 2, got {p.shape}.")
    y = check_labels(torch.as_tensor(labels).cpu(), *p.shape).numpy()
    bad = ~((p >= 0).all(1) & (np.abs(p.sum(1) - 1.0) < 1e-4))
    if bad.any():
        raise ArgumentError(
            f"probabilities: expected rows of numbers of at least 0 that sum to 1; {int(bad.sum())} of {len(p)} rows "
            f"are none (the first is row {int(bad.argmax())}). Give probabilities, not logits, without NaN."
        )
    return p, y
