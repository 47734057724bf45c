"""Variance transfer: how features vary within a class is learned where there are many, and used where there are few."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import at_least_float32, check_finite, check_labels, check_matrix, check_per_class, like
from ..errors import DataError
from .anchor_rectification import unit_rows

_CHUNK_ROWS = 8192


def within_class_variation(features: Tensor, labels: Tensor, class_means: Tensor) -> tuple[Tensor, Tensor]:
    r"""Directions in which features vary within a class, and their variances, over the images of all classes.

    .. math:: \Sigma = \operatorname{mean}_x \, d(x) \, d(x)^\top = V \operatorname{diag}(s) V^\top, \qquad
        d(x) = \operatorname{norm}(f(x)) - m_{y(x)}

    Every image counts the same, so in a long tail it is the head that says what variation looks like.

    Args:
        features: the teacher's f, shape ``(N, D)``, finite.
        labels: y, shape ``(N,)``.
        class_means: m, shape ``(K, D)``, from :func:`class_means`.

    Returns:
        V, shape ``(D, D)``, orthonormal columns, and s, shape ``(D,)``, at least 0, ascending; float64, on the CPU.

    Raises:
        ArgumentError: shapes or labels that do not fit, or features that are not finite.
        DataError: no image.
    """
    check_matrix("features", features, "(N, D)")
    K, D = check_finite(
        "class_means", check_matrix("class_means", class_means, "(K, D)", columns=features.shape[1])
    ).shape
    labels = check_labels(labels.cpu() if isinstance(labels, Tensor) else labels, features.shape[0], K)
    if len(labels) == 0:
        raise DataError("features: expected at least one image, but got none.")
    means = class_means.detach().cpu().double()
    total = torch.zeros(D, D, dtype=torch.float64)
    for start in range(0, len(labels), _CHUNK_ROWS):
        piece = check_finite("features", features[start : start + _CHUNK_ROWS].detach().cpu().double())
        offset = unit_rows(piece) - means[labels[start : start + _CHUNK_ROWS]]
        total.addmm_(offset.T, offset)
    variances, basis = torch.linalg.eigh(total / len(labels))
    return basis, variances.clamp_min(0)


def transfer_variance(
    features: Tensor, labels: Tensor, class_means: Tensor, basis: Tensor, variances: Tensor, strength: Tensor
) -> Tensor:
    r"""What a feature would be if its class varied as the head does: the mean of a Gaussian, given the feature.

    .. math:: r = \operatorname{norm}(m_y + V g_y V^\top (\operatorname{norm}(f) - m_y)), \qquad
        g_{y,i} = \frac{(1 - \lambda_y) \, s_i}{(1 - \lambda_y) \, s_i + \lambda_y \, \bar s}

    The true feature of class y is taken to be drawn from :math:`N(m_y, V \operatorname{diag}(s) V^\top)`, with the
    variation of :func:`within_class_variation`, and what the teacher says of it to err by isotropic noise of variance
    :math:`\bar s \lambda_y / (1 - \lambda_y)`. Then r, before it is scaled, is the posterior mean: variation the head
    knows is kept, other variation is taken back to the class mean, the more, the rarer the class; :math:`\bar s` is
    the mean of the s_i. This is the closed form of matching draws from the posterior: their expected squared distance
    to the student is that of their mean, plus a constant.

    With :math:`\lambda = 0` it is norm(f). With equal s_i it is :func:`blend_features` towards the class means.

    Args:
        features: the teacher's f, shape ``(B, D)``.
        labels: y, shape ``(B,)``.
        class_means: m, shape ``(K, D)``.
        basis: V, shape ``(D, D)``.
        variances: s, shape ``(D,)``, at least 0.
        strength: lambda, shape ``(K,)``, in [0, 1]; see :func:`rarity`.

    Returns:
        Shape ``(B, D)``, unit rows, on the device of ``features``; float32, or float64 where the features are.

    Raises:
        ArgumentError: arguments that do not fit.

    Source: Yang, Liu, Xu, "Free Lunch for Few-shot Learning: Distribution Calibration", ICLR 2021, arXiv 2101.06395
    (statistics of rich classes for poor ones); Liu et al., "Deep Representation Learning on Long-tailed Data: A
    Learnable Embedding Augmentation Perspective", CVPR 2020, arXiv 2002.10826 (variance from head to tail).
    Deviation: they draw features; the posterior mean is our formulation.
    """
    D = check_matrix("features", features, "(B, D)").shape[1]
    check_matrix("class_means", class_means, "(K, D)", columns=D)
    labels = check_labels(labels, features.shape[0], class_means.shape[0])
    check_matrix("basis", basis, "(D, D)", rows=D, columns=D)
    check_per_class("variances", variances, D, low=0, expected="finite numbers >= 0")
    check_per_class("strength", strength, class_means.shape[0], low=0, high=1, expected="numbers in [0, 1]")
    f = unit_rows(at_least_float32(features))
    mean, V, s = like(class_means, f)[labels], like(basis, f), like(variances, f)
    share = like(strength, f)[labels].unsqueeze(1)
    noise = share * s.mean()
    # One minus the gain, so that a share of 0 keeps the feature also where nothing varies.
    loss = noise / ((1 - share) * s + noise).clamp_min(torch.finfo(f.dtype).tiny)
    with torch.autocast(f.device.type, enabled=False):
        return unit_rows(f - ((f - mean) @ V * loss) @ V.T)
