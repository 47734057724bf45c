"""Anchor rectification: the teacher's features are moved from their biased class means to balanced anchors."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import (
    at_least_float32,
    check_finite,
    check_integer,
    check_labels,
    check_matrix,
    check_number,
    check_per_class,
    like,
)
from ..errors import ArgumentError, DataError
from ..priors import ClassPrior, CountsLike

_CHUNK_ROWS = 8192
_TINY = 1e-8


def unit_rows(x: Tensor) -> Tensor:
    """Rows divided by their length; a row shorter than 1e-8 has no direction and stays as it is.

    So the gradient at a zero row is that of the identity: finite, where dividing by a clamped length gives 1e8 of it.
    """
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / torch.where(length > _TINY, length, torch.ones_like(length))


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    r"""Direction of each class in a teacher's feature space.

    .. math:: m_k = \operatorname{norm}\Big(\operatorname{mean}_{x \in \text{class } k} \operatorname{norm}(f(x))\Big)

    Args:
        features: shape ``(N, D)``, floating point.
        labels: shape ``(N,)``.
        num_classes: K.

    Returns:
        Shape ``(K, D)``, unit rows, on the device of ``features``; float32, or float64 where the features are. Summed
        in float64, on the CPU, in pieces.

    Raises:
        ArgumentError: shapes or labels that do not fit, or features that are not finite.
        DataError: a class without an image, or whose features cancel out; the message names the classes.
    """
    K = check_integer("num_classes", num_classes, at_least=2)
    check_matrix("features", features, "(N, D)")
    labels = check_labels(labels.cpu() if isinstance(labels, Tensor) else labels, features.shape[0], K)
    total = torch.zeros(K, features.shape[1], dtype=torch.float64)
    for start in range(0, len(labels), _CHUNK_ROWS):
        piece = features[start : start + _CHUNK_ROWS].detach().cpu().double()
        total.index_add_(0, labels[start : start + _CHUNK_ROWS], unit_rows(check_finite("features", piece)))
    number = torch.bincount(labels, minlength=K)
    _refuse(number == 0, "have no image, so they have no mean")
    mean = total / number.unsqueeze(1)
    _refuse(mean.norm(dim=1) <= _TINY, "have features that cancel out or are zero, so their mean has no direction")
    return like(unit_rows(mean), at_least_float32(features[:0]))


def _refuse(bad: Tensor, reason: str) -> None:
    classes = bad.nonzero().flatten().tolist()
    if classes:
        shown = ", ".join(map(str, classes[:5])) + (" ..." if len(classes) > 5 else "")
        raise DataError(f"features: {len(classes)} of {len(bad)} classes {reason}: class {shown}.")


def recentre_features(features: Tensor, labels: Tensor, class_means: Tensor, anchors: Tensor) -> Tensor:
    r"""Moves each feature from its class's direction to the class's anchor; its within-class offset stays.

    .. math:: r = \operatorname{norm}\big(\operatorname{norm}(f) - m_y + c_y\big)

    m is a direction (a unit vector), as f and c are: a feature that points exactly at its class mean comes to point
    exactly at its anchor, and the offset kept is the one from the class's direction on the sphere.

    Args:
        features: the teacher's f, shape ``(B, D)``.
        labels: y, shape ``(B,)``.
        class_means: m, shape ``(K, D)``, from :func:`class_means`.
        anchors: c, shape ``(K, D)``, row k for class k, from :func:`krdistill.anchors.align_anchors`.

    Returns:
        Shape ``(B, D)``, unit rows (in the one case of an offset of exactly -c: zero), on the device of ``features``;
        float32, or float64 where the features are.

    Raises:
        ArgumentError: shapes or labels that do not fit.
    """
    _check_anchors(features, anchors)
    check_matrix("class_means", class_means, "(K, D)", rows=anchors.shape[0], columns=anchors.shape[1])
    labels = check_labels(labels, features.shape[0], anchors.shape[0])
    f = at_least_float32(features)
    return unit_rows(unit_rows(f) + like(anchors, f)[labels] - like(class_means, f)[labels])


def blend_features(features: Tensor, labels: Tensor, anchors: Tensor, strength: Tensor) -> Tensor:
    r"""Mixes each feature with its class's anchor.

    .. math:: r = \operatorname{norm}\big((1 - \lambda_y) \operatorname{norm}(f) + \lambda_y c_y\big)

    Args:
        features: the teacher's f, shape ``(B, D)``.
        labels: y, shape ``(B,)``.
        anchors: c, shape ``(K, D)``, row k for class k.
        strength: lambda, shape ``(K,)``, in [0, 1]: 0 keeps the feature, 1 replaces it. See :func:`rarity`.

    Returns:
        Shape ``(B, D)``, unit rows, on the device of ``features``; float32, or float64 where the features are.

    Raises:
        ArgumentError: shapes, labels or strengths that do not fit.
    """
    _check_anchors(features, anchors)
    labels = check_labels(labels, features.shape[0], anchors.shape[0])
    check_per_class("strength", strength, anchors.shape[0], low=0, high=1, expected="numbers in [0, 1]")
    f = at_least_float32(features)
    share = like(strength, f)[labels].unsqueeze(1)
    return unit_rows((1 - share) * unit_rows(f) + share * like(anchors, f)[labels])


def rarity(counts: CountsLike, strength: float = 0.5) -> Tensor:
    r"""How much of the anchor to blend in: the more, the rarer the class.

    .. math:: \lambda_k = \lambda \, (1 - n_k / n_{\max})

    Args:
        counts: images per class, ``(K,)``, whole numbers >= 1.
        strength: lambda in [0, 1], the limit for a vanishing class.

    Returns:
        Shape ``(K,)``, float64, on the CPU; 0 for the largest class.

    Raises:
        ArgumentError, DataError: counts or strength out of range.
    """
    strength = check_number("strength", strength, at_least=0, at_most=1)
    n = ClassPrior.from_counts(counts).counts.double()
    return strength * (1 - n / n.max())


def _check_anchors(features: Tensor, anchors: Tensor) -> None:
    check_matrix("features", features, "(B, D)")
    check_matrix("anchors", anchors, "(K, D)")
    if anchors.shape[1] != features.shape[1]:
        raise ArgumentError(
            f"anchors: expected the width of the features, {features.shape[1]}, but got {anchors.shape[1]}."
        )
