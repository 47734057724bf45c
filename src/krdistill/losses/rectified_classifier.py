"""The teacher's classifier, rectified: the student's feature must be classified by it as the teacher's is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import at_least_float32, check_choice, check_finite, check_matrix, check_number, check_per_class, like
from ..rectify.error_correction import CORRECTIONS
from .feature_matching import Projector
from .krdistill import Correction, _check_class_weights, _constant, _weighted_divergence, rectify_logits


def rectified_classifier_loss(
    student_features: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    log_prior: Tensor,
    tau: float = 1.0,
    correction: Correction = "none",
    temperature: float = 4.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    r"""What the teacher's prior-adjusted classifier says of the student's feature, against the rectified teacher.

    .. math:: w_y \, T^2 \operatorname{KL}\big(\operatorname{softmax}(\tilde z / T) \,\|\,
        \operatorname{softmax}(u / T)\big), \qquad u = W f_s + b - \tau \log \pi, \quad
        \tilde z = \operatorname{correct}(z_t - \tau \log \pi, y)

    W and b are the teacher's last layer, frozen. A feature equal to the teacher's has no loss where nothing was
    corrected. Directions that no class looks at are left free, which plain feature matching does not do.

    Args:
        student_features: f_s, already projected to the teacher's width, shape ``(B, D)``.
        teacher_logits: z_t, shape ``(B, K)``; no gradient flows to them.
        labels: y, shape ``(B,)``.
        weight: W, shape ``(K, D)``; no gradient flows to it.
        bias: b, shape ``(K,)``, or None.
        log_prior, tau, correction: as in :func:`rectify_logits`.
        temperature: T > 0.
        class_weights: w, shape ``(K,)``, finite, >= 0; by default 1.

    Returns:
        Shape ``(B,)``; float32, or float64 where the features are, under autocast too.

    Raises:
        ArgumentError: arguments that do not fit.

    Source: Yang et al., "Knowledge distillation via softmax regression representation learning", ICLR 2021 (the
    student's feature through the teacher's classifier).
    Deviation: there the squared difference of the logits, and the classifier as it is; its rectification is our
    formulation. The student keeps a head of its own.
    """
    check_matrix("student_features", student_features, "(B, D)")
    check_matrix("weight", weight, "(K, D)", columns=student_features.shape[1])
    K = weight.shape[0]
    check_matrix("teacher_logits", teacher_logits, "(B, K)", rows=student_features.shape[0], columns=K)
    if bias is not None:
        check_per_class("bias", bias, K)
    target, _ = rectify_logits(teacher_logits.detach(), labels, log_prior=log_prior, tau=tau, correction=correction)
    with torch.autocast(student_features.device.type, enabled=False):
        f = at_least_float32(student_features)
        offset = -tau * like(log_prior, f) if bias is None else like(bias.detach(), f) - tau * like(log_prior, f)
        said = F.linear(f, like(weight.detach(), f), offset)
    return _weighted_divergence(said, target, labels, temperature, class_weights)


class RectifiedClassifier(nn.Module):
    """:func:`rectified_classifier_loss` as a module, with a projector to the teacher's width; constants are buffers.

    Args:
        head: the teacher's last linear layer, from D to K; copied and frozen.
        log_prior: shape ``(K,)``.
        projector: from the student's width to D; it may be shared with other terms.
        tau, correction, temperature, class_weights: as in :func:`rectified_classifier_loss`.
    """

    weight: Tensor
    bias: Tensor | None
    log_prior: Tensor
    class_weights: Tensor | None

    def __init__(
        self,
        head: nn.Linear,
        log_prior: Tensor,
        *,
        projector: Projector,
        tau: float = 1.0,
        correction: Correction = "none",
        temperature: float = 4.0,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        K = head.out_features
        check_finite("head", head.weight)
        check_per_class("log_prior", log_prior, K, expected="a finite log prior (no class without images)")
        check_choice("correction", correction, CORRECTIONS)
        self.correction: Correction = correction
        self.projector = projector
        self.tau = check_number("tau", tau)
        self.temperature = check_number("temperature", temperature, above=0)
        self.register_buffer("weight", _constant(head.weight))
        self.register_buffer("bias", None if head.bias is None else _constant(head.bias))
        self.register_buffer("log_prior", _constant(log_prior))
        if class_weights is not None:
            class_weights = _constant(_check_class_weights(class_weights, K))
        self.register_buffer("class_weights", class_weights)

    def forward(self, student_features: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        return rectified_classifier_loss(
            self.projector(student_features),
            teacher_logits,
            labels,
            weight=self.weight,
            bias=self.bias,
            log_prior=self.log_prior,
            tau=self.tau,
            correction=self.correction,
            temperature=self.temperature,
            class_weights=self.class_weights,
        )

    def extra_repr(self) -> str:
        return f"tau={self.tau}, correction={self.correction!r}, temperature={self.temperature}"
