"""Prototype contrast: the student's feature must be told, by one prototype per class, from the other classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import at_least_float32, check_finite, check_matrix, check_number, check_per_class, like
from ..rectify.anchor_rectification import unit_rows
from .balanced_softmax import balanced_softmax
from .feature_matching import Projector
from .krdistill import _check_class_weights, _constant


def prototype_contrast_loss(
    student_features: Tensor,
    labels: Tensor,
    *,
    prototypes: Tensor,
    log_prior: Tensor,
    temperature: float = 0.1,
    class_weights: Tensor | None = None,
) -> Tensor:
    r"""InfoNCE of a feature against one prototype per class, with the prior as logit adjustment.

    .. math:: -w_y \log \frac{\pi_y \exp(\cos(f_s, c_y) / t)}{\sum_k \pi_k \exp(\cos(f_s, c_k) / t)}

    The prototypes are the teacher's class means, or balanced anchors turned towards them. Without the prior, the many
    images of the head would push the tail's prototypes away; a uniform prior makes it plain InfoNCE.

    Args:
        student_features: f_s, already projected to the teacher's width, shape ``(B, D)``.
        labels: y, shape ``(B,)``.
        prototypes: c, shape ``(K, D)``, row k for class k.
        log_prior: log pi of the training labels, shape ``(K,)``, finite.
        temperature: t > 0.
        class_weights: w, shape ``(K,)``, finite, >= 0; by default 1.

    Returns:
        Shape ``(B,)``; float32, or float64 where the features are, under autocast too.

    Raises:
        ArgumentError: arguments that do not fit.

    Source: Li et al., "Targeted Supervised Contrastive Learning for Long-Tailed Recognition", CVPR 2022,
    arXiv 2111.13998 (contrast to fixed targets); Menon et al., "Long-tail learning via logit adjustment", ICLR 2021,
    arXiv 2007.07314 (the prior in the loss).
    Deviation: prototypes that a teacher gives, alone and without other samples, for distillation: our formulation.
    """
    check_matrix("student_features", student_features, "(B, D)")
    check_matrix("prototypes", prototypes, "(K, D)", columns=student_features.shape[1])
    t = check_number("temperature", temperature, above=0)
    with torch.autocast(student_features.device.type, enabled=False):
        f = unit_rows(at_least_float32(student_features))
        loss = balanced_softmax((f / t) @ unit_rows(like(prototypes, f)).T, labels, log_prior)
    if class_weights is None:
        return loss
    return loss * like(_check_class_weights(class_weights, len(prototypes)), loss)[labels.long()]


class PrototypeContrast(nn.Module):
    """:func:`prototype_contrast_loss` as a module, with a projector to the teacher's width; constants are buffers.

    Args:
        prototypes: shape ``(K, D)``.
        log_prior: shape ``(K,)``.
        projector: from the student's width to D; it may be shared with other terms.
        temperature, class_weights: as in :func:`prototype_contrast_loss`.
    """

    prototypes: Tensor
    log_prior: Tensor
    class_weights: Tensor | None

    def __init__(
        self,
        prototypes: Tensor,
        log_prior: Tensor,
        *,
        projector: Projector,
        temperature: float = 0.1,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_finite("prototypes", check_matrix("prototypes", prototypes, "(K, D)"))
        K = len(prototypes)
        check_per_class("log_prior", log_prior, K, expected="a finite log prior (no class without images)")
        self.projector = projector
        self.temperature = check_number("temperature", temperature, above=0)
        self.register_buffer("prototypes", _constant(prototypes))
        self.register_buffer("log_prior", _constant(log_prior))
        if class_weights is not None:
            class_weights = _constant(_check_class_weights(class_weights, K))
        self.register_buffer("class_weights", class_weights)

    def forward(self, student_features: Tensor, labels: Tensor) -> Tensor:
        return prototype_contrast_loss(
            self.projector(student_features),
            labels,
            prototypes=self.prototypes,
            log_prior=self.log_prior,
            temperature=self.temperature,
            class_weights=self.class_weights,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
