"""KRDistill: logit-rectified (LRD) and representation-rectified (RRD) distillation, in our formulation.

Source: Huang et al., "Learn from Balance: Rectifying Knowledge Transfer for Long-Tailed Scenarios", 2024,
arXiv 2409.07694. Its equations are not public: the two losses' names and purposes are the paper's, the formulas below
are ours.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .._checks import (
    at_least_float32,
    check_choice,
    check_finite,
    check_logits,
    check_matrix,
    check_number,
    check_per_class,
    describe,
    like,
)
from ..errors import ArgumentError
from ..priors import ClassGroups, ClassPrior, CountsLike
from ..rectify.anchor_rectification import blend_features, recentre_features
from ..rectify.error_correction import CORRECTIONS, correct_errors, errors
from ..rectify.prior_removal import remove_prior
from .feature_matching import Projector, cosine_distance, squared_distance
from .kd import softened_divergence

Correction = Literal["lift", "swap", "none"]
Rectification = Literal["recentre", "blend", "none"]
Distance = Literal["cosine", "squared"]

RECTIFICATIONS = ("recentre", "blend", "none")
DISTANCES = {"cosine": cosine_distance, "squared": squared_distance}


def rectify_logits(
    teacher_logits: Tensor, labels: Tensor, *, log_prior: Tensor, tau: float = 1.0, correction: Correction = "lift"
) -> tuple[Tensor, Tensor]:
    r"""The teacher's logits with the prior removed, then its errors corrected.

    .. math:: \tilde z = \operatorname{correct}(z_t - \tau \log \pi, \; y)

    Args:
        teacher_logits: z_t, shape ``(B, K)``.
        labels: y, shape ``(B,)``.
        log_prior: log pi, shape ``(K,)``, finite.
        tau: how much of the prior is removed.
        correction: as in :func:`krdistill.rectify.correct_errors`.

    Returns:
        The rectified logits ``(B, K)``, float32 at least, and where the correction acted ``(B,)``, bool.

    Raises:
        ArgumentError: arguments that do not fit.
    """
    check_choice("correction", correction, CORRECTIONS)
    logits = remove_prior(teacher_logits, log_prior, tau)
    fired = errors(logits, labels)
    if correction == "none":
        return logits, torch.zeros_like(fired)
    return correct_errors(logits, labels, correction), fired


def lrd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    log_prior: Tensor,
    tau: float = 1.0,
    correction: Correction = "lift",
    temperature: float = 4.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    r"""Logit-rectified distillation, our formulation: the student follows the teacher's rectified prediction.

    .. math:: w_y \, T^2 \, \operatorname{KL}\big(\operatorname{softmax}(\tilde z / T) \,\|\,
        \operatorname{softmax}(z_s / T)\big)

    Args:
        student_logits: z_s, shape ``(B, K)``.
        teacher_logits: z_t, shape ``(B, K)``; no gradient flows to them.
        labels: y, shape ``(B,)``.
        log_prior, tau, correction: as in :func:`rectify_logits`.
        temperature: T > 0.
        class_weights: w, shape ``(K,)``, finite, >= 0; by default 1. See :func:`group_sample_weights`.

    Returns:
        Shape ``(B,)``; float32, or float64 where the logits are.

    Raises:
        ArgumentError: arguments that do not fit.

    Source: arXiv 2409.07694 names the loss and its purpose; the formula is ours.
    """
    rectified, _ = rectify_logits(teacher_logits, labels, log_prior=log_prior, tau=tau, correction=correction)
    return _weighted_divergence(student_logits, rectified, labels, temperature, class_weights)


def _weighted_divergence(
    student_logits: Tensor, target_logits: Tensor, labels: Tensor, temperature: float, class_weights: Tensor | None
) -> Tensor:
    check_logits("student_logits", student_logits)
    check_logits("teacher_logits", target_logits, rows=len(student_logits), columns=student_logits.shape[1])
    T = check_number("temperature", temperature, above=0)
    # The rectified logits are a temporary: removing the prior always makes a new tensor.
    loss = softened_divergence(at_least_float32(student_logits), target_logits.detach(), T, owned=True)
    if class_weights is None:
        return loss
    _check_class_weights(class_weights, target_logits.shape[1])
    return loss * like(class_weights, loss)[labels.long()]


def _check_class_weights(weights: Tensor, num_classes: int) -> Tensor:
    return check_per_class("class_weights", weights, num_classes, low=0, expected="finite numbers >= 0")


def _constant(x: Tensor) -> Tensor:
    """A float32 copy for a buffer: loading a state must not write into the caller's tensor."""
    return x.detach().to(torch.float32, copy=True)


def group_sample_weights(counts: CountsLike, groups: ClassGroups | Tensor) -> Tensor:
    r"""Class weights that give every group of classes the same share of the training set.

    .. math:: w_k = \frac{N}{G \, N_{g(k)}}, \qquad N_g = \sum_{k \in g} n_k

    G is the number of groups with a class; the mean weight over the training images is 1.

    Args:
        counts: images per class n_k, ``(K,)``, every one at least 1.
        groups: the classes' groups, or their group numbers ``(K,)``.

    Returns:
        Shape ``(K,)``, float64, on the CPU.

    Raises:
        ArgumentError, DataError: counts or groups that do not fit.
    """
    n = ClassPrior.from_counts(counts).counts
    index = (groups.index if isinstance(groups, ClassGroups) else groups).cpu()
    if index.shape != n.shape or index.is_floating_point() or index.dtype == torch.bool or int(index.min()) < 0:
        raise ArgumentError(
            f"groups: expected one group number >= 0 per class, shape ({len(n)},), but got {describe(index)}."
        )
    index = index.unique(return_inverse=True)[1]
    size = torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add_(0, index, n.double())
    return n.sum() / (len(size) * size[index])


class LogitRectifiedDistillation(nn.Module):
    """:func:`lrd_loss` as a module; prior and weights are buffers in float32.

    Args:
        log_prior: shape ``(K,)``, finite.
        tau, correction, temperature, class_weights: as in :func:`lrd_loss`.
    """

    log_prior: Tensor
    class_weights: Tensor | None

    def __init__(
        self,
        log_prior: Tensor,
        *,
        tau: float = 1.0,
        correction: Correction = "lift",
        temperature: float = 4.0,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.tau = check_number("tau", tau)
        self.correction: Correction = correction
        check_choice("correction", correction, CORRECTIONS)
        self.temperature = check_number("temperature", temperature, above=0)
        if not isinstance(log_prior, Tensor) or log_prior.ndim != 1 or len(log_prior) < 2:
            raise ArgumentError(f"log_prior: expected shape (K,), at least 2 classes, but got {describe(log_prior)}.")
        expected = "a finite log prior (no class without images)"
        check_per_class("log_prior", log_prior, len(log_prior), expected=expected)
        self.register_buffer("log_prior", _constant(log_prior))
        if class_weights is not None:
            class_weights = _constant(_check_class_weights(class_weights, len(log_prior)))
        self.register_buffer("class_weights", class_weights)

    def rectify(self, teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """:func:`rectify_logits` with this module's settings: rectified logits, and where the correction acted."""
        return rectify_logits(
            teacher_logits, labels, log_prior=self.log_prior, tau=self.tau, correction=self.correction
        )

    def corrected(self, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Where the error correction acts, shape ``(B,)``, bool."""
        if self.correction == "none":
            return torch.zeros(len(labels), dtype=torch.bool, device=teacher_logits.device)
        return errors(remove_prior(teacher_logits, self.log_prior, self.tau), labels)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        return lrd_loss(
            student_logits,
            teacher_logits,
            labels,
            log_prior=self.log_prior,
            tau=self.tau,
            correction=self.correction,
            temperature=self.temperature,
            class_weights=self.class_weights,
        )

    def extra_repr(self) -> str:
        return f"tau={self.tau}, correction={self.correction!r}, temperature={self.temperature}"


def rrd_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    labels: Tensor,
    *,
    anchors: Tensor | None,
    rectify: Rectification = "recentre",
    class_means: Tensor | None = None,
    strength: Tensor | None = None,
    distance: Distance = "cosine",
) -> Tensor:
    r"""Representation-rectified distillation, our formulation: the student follows the teacher's rectified feature.

    .. math:: d\big(f_s, r\big), \qquad r =
        \begin{cases}
        \operatorname{norm}(\operatorname{norm}(f_t) - m_y + c_y) & \text{recentre} \\
        \operatorname{norm}((1 - \lambda_y) \operatorname{norm}(f_t) + \lambda_y c_y) & \text{blend} \\
        \operatorname{norm}(f_t) & \text{none}
        \end{cases}

    Args:
        student_features: f_s, already projected to the teacher's width, shape ``(B, D)``.
        teacher_features: f_t, shape ``(B, D)``; no gradient flows to them.
        labels: y, shape ``(B,)``.
        anchors: c, shape ``(K, D)``, row k for class k; None is enough for ``none``.
        rectify: see above.
        class_means: m, shape ``(K, D)``, needed and used by ``recentre`` alone.
        strength: lambda, shape ``(K,)``, in [0, 1], needed and used by ``blend`` alone.
        distance: ``cosine`` (one minus it) or ``squared`` (of directions).

    Returns:
        Shape ``(B,)``; float32, or float64 where the features are.

    Raises:
        ArgumentError: arguments that do not fit, or one that is needed and missing.

    Source: arXiv 2409.07694 names the loss and its purpose; the formula is ours.
    """
    check_choice("rectify", rectify, RECTIFICATIONS)
    check_choice("distance", distance, tuple(DISTANCES))
    target = check_matrix("teacher_features", teacher_features, "(B, D)").detach()
    if rectify == "recentre":
        target = recentre_features(
            target, labels, _needed("class_means", class_means, rectify), _needed("anchors", anchors, rectify)
        )
    elif rectify == "blend":
        target = blend_features(
            target, labels, _needed("anchors", anchors, rectify), _needed("strength", strength, rectify)
        )
    return DISTANCES[distance](student_features, target)


def _needed(name: str, x: Tensor | None, rectify: str) -> Tensor:
    if x is None:
        raise ArgumentError(f"{name}: rectify={rectify!r} needs it, but got None.")
    return x


class RepresentationRectifiedDistillation(nn.Module):
    """:func:`rrd_loss` as a module, with the projector from the student's width; the constants are float32 buffers.

    Args:
        anchors: shape ``(K, D)``, row k for class k; None is enough for ``rectify="none"``.
        student_dim: width of the student's feature.
        teacher_dim: D; by default the anchors' width, and needed where there are none.
        rectify, class_means, strength, distance: as in :func:`rrd_loss`.
    """

    anchors: Tensor | None
    class_means: Tensor | None
    strength: Tensor | None

    def __init__(
        self,
        anchors: Tensor | None,
        *,
        student_dim: int,
        teacher_dim: int | None = None,
        rectify: Rectification = "recentre",
        class_means: Tensor | None = None,
        strength: Tensor | None = None,
        distance: Distance = "cosine",
    ) -> None:
        super().__init__()
        check_choice("rectify", rectify, RECTIFICATIONS)
        check_choice("distance", distance, tuple(DISTANCES))
        self.rectify: Rectification = rectify
        self.distance: Distance = distance
        if rectify != "none":
            _needed("anchors", anchors, rectify)
        if anchors is not None:
            check_finite("anchors", check_matrix("anchors", anchors, "(K, D)", columns=teacher_dim))
            teacher_dim = anchors.shape[1]
        elif teacher_dim is None:
            raise ArgumentError("teacher_dim: expected the width of the teacher's feature where there are no anchors.")
        if rectify == "recentre":
            rows, columns = _needed("anchors", anchors, rectify).shape
            means = _needed("class_means", class_means, rectify)
            check_finite("class_means", check_matrix("class_means", means, "(K, D)", rows=rows, columns=columns))
        elif rectify == "blend":
            rows = _needed("anchors", anchors, rectify).shape[0]
            share = _needed("strength", strength, rectify)
            check_per_class("strength", share, rows, low=0, high=1, expected="numbers in [0, 1]")
        self.projector = Projector(student_dim, teacher_dim)
        used = {"recentre": {"anchors", "class_means"}, "blend": {"anchors", "strength"}, "none": set()}[rectify]
        for name, x in (("anchors", anchors), ("class_means", class_means), ("strength", strength)):
            self.register_buffer(name, _constant(x) if x is not None and name in used else None)

    def forward(self, student_features: Tensor, teacher_features: Tensor, labels: Tensor) -> Tensor:
        return rrd_loss(
            self.projector(student_features),
            teacher_features,
            labels,
            anchors=self.anchors,
            rectify=self.rectify,
            class_means=self.class_means,
            strength=self.strength,
            distance=self.distance,
        )

    def extra_repr(self) -> str:
        return f"rectify={self.rectify!r}, distance={self.distance!r}"
