"""Balanced softmax: the class prior is part of the training loss, and not of the classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import check_logits, check_number, check_per_class
from ..priors import ClassPrior, CountsLike
from ..sampling import Sampling, draw_shares
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


class DrawnPrior(nn.Module):
    """Base of the losses that hold the class prior: what they hold is the prior of the training draws, log p_k.

    Such a loss makes up for how much oftener a network is shown one class than another. Where rare classes are drawn
    more often than they are there (:mod:`krdistill.sampling`), the prior of the counts would make up for it twice.

    Args:
        counts: training images per class, ``(K,)``, every one at least 1.
        sampling: how they are drawn.
    """

    log_prior: Tensor

    def __init__(self, counts: CountsLike, sampling: Sampling) -> None:
        super().__init__()
        self.sampling = sampling
        prior = ClassPrior.from_counts(counts)
        self.counts = tuple(prior.counts.tolist())  # no tensor: what the module is moved with is log_prior alone
        self.register_buffer("log_prior", draw_shares(sampling, prior.counts).log().to(torch.float32))

    def drawn_log_prior(self, progress: float) -> Tensor:
        """Shape ``(K,)``, float32, where this share of the run is done."""
        if self.sampling != "progressively-balanced":
            return self.log_prior
        return draw_shares(self.sampling, self.counts, progress=progress).log().to(self.log_prior)


class BalancedSoftmax(DrawnPrior):
    """:func:`balanced_softmax` as a module.

    Args:
        counts: training images per class, ``(K,)``, every one at least 1.
        label_smoothing: in [0, 1).
        sampling: how the training images are drawn; the prior is that of the draws. With ``class-balanced`` that leaves
            plain cross-entropy; with ``progressively-balanced`` it goes with the ``progress`` of a call.
    """

    def __init__(self, counts: CountsLike, *, label_smoothing: float = 0.0, sampling: Sampling = "instance") -> None:
        super().__init__(counts, sampling)
        self.label_smoothing = check_number("label_smoothing", label_smoothing, at_least=0, below=1)

    def forward(self, logits: Tensor, labels: Tensor, progress: float = 0.0) -> Tensor:
        log_prior = self.drawn_log_prior(progress)
        return balanced_softmax(logits, labels, log_prior, label_smoothing=self.label_smoothing)

    def extra_repr(self) -> str:
        drawn = "" if self.sampling == "instance" else f", sampling={self.sampling!r}"
        return f"num_classes={len(self.log_prior)}, label_smoothing={self.label_smoothing}{drawn}"
