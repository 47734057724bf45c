"""Balanced softmax: the class prior is part of the training loss, and not of the classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import check_logits, check_number, check_per_class
from ..priors import ClassPrior, CountsLike
from .cross_entropy import shifted_cross_entropy


def balanced_softmax(logits: Tensor, labels: Tensor, log_prior: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    r"""Cross-entropy of prior-shifted logits; the plain logits then are a balanced classifier at test time.

    .. math:: \operatorname{CE}(z + \log \pi, y)

    Args:
        logits: z, shape ``(B, K)``.
        labels: y, shape ``(B,)``.
        log_prior: log pi, shape ``(K,)``, finite; log counts give the same loss.
        label_smoothing: in [0, 1).

    Returns:
        Shape ``(B,)``; float32, or float64 where the logits are.

    Raises:
        ArgumentError: shapes or labels that do not fit, or a prior that is not finite.

    Source: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020, arXiv 2007.10740.
    """
    check_logits("logits", logits)
    check_per_class("log_prior", log_prior, logits.shape[1], expected="a finite log prior (no class without images)")
    return shifted_cross_entropy(logits, labels, log_prior, label_smoothing)


class BalancedSoftmax(nn.Module):
    """:func:`balanced_softmax` as a module.

    Args:
        counts: training images per class, ``(K,)``, every one at least 1.
        label_smoothing: in [0, 1).
    """

    log_prior: Tensor

    def __init__(self, counts: CountsLike, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = check_number("label_smoothing", label_smoothing, at_least=0, below=1)
        self.register_buffer("log_prior", ClassPrior.from_counts(counts).log_prior.to(torch.float32))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return balanced_softmax(logits, labels, self.log_prior, label_smoothing=self.label_smoothing)

    def extra_repr(self) -> str:
        return f"num_classes={len(self.log_prior)}, label_smoothing={self.label_smoothing}"
