"""Focal loss: samples that are answered rightly and surely count less."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import at_least_float32, check_labels, check_logits, check_number, check_per_class, describe, like
from ..errors import ArgumentError
from ._rows import by_rows, piece_rows


def focal_loss(logits: Tensor, labels: Tensor, *, gamma: float = 2.0, class_weights: Tensor | None = None) -> Tensor:
    r"""Focal loss over the softmax.

    .. math:: -w_y \, (1 - p_y)^\gamma \log p_y, \qquad p = \operatorname{softmax}(z)

    Computed in log-space, with log(1 - p_y) as the logarithm of the other classes' sum: loss and gradient are finite
    for any logits and any gamma, also where p_y rounds to 1.

    Args:
        logits: z, shape ``(B, K)``.
        labels: y, shape ``(B,)``.
        gamma: >= 0; 0 gives cross-entropy.
        class_weights: w, shape ``(K,)``, finite, >= 0; by default 1.

    Returns:
        Shape ``(B,)``; float32, or float64 where the logits are.

    Raises:
        ArgumentError: shapes or labels that do not fit, a negative gamma, or weights that are negative or not finite.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv 1708.02002.
    Deviation: there K sigmoids (a detector's classes do not exclude each other); here the softmax, as long-tailed
    papers use it. ``class_weights`` is the paper's alpha.
    """
    labels = check_labels(labels, check_logits("logits", logits).shape[0], logits.shape[1])
    gamma = check_number("gamma", gamma, at_least=0)
    z = at_least_float32(logits)

    def kernel(rows: slice) -> tuple[Tensor, Tensor]:
        piece = z[rows].detach().requires_grad_()
        with torch.enable_grad():
            values = _focal(piece, labels[rows], gamma)
            (gradient,) = torch.autograd.grad(values.sum(), piece)
        return values.detach(), gradient

    large = piece_rows(z) < len(z) and torch.is_grad_enabled() and z.requires_grad
    loss = by_rows(z, kernel) if large else _focal(z, labels, gamma)
    if class_weights is None:
        return loss
    check_per_class("class_weights", class_weights, logits.shape[1], low=0, expected="finite numbers >= 0")
    return loss * like(class_weights, loss)[labels]


def _focal(z: Tensor, labels: Tensor, gamma: float) -> Tensor:
    log_p = F.log_softmax(z, dim=1)
    column = labels.unsqueeze(1)
    log_right = log_p.gather(1, column).squeeze(1)
    log_wrong = log_p.scatter(1, column, -math.inf).logsumexp(1)
    return -(gamma * log_wrong).exp() * log_right


class FocalLoss(nn.Module):
    """:func:`focal_loss` as a module.

    Args:
        gamma: >= 0.
        class_weights: shape ``(K,)``, finite, >= 0; kept as a float32 buffer.
    """

    class_weights: Tensor | None

    def __init__(self, *, gamma: float = 2.0, class_weights: Tensor | None = None) -> None:
        super().__init__()
        self.gamma = check_number("gamma", gamma, at_least=0)
        if class_weights is not None:
            if not isinstance(class_weights, Tensor) or class_weights.ndim != 1:
                raise ArgumentError(
                    f"class_weights: expected a tensor of shape (K,), but got {describe(class_weights)}."
                )
            check_per_class("class_weights", class_weights, len(class_weights), low=0, expected="finite numbers >= 0")
            class_weights = class_weights.detach().to(torch.float32, copy=True)
        self.register_buffer("class_weights", class_weights)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return focal_loss(logits, labels, gamma=self.gamma, class_weights=self.class_weights)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, weighted={self.class_weights is not None}"
