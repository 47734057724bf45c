"""LDAM: label-distribution-aware margins, with deferred re-weighting."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import (
    at_least_float32,
    check_integer,
    check_labels,
    check_logits,
    check_matrix,
    check_number,
    check_per_class,
    like,
    readable,
)
from ..errors import ArgumentError
from ..priors import ClassPrior, CountsLike
from ..rectify.anchor_rectification import unit_rows
from .cross_entropy import softmax_loss

_COSINE_ROUNDING = 0.02  # bfloat16 can put a cosine this far above 1


def ldam_margins(counts: CountsLike, *, max_margin: float = 0.5) -> Tensor:
    r"""Margins that are the wider, the rarer the class.

    .. math:: \Delta_k = \Delta_{\max} \, (n_{\min} / n_k)^{1/4}

    Args:
        counts: training images per class n_k, ``(K,)``, every one at least 1.
        max_margin: the smallest class's margin, >= 0, on the scale of the logits that it is taken from.

    Returns:
        Shape ``(K,)``, float64, on the CPU.

    Raises:
        ArgumentError, DataError: counts or margin out of range.

    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019,
    arXiv 1906.07413.
    """
    max_margin = check_number("max_margin", max_margin, at_least=0)
    n = ClassPrior.from_counts(counts).counts.double()
    return max_margin * (n.min() / n) ** 0.25


def ldam_loss(
    cosines: Tensor, labels: Tensor, margins: Tensor, *, scale: float = 30.0, class_weights: Tensor | None = None
) -> Tensor:
    r"""Cross-entropy in which the true class must win by its margin.

    .. math:: w_y \operatorname{CE}\big(s \, (z - \Delta_y \, e_y), \; y\big)

    The paper's scale and margins are meant for cosines, of a head with normalised weights and features
    (:class:`NormedLinear`). For other logits take ``scale=1``: the margins then are in units of those logits, which
    the network can outgrow by growing its weights.

    Args:
        cosines: z, shape ``(B, K)``; in [-1, 1] unless ``scale`` is 1.
        labels: y, shape ``(B,)``.
        margins: Delta, shape ``(K,)``, >= 0, from :func:`ldam_margins`.
        scale: s > 0.
        class_weights: w, shape ``(K,)``, finite, >= 0; by default 1.

    Returns:
        Shape ``(B,)``; float32, or float64 where the cosines are.

    Raises:
        ArgumentError: shapes or labels that do not fit, values out of range, or (seen on the CPU alone) logits outside
            [-1, 1] with another scale than 1.

    Source: Cao et al., NeurIPS 2019, arXiv 1906.07413.
    """
    K = check_logits("cosines", cosines).shape[1]
    labels = check_labels(labels, cosines.shape[0], K)
    check_per_class("margins", margins, K, low=0, expected="finite numbers >= 0")
    scale = check_number("scale", scale, above=0)
    if scale != 1 and readable(cosines):
        largest = float(cosines.detach().abs().max())
        if largest > 1 + _COSINE_ROUNDING:
            raise ArgumentError(
                f"cosines: expected numbers in [-1, 1], as scale is {scale:g}, but got one of size {largest:g}. "
                "Give the network a NormedLinear head, or use scale=1."
            )
    z = at_least_float32(cosines)
    loss = softmax_loss(z, labels, scale=scale, margin=like(margins, z)[labels].unsqueeze(1))
    if class_weights is None:
        return loss
    check_per_class("class_weights", class_weights, K, low=0, expected="finite numbers >= 0")
    return loss * like(class_weights, loss)[labels]


class LDAM(nn.Module):
    """:func:`ldam_loss` as a module, with deferred re-weighting (LDAM-DRW).

    From ``drw_from`` on, a class's loss is weighted by its effective number of samples, scaled so that the mean weight
    over the training images is 1.

    Args:
        counts: training images per class, ``(K,)``, every one at least 1.
        max_margin: as in :func:`ldam_margins`.
        scale: as in :func:`ldam_loss`: 30 for a head that gives cosines, 1 for any other.
        drw_from: the share of the run in [0, 1] after which the weights act; None is never. The paper's 160 of 200
            epochs are 0.8.
        beta: of the effective number of samples, in [0, 1).

    Source: Cao et al., NeurIPS 2019, arXiv 1906.07413.
    Deviation: the authors divide by the sum of the weights in each batch. That does not go with per-sample values:
    here the weights have mean 1 over the training set, so the two agree in expectation. The switch is a share of the
    run, not an epoch's number.
    """

    margins: Tensor
    class_weights: Tensor

    def __init__(
        self,
        counts: CountsLike,
        *,
        max_margin: float = 0.5,
        scale: float = 30.0,
        drw_from: float | None = 0.8,
        beta: float = 0.9999,
    ) -> None:
        super().__init__()
        self.max_margin = check_number("max_margin", max_margin, at_least=0)
        self.scale = check_number("scale", scale, above=0)
        self.drw_from = None if drw_from is None else check_number("drw_from", drw_from, at_least=0, at_most=1)
        self.beta = beta
        prior = ClassPrior.from_counts(counts)
        weights = prior.effective_number_weights(beta)
        weights = weights / (weights * prior.frequencies).sum()
        self.register_buffer("margins", ldam_margins(counts, max_margin=max_margin).to(torch.float32))
        self.register_buffer("class_weights", weights.to(torch.float32))

    def forward(self, logits: Tensor, labels: Tensor, progress: float = 0.0) -> Tensor:
        """The loss ``(B,)`` of logits ``(B, K)`` and labels ``(B,)`` at a point of the run, ``progress`` in [0, 1]."""
        progress = check_number("progress", progress, at_least=0, at_most=1)
        reweighted = self.drw_from is not None and progress >= self.drw_from
        weights = self.class_weights if reweighted else None
        return ldam_loss(logits, labels, self.margins, scale=self.scale, class_weights=weights)

    def extra_repr(self) -> str:
        return (
            f"num_classes={len(self.margins)}, max_margin={self.max_margin}, scale={self.scale}, "
            f"drw_from={self.drw_from}, beta={self.beta}"
        )


class NormedLinear(nn.Linear):
    r"""A head that gives cosines.

    .. math:: z_k = s \, \operatorname{norm}(w_k)^\top \operatorname{norm}(f)

    It takes the place of a network's last linear layer. The weight starts as directions drawn uniformly from the
    sphere, by the global generator, like any layer: fork and seed it around the constructor.

    Args:
        in_features: D.
        out_features: K.
        scale: s > 0; 1 gives the cosines that :class:`LDAM` multiplies by its own scale. With another s the logits
            are ready for a softmax; the equivalent loss then is ``LDAM(counts, scale=1, max_margin=0.5 * s)``.

    Source: Cao et al., NeurIPS 2019, arXiv 1906.07413.
    """

    def __init__(self, in_features: int, out_features: int, *, scale: float = 1.0) -> None:
        in_features = check_integer("in_features", in_features, at_least=1)
        super().__init__(in_features, check_integer("out_features", out_features, at_least=2), bias=False)
        self.scale = check_number("scale", scale, above=0)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.copy_(unit_rows(nn.init.normal_(self.weight)))

    def forward(self, features: Tensor) -> Tensor:
        """``(B, D)`` to ``(B, K)``; half-precision features outside autocast are taken in the weight's dtype."""
        check_matrix("features", features, "(B, D)", columns=self.in_features)
        return self.scale * F.linear(unit_rows(features.to(self.weight.dtype)), unit_rows(self.weight))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scale={self.scale}"
