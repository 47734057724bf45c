"""Label-aware smoothing: labels of large classes are smoothed more, as a network is too sure of those."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from .._checks import (
    at_least_float32,
    check_choice,
    check_labels,
    check_logits,
    check_number,
    check_per_class,
    like,
)
from ..priors import ClassPrior, CountsLike
from .cross_entropy import softmax_loss

Shape = Literal["concave", "linear", "convex"]

SHAPES = ("concave", "linear", "convex")


def smoothing_factors(
    counts: CountsLike, *, smooth_head: float = 0.3, smooth_tail: float = 0.0, shape: Shape = "concave"
) -> Tensor:
    r"""How much each class's label is smoothed.

    .. math::
        \varepsilon_k =
        \begin{cases}
        \varepsilon_K + (\varepsilon_1 - \varepsilon_K) \sin(\tfrac{\pi}{2} r_k) & \text{concave} \\
        \varepsilon_K + (\varepsilon_1 - \varepsilon_K) \, r_k & \text{linear} \\
        \varepsilon_1 + (\varepsilon_1 - \varepsilon_K) \sin(\tfrac{3 \pi}{2} + \tfrac{\pi}{2} r_k) & \text{convex}
        \end{cases}
        \qquad r_k = \frac{n_k - n_K}{n_1 - n_K}

    with n_1 the largest and n_K the smallest count.

    Args:
        counts: training images per class n_k, ``(K,)``, every one at least 1.
        smooth_head: epsilon_1, of the largest class; the authors take 0.3 to 0.4.
        smooth_tail: epsilon_K, of the smallest class, in [0, smooth_head]; the authors take 0 to 0.1.
        shape: see above.

    Returns:
        Shape ``(K,)``, float64, on the CPU, within [smooth_tail, smooth_head]. Where all counts are equal every class
        is a largest class: smooth_head throughout.

    Raises:
        ArgumentError, DataError: counts or factors out of range, or an unknown shape.

    Source: Zhong et al., "Improving Calibration for Long-Tailed Recognition" (MiSLAS), CVPR 2021, arXiv 2104.00466.
    """
    check_choice("shape", shape, SHAPES)
    head = check_number("smooth_head", smooth_head, at_least=0, below=1)
    tail = check_number("smooth_tail", smooth_tail, at_least=0, at_most=head)
    n = ClassPrior.from_counts(counts).counts.double()
    low, high = n.min(), n.max()
    r = (n - low) / (high - low) if high > low else torch.ones_like(n)
    if shape == "concave":
        r = (math.pi / 2 * r).sin()
    elif shape == "convex":
        r = 1 - (math.pi / 2 * r).cos()
    return tail + (head - tail) * r


def label_aware_smoothing(logits: Tensor, labels: Tensor, smoothing: Tensor) -> Tensor:
    r"""Cross-entropy with labels that are smoothed class by class.

    .. math:: -\sum_k q_k \log \operatorname{softmax}(z)_k, \qquad
        q = (1 - \varepsilon_y) \, e_y + \varepsilon_y / K

    Args:
        logits: z, shape ``(B, K)``.
        labels: y, shape ``(B,)``.
        smoothing: epsilon, shape ``(K,)``, in [0, 1], from :func:`smoothing_factors`.

    Returns:
        Shape ``(B,)``; float32, or float64 where the logits are.

    Raises:
        ArgumentError: shapes or labels that do not fit, or factors outside [0, 1].

    Source: Zhong et al., "Improving Calibration for Long-Tailed Recognition" (MiSLAS), CVPR 2021, arXiv 2104.00466.
    Deviation: epsilon is shared by all K classes, as in the authors' code and in common label smoothing; the paper's
    text shares it among the K - 1 others.
    """
    labels = check_labels(labels, check_logits("logits", logits).shape[0], logits.shape[1])
    check_per_class("smoothing", smoothing, logits.shape[1], low=0, high=1, expected="numbers in [0, 1]")
    z = at_least_float32(logits)
    return softmax_loss(z, labels, smoothing=like(smoothing, z)[labels].unsqueeze(1))


class LabelAwareSmoothing(nn.Module):
    """:func:`label_aware_smoothing` as a module.

    Args:
        counts: training images per class, ``(K,)``, every one at least 1.
        smooth_head, smooth_tail, shape: as in :func:`smoothing_factors`.
    """

    smoothing: Tensor

    def __init__(
        self, counts: CountsLike, *, smooth_head: float = 0.3, smooth_tail: float = 0.0, shape: Shape = "concave"
    ) -> None:
        super().__init__()
        factors = smoothing_factors(counts, smooth_head=smooth_head, smooth_tail=smooth_tail, shape=shape)
        self.smooth_head, self.smooth_tail, self.shape = float(smooth_head), float(smooth_tail), shape
        self.register_buffer("smoothing", factors.to(torch.float32))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return label_aware_smoothing(logits, labels, self.smoothing)

    def extra_repr(self) -> str:
        return (
            f"num_classes={len(self.smoothing)}, smooth_head={self.smooth_head}, smooth_tail={self.smooth_tail}, "
            f"shape={self.shape!r}"
        )
