"""Head-to-tail calibration: a temperature for a balanced world, from a long-tailed validation part.

Few images of the tail classes are at hand, and those say little of what else there is. What the head classes know of
their spread is transferred: each tail class's feature distribution is moved a little towards those of the head classes
that lie near, and its validation images count by how likely they are under the moved distribution.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .arrays import FloatArray, IntArray, softmax
from .temperature import apply as apply
from .temperature import best_temperature

ALPHA, HEAD_SHARE = 0.998, 0.4
LIGHTEST, HEAVIEST = 0.3, 5.0


class ClassStatistics(NamedTuple):
    """Of every class: mean and standard deviation of each feature ``(K, D)``, and images ``(K,)``."""

    mean: FloatArray
    deviation: FloatArray
    counts: FloatArray


def class_statistics(features: FloatArray, labels: IntArray, num_classes: int) -> ClassStatistics:
    r"""Mean and diagonal variance of each class's features.

    .. math:: \mu_k = \operatorname{mean}_{i : y_i = k} f_i, \qquad
        v_k = \frac{\sum_{i : y_i = k} (f_i - \mu_k)^2 + \bar v}{n_k + 1}

    with the variance within the classes :math:`\bar v = \frac{1}{N} \sum_i (f_i - \mu_{y_i})^2`.

    Args:
        features: f, shape ``(N, D)``, float64, finite.
        labels: y, shape ``(N,)``, integers in [0, K).
        num_classes: K; a class without a row has mean 0 and the variance within the classes.

    Deviation: the paper has the plain variance, which is 0 for a class with one image. Here every class has one image's
    worth of the variance within the classes.
    """
    D = features.shape[1]
    counts = np.bincount(labels, minlength=num_classes).astype(np.float64)
    mean = np.zeros((num_classes, D))
    np.add.at(mean, labels, features)
    mean /= np.maximum(counts, 1.0)[:, None]
    squares = np.zeros((num_classes, D))
    np.add.at(squares, labels, (features - mean[labels]) ** 2)
    within = squares.sum(0) / len(features)
    return ClassStatistics(mean, np.sqrt((squares + within) / (counts[:, None] + 1.0)), counts)


def head_classes(counts: FloatArray) -> np.ndarray:
    """Which classes give: of all with images, the two fifths with the most (ties by class index), at least one.

    Args:
        counts: training images of each class, shape ``(K,)``.

    Returns:
        Shape ``(K,)``, bool.

    Source: four of ten in the paper's demonstration.
    """
    number = max(1, round(HEAD_SHARE * int((counts > 0).sum())))
    head = np.zeros(len(counts), dtype=bool)
    head[np.argsort(-counts, kind="stable")[:number]] = True
    return head


def transferred_statistics(statistics: ClassStatistics, head: np.ndarray, *, alpha: float = ALPHA) -> ClassStatistics:
    r"""Tail classes moved towards the head classes that lie near them; head classes as they are.

    .. math::
        d_{ji} = \lVert \mu_j - \mu_i \rVert^2 + \lVert \sigma_j - \sigma_i \rVert^2, \qquad
        a_{ji} = \operatorname{softmax}_{i \in H} (-d_{ji} / \sqrt{D})

    .. math::
        \tilde\mu_j = \alpha \mu_j + (1 - \alpha) \sum_{i \in H} a_{ji} \mu_i, \qquad
        \tilde\sigma_j = \alpha \sigma_j + (1 - \alpha) \sum_{i \in H} a_{ji} \sigma_i

    Args:
        statistics: of K classes, of the training images.
        head: which classes give, shape ``(K,)``, bool.
        alpha: what a class keeps of itself, in [0, 1].
    """
    mean, deviation = statistics.mean, statistics.deviation
    tail = np.flatnonzero(~head)
    both = np.concatenate([mean, deviation], axis=1)
    square = (both**2).sum(1)
    distance = square[tail][:, None] + square[head][None] - 2.0 * both[tail] @ both[head].T
    near = softmax(-distance / np.sqrt(mean.shape[1])) if len(tail) else np.zeros((0, int(head.sum())))
    moved = both.copy()
    moved[tail] = alpha * both[tail] + (1.0 - alpha) * near @ both[head]
    D = mean.shape[1]
    return ClassStatistics(moved[:, :D], moved[:, D:], statistics.counts)


def importance_weights(
    features: FloatArray, labels: IntArray, statistics: ClassStatistics, target: ClassStatistics
) -> FloatArray:
    r"""How much each validation image counts.

    .. math:: \omega_i = \operatorname{clip}\Big(
        \frac{N(f_i; \tilde\mu_{y_i}, \tilde\sigma_{y_i}^2)}{N(f_i; \mu_{y_i}, \sigma_{y_i}^2)}, \, 0.3, \, 5 \Big)

    Features that never vary within a class say nothing and are left out. It is 1 where source and target are the same.

    Args:
        features: f of the validation images, shape ``(N, D)``, float64.
        labels: y, shape ``(N,)``, integers in [0, K).
        statistics: of the training images.
        target: the same, transferred.

    Returns:
        Shape ``(N,)``, float64, in [0.3, 5].
    """
    seen = (statistics.deviation.min(0) > 0) & (target.deviation.min(0) > 0)
    log_ratio = np.zeros(len(features))
    for part, sign in ((target, 1.0), (statistics, -1.0)):
        sigma = part.deviation[:, seen]
        distance = (features[:, seen] - part.mean[labels][:, seen]) / sigma[labels]
        log_ratio -= sign * (0.5 * (distance**2).sum(1) + np.log(sigma).sum(1)[labels])
    return np.exp(np.clip(log_ratio, np.log(LIGHTEST), np.log(HEAVIEST)))


def fit(
    logits: FloatArray, labels: IntArray, *, features: FloatArray, train_features: FloatArray,
    train_labels: IntArray, alpha: float = ALPHA,
) -> dict[str, Any]:  # fmt: skip
    r"""The temperature of :func:`~krdistill.calibration.temperature.best_temperature` under importance weights.

    Args:
        logits: z of the validation images, shape ``(N, K)``, float64, finite.
        labels: theirs, shape ``(N,)``, integers.
        features: theirs, shape ``(N, D)``.
        train_features: f of the training images, shape ``(M, D)``.
        train_labels: theirs, shape ``(M,)``.
        alpha: as in :func:`transferred_statistics`.

    Returns:
        ``temperature``; and for the record ``mean_weight`` of the tail's images (None where there are none).

    Source: Chen, Su, "Transfer Knowledge from Head to Tail: Uncertainty Calibration under Long-tailed Distribution",
        CVPR 2023, arXiv 2304.06537; constants of the authors' code.
    Deviation: the variance of :func:`class_statistics`; which classes are the head is two fifths of them by training
    images, for any number of classes; T up to 20, there up to 5.
    """
    K = logits.shape[1]
    known = class_statistics(train_features, train_labels, K)
    head = head_classes(known.counts)
    target = transferred_statistics(known, head, alpha=alpha)
    weights = importance_weights(features, labels, known, target)
    tail = weights[~head[labels]]
    return {
        "temperature": best_temperature(logits, labels, weights),
        "mean_weight": float(tail.mean()) if len(tail) else None,
    }
