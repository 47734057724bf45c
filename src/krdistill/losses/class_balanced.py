"""Class-balanced loss: every class is weighted by its effective number of samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import check_logits, check_number, check_per_class, like
from ..priors import ClassPrior, CountsLike
from .cross_entropy import cross_entropy
from .focal import focal_loss


def class_balanced_loss(logits: Tensor, labels: Tensor, weights: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    r"""Weighted cross-entropy.

    .. math:: w_y \operatorname{CE}(z, y)

    Args:
        logits: z, shape ``(B, K)``.
        labels: y, shape ``(B,)``.
        weights: w, shape ``(K,)``, finite, >= 0; see :func:`krdistill.priors.effective_number_weights`.
        label_smoothing: in [0, 1); the smoothed loss as a whole is weighted by the label's weight.

    Returns:
        Shape ``(B,)``; float32, or float64 where the logits are. Its plain mean over a batch is the authors' loss.

    Raises:
        ArgumentError: shapes or labels that do not fit, or weights that are negative or not finite.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, arXiv 1901.05555.
    """
    check_logits("logits", logits)
    check_per_class("weights", weights, logits.shape[1], low=0, expected="finite numbers >= 0")
    loss = cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return loss * like(weights, loss)[labels.long()]


class ClassBalancedCrossEntropy(nn.Module):
    """:func:`class_balanced_loss` with effective-number weights, which sum to K over the classes.

    So the mean weight over the training images is below 1 (about 0.2 at imbalance factor 100 on CIFAR-100-LT), as in
    the paper: a learning rate tuned for plain cross-entropy is small for it.

    Args:
        counts: training images per class, ``(K,)``, every one at least 1.
        beta: in [0, 1); 0 gives cross-entropy, towards 1 the weights go to 1 / n_k.
        label_smoothing: in [0, 1).
    """

    weights: Tensor

    def __init__(self, counts: CountsLike, *, beta: float = 0.9999, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.beta = beta
        self.label_smoothing = check_number("label_smoothing", label_smoothing, at_least=0, below=1)
        self.register_buffer("weights", _weights(counts, beta))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return class_balanced_loss(logits, labels, self.weights, label_smoothing=self.label_smoothing)

    def extra_repr(self) -> str:
        return f"num_classes={len(self.weights)}, beta={self.beta}, label_smoothing={self.label_smoothing}"


class ClassBalancedFocal(nn.Module):
    """:func:`~krdistill.losses.focal_loss` with effective-number weights, which sum to K over the classes.

    Args:
        counts: training images per class, ``(K,)``, every one at least 1.
        beta: in [0, 1).
        gamma: of the focal loss, >= 0.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, arXiv 1901.05555.
    Deviation: there over K sigmoids, here over the softmax.
    """

    weights: Tensor

    def __init__(self, counts: CountsLike, *, beta: float = 0.9999, gamma: float = 2.0) -> None:
        super().__init__()
        self.beta = beta
        self.gamma = check_number("gamma", gamma, at_least=0)
        self.register_buffer("weights", _weights(counts, beta))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return focal_loss(logits, labels, gamma=self.gamma, class_weights=self.weights)

    def extra_repr(self) -> str:
        return f"num_classes={len(self.weights)}, beta={self.beta}, gamma={self.gamma}"


def _weights(counts: CountsLike, beta: float) -> Tensor:
    return ClassPrior.from_counts(counts).effective_number_weights(beta).to(torch.float32)
