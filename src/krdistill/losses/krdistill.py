"""KRDistill: logit-rectified (LRD) and representation-rectified (RRD) distillation, in our formulation.

Source: Huang et al., "Learn from Balance: Rectifying Knowledge Transfer for Long-Tailed Scenarios", 2024,
arXiv 2409.07694. Its equations are not public: the two losses' names and purposes are the paper's, the formulas below
are ours.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from .._checks import (
    at_least_float32,
    check_choice,
    check_finite,
    check_labels,
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
from ..rectify.variance_transfer import transfer_variance
from .feature_matching import Projector, cosine_distance, squared_distance
from .kd import softened_divergence

Correction = Literal["lift", "swap", "none"]
Rectification = Literal["recentre", "blend", "variance-transfer", "none"]
PriorSide = Literal["teacher", "student"]
Distance = Literal["cosine", "squared"]

RECTIFICATIONS = ("recentre", "blend", "variance-transfer", "none")
PRIOR_SIDES = ("teacher", "student")
DISTANCES = {"cosine": cosine_distance, "squared": squared_distance}
_USES = {  # what each rectification takes besides the teacher's feature
    "recentre": {"anchors", "class_means"},
    "blend": {"anchors", "strength"},
    "variance-transfer": {"class_means", "strength", "variation"},
    "none": set(),
}
_Given = TypeVar("_Given")


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
    prior_side: PriorSide = "teacher",
) -> Tensor:
    r"""Logit-rectified distillation, our formulation: the student follows the teacher's rectified prediction.

    .. math:: w_y \, T^2 \, \operatorname{KL}\big(\operatorname{softmax}((\tilde z + o) / T) \,\|\,
        \operatorname{softmax}((z_s + o) / T)\big), \qquad o =
        \begin{cases}
        0 & \text{teacher} \\
        \tau \log \pi & \text{student}
        \end{cases}

    Both are 0 where the student's logits are the rectified ones. On the student's side the predictions are compared as
    the training set has them: without correction, the teacher's as it is with the student's under the prior.

    Args:
        student_logits: z_s, shape ``(B, K)``.
        teacher_logits: z_t, shape ``(B, K)``; no gradient flows to them.
        labels: y, shape ``(B,)``.
        log_prior, tau, correction: as in :func:`rectify_logits`.
        temperature: T > 0.
        class_weights: w, shape ``(K,)``, finite, >= 0; by default 1. See :func:`tail_weights`.
        prior_side: whether the prior is taken off the ``teacher`` or put on the ``student``.

    Returns:
        Shape ``(B,)``; float32, or float64 where the logits are.

    Raises:
        ArgumentError: arguments that do not fit.

    Source: arXiv 2409.07694 names the loss and its purpose; the formula is ours. The prior on the student's side:
    Li, Li, Ye, Zhan, "Class-Conditional Knowledge Distillation" (CCKD), ICML 2024, PMLR 235:28204.
    """
    check_choice("prior_side", prior_side, PRIOR_SIDES)
    rectified, _ = rectify_logits(teacher_logits, labels, log_prior=log_prior, tau=tau, correction=correction)
    offset = None
    if prior_side == "student":
        offset = tau * like(log_prior, rectified)
        rectified = rectified.detach().add_(offset)
    return _weighted_divergence(student_logits, rectified, labels, temperature, class_weights, offset)


def _weighted_divergence(
    student_logits: Tensor,
    target_logits: Tensor,
    labels: Tensor,
    temperature: float,
    class_weights: Tensor | None,
    offset: Tensor | None = None,
) -> Tensor:
    """Of a target that may be overwritten."""
    check_logits("student_logits", student_logits)
    check_logits("teacher_logits", target_logits, rows=len(student_logits), columns=student_logits.shape[1])
    T = check_number("temperature", temperature, above=0)
    student = at_least_float32(student_logits)
    offset = None if offset is None else like(offset, student)
    # The rectified logits are a temporary: removing the prior always makes a new tensor.
    loss = softened_divergence(student, target_logits.detach(), T, offset=offset, owned=True)
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
        tau, correction, temperature, class_weights, prior_side: as in :func:`lrd_loss`.
        warmup: share of the training over which tau rises from 0, in [0, 1]: rectification is deferred.
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
        prior_side: PriorSide = "teacher",
        warmup: float = 0.0,
    ) -> None:
        super().__init__()
        self.tau = check_number("tau", tau)
        self.correction: Correction = correction
        check_choice("correction", correction, CORRECTIONS)
        self.prior_side: PriorSide = prior_side
        check_choice("prior_side", prior_side, PRIOR_SIDES)
        self.warmup = check_number("warmup", warmup, at_least=0, at_most=1)
        self.temperature = check_number("temperature", temperature, above=0)
        if not isinstance(log_prior, Tensor) or log_prior.ndim != 1 or len(log_prior) < 2:
            raise ArgumentError(f"log_prior: expected shape (K,), at least 2 classes, but got {describe(log_prior)}.")
        expected = "a finite log prior (no class without images)"
        check_per_class("log_prior", log_prior, len(log_prior), expected=expected)
        self.register_buffer("log_prior", _constant(log_prior))
        if class_weights is not None:
            class_weights = _constant(_check_class_weights(class_weights, len(log_prior)))
        self.register_buffer("class_weights", class_weights)

    def tau_at(self, progress: float) -> float:
        """tau after that share of the training."""
        return self.tau * min(1.0, progress / self.warmup) if self.warmup > 0 else self.tau

    def rectify(self, teacher_logits: Tensor, labels: Tensor, progress: float = 1.0) -> tuple[Tensor, Tensor]:
        """:func:`rectify_logits` with this module's settings: rectified logits, and where the correction acted."""
        return rectify_logits(
            teacher_logits, labels, log_prior=self.log_prior, tau=self.tau_at(progress), correction=self.correction
        )

    def corrected(self, teacher_logits: Tensor, labels: Tensor, progress: float = 1.0) -> Tensor:
        """Where the error correction acts, shape ``(B,)``, bool."""
        if self.correction == "none":
            return torch.zeros(len(labels), dtype=torch.bool, device=teacher_logits.device)
        return errors(remove_prior(teacher_logits, self.log_prior, self.tau_at(progress)), labels)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, progress: float = 1.0) -> Tensor:
        return lrd_loss(
            student_logits,
            teacher_logits,
            labels,
            log_prior=self.log_prior,
            tau=self.tau_at(progress),
            correction=self.correction,
            temperature=self.temperature,
            class_weights=self.class_weights,
            prior_side=self.prior_side,
        )

    def extra_repr(self) -> str:
        return (
            f"tau={self.tau}, correction={self.correction!r}, temperature={self.temperature}, "
            f"prior_side={self.prior_side!r}, warmup={self.warmup}"
        )


def rrd_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    labels: Tensor,
    *,
    anchors: Tensor | None,
    rectify: Rectification = "recentre",
    class_means: Tensor | None = None,
    strength: Tensor | None = None,
    variation: tuple[Tensor, Tensor] | None = None,
    distance: Distance = "cosine",
    class_weights: Tensor | None = None,
) -> Tensor:
    r"""Representation-rectified distillation, our formulation: the student follows the teacher's rectified feature.

    .. math:: w_y \, d\big(f_s, r\big), \qquad r =
        \begin{cases}
        \operatorname{norm}(\operatorname{norm}(f_t) - m_y + c_y) & \text{recentre} \\
        \operatorname{norm}((1 - \lambda_y) \operatorname{norm}(f_t) + \lambda_y c_y) & \text{blend} \\
        \operatorname{norm}(m_y + V g_y V^\top (\operatorname{norm}(f_t) - m_y)) & \text{variance-transfer} \\
        \operatorname{norm}(f_t) & \text{none}
        \end{cases}

    Args:
        student_features: f_s, already projected to the teacher's width, shape ``(B, D)``.
        teacher_features: f_t, shape ``(B, D)``; no gradient flows to them.
        labels: y, shape ``(B,)``.
        anchors: c, shape ``(K, D)``, row k for class k; needed and used by ``recentre`` and ``blend``.
        rectify: see above.
        class_means: m, shape ``(K, D)``, needed and used by ``recentre`` and ``variance-transfer``.
        strength: lambda, shape ``(K,)``, in [0, 1], needed and used by ``blend`` and ``variance-transfer``, whose gains
            g are those of :func:`transfer_variance`.
        variation: V and s of :func:`within_class_variation`, needed and used by ``variance-transfer`` alone.
        distance: ``cosine`` (one minus it) or ``squared`` (of directions).
        class_weights: w, shape ``(K,)``, finite, >= 0; by default 1. See :func:`tail_weights`.

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
    elif rectify == "variance-transfer":
        means, share = _needed("class_means", class_means, rectify), _needed("strength", strength, rectify)
        target = transfer_variance(target, labels, means, *_needed("variation", variation, rectify), share)
    loss = DISTANCES[distance](student_features, target)
    if class_weights is None:
        return loss
    _check_class_weights(class_weights, len(class_weights))
    labels = check_labels(labels, len(loss), len(class_weights))
    return loss * like(class_weights, loss)[labels]


def _needed(name: str, x: _Given | None, rectify: str) -> _Given:
    if x is None:
        raise ArgumentError(f"{name}: rectify={rectify!r} needs it, but got None.")
    return x


class RepresentationRectifiedDistillation(nn.Module):
    """:func:`rrd_loss` as a module, with the projector from the student's width; the constants are float32 buffers.

    Args:
        anchors: shape ``(K, D)``, row k for class k; None where ``rectify`` needs none.
        student_dim: width of the student's feature.
        teacher_dim: D; by default the anchors' or the class means' width, and needed where there are neither.
        rectify, class_means, strength, variation, distance, class_weights: as in :func:`rrd_loss`.
    """

    anchors: Tensor | None
    class_means: Tensor | None
    strength: Tensor | None
    basis: Tensor | None
    variances: Tensor | None
    class_weights: Tensor | None

    def __init__(
        self,
        anchors: Tensor | None,
        *,
        student_dim: int,
        teacher_dim: int | None = None,
        rectify: Rectification = "recentre",
        class_means: Tensor | None = None,
        strength: Tensor | None = None,
        variation: tuple[Tensor, Tensor] | None = None,
        distance: Distance = "cosine",
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_choice("rectify", rectify, RECTIFICATIONS)
        check_choice("distance", distance, tuple(DISTANCES))
        self.rectify: Rectification = rectify
        self.distance: Distance = distance
        used = _USES[rectify]
        K = None
        for name, x in (("anchors", anchors), ("class_means", class_means)):
            if name in used:
                _needed(name, x, rectify)
            if x is not None and (name in used or name == "anchors"):
                check_finite(name, check_matrix(name, x, "(K, D)", rows=K, columns=teacher_dim))
                K, teacher_dim = x.shape
        if teacher_dim is None:
            raise ArgumentError("teacher_dim: expected the width of the teacher's feature where there are no anchors.")
        if "strength" in used:
            assert K is not None
            share = _needed("strength", strength, rectify)
            check_per_class("strength", share, K, low=0, high=1, expected="numbers in [0, 1]")
        basis, variances = None, None
        if "variation" in used:
            basis, variances = _needed("variation", variation, rectify)
            check_finite("basis", check_matrix("basis", basis, "(D, D)", rows=teacher_dim, columns=teacher_dim))
            check_per_class("variances", variances, teacher_dim, low=0, expected="finite numbers >= 0")
        if class_weights is not None:
            _check_class_weights(class_weights, len(class_weights) if K is None else K)
        self.projector = Projector(student_dim, teacher_dim)
        for name, x in (("anchors", anchors), ("class_means", class_means), ("strength", strength)):
            self.register_buffer(name, _constant(x) if x is not None and name in used else None)
        for name, x in (("basis", basis), ("variances", variances), ("class_weights", class_weights)):
            self.register_buffer(name, None if x is None else _constant(x))

    def forward(self, student_features: Tensor, teacher_features: Tensor, labels: Tensor) -> Tensor:
        return rrd_loss(
            self.projector(student_features),
            teacher_features,
            labels,
            anchors=self.anchors,
            rectify=self.rectify,
            class_means=self.class_means,
            strength=self.strength,
            variation=None if self.basis is None or self.variances is None else (self.basis, self.variances),
            distance=self.distance,
            class_weights=self.class_weights,
        )

    def extra_repr(self) -> str:
        return f"rectify={self.rectify!r}, distance={self.distance!r}"
