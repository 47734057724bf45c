"""What a recipe becomes: one module that turns a student's and a teacher's outputs into named loss terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .anchors import align_anchors, balanced_anchors
from .errors import ModelError
from .losses import BalancedSoftmax, CrossEntropy, LogitRectifiedDistillation, RepresentationRectifiedDistillation
from .losses.krdistill import group_sample_weights
from .outputs import LossTerms, Outputs
from .priors import ClassGroups, ClassPrior
from .recipes import DistillOptions, Options
from .rectify import auto_tau, mean_prediction, rarity
from .rng import derive_seed


@dataclass(frozen=True, eq=False)
class TeacherProfile:
    """What is measured of a teacher once, before anything is distilled.

    Attributes:
        class_means: normalised mean of its normalised features by class, on the training images, ``(K, D)``.
        view_logits: its answers to images it was not fitted to (a validation part, or strongly augmented training
            images), ``(M, K)``.
        view_labels: their labels, ``(M,)``.
        views: what those images were, in words.
    """

    class_means: Tensor
    view_logits: Tensor
    view_labels: Tensor
    views: str

    def log_prior(self) -> Tensor:
        """The teacher's own prior: log of its class-balanced mean prediction, ``(K,)``, float64."""
        return mean_prediction(self.view_logits, self.view_labels).clamp_min(1e-12).log()


@dataclass(frozen=True, eq=False)
class ObjectiveContext:
    """What an objective is built from.

    Attributes:
        prior: of the training labels.
        groups: of the classes.
        student_dim: width of the student's feature.
        teacher: the teacher's profile, or None where the recipe takes no teacher.
        seed: for anchors and projectors.
        label_smoothing: of the classification loss.
    """

    prior: ClassPrior
    groups: ClassGroups
    student_dim: int
    teacher: TeacherProfile | None = None
    seed: int = 0
    label_smoothing: float = 0.0

    def require_teacher(self, recipe: str) -> TeacherProfile:
        if self.teacher is None:
            raise ModelError(
                f"Recipe options of {recipe} need a teacher, got none; give one, or use the recipe 'none'."
            )
        return self.teacher


class Objective(nn.Module):
    """Classification loss plus weighted distillation terms; gives per-sample :class:`LossTerms`.

    Args:
        classification: module ``(logits, labels) -> (B,)``.
        classification_weight: its weight; 0 leaves it out.
        logit: module ``(student_logits, teacher_logits, labels) -> (B,)``, or None.
        logit_weight: its weight.
        feature: module ``(student_feature, teacher_feature, labels) -> (B,)``, or None; it may hold a projector.
        feature_weight: its weight.
        names: names of the logit and the feature term in the log.
    """

    def __init__(
        self,
        classification: nn.Module,
        *,
        classification_weight: float = 1.0,
        logit: nn.Module | None = None,
        logit_weight: float = 1.0,
        feature: nn.Module | None = None,
        feature_weight: float = 1.0,
        names: tuple[str, str] = ("logit", "feature"),
    ) -> None:
        super().__init__()
        self.classification = classification
        self.logit = logit
        self.feature = feature
        self.weights = {"classification": classification_weight, "logit": logit_weight, "feature": feature_weight}
        self.names = names
        self.summary: dict[str, Any] = {}

    @property
    def needs_teacher(self) -> bool:
        return self.logit is not None or self.feature is not None

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor) -> LossTerms:
        """Loss terms of a batch.

        Args:
            student: the student's outputs.
            teacher: the teacher's, or None where :attr:`needs_teacher` is false.
            labels: shape ``(B,)``.
        """
        terms: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        if self.weights["classification"] > 0:
            terms["classification"] = self.weights["classification"] * self.classification(student.logits, labels)
        if self.needs_teacher:
            if teacher is None:
                raise ModelError("This objective needs the teacher's outputs, got None.")
            if self.logit is not None:
                terms[self.names[0]] = self.weights["logit"] * self.logit(student.logits, teacher.logits, labels)
                if isinstance(self.logit, LogitRectifiedDistillation) and self.logit.correction != "none":
                    stats["corrected"] = self.logit.corrected(teacher.logits, labels)
            if self.feature is not None:
                terms[self.names[1]] = self.weights["feature"] * self.feature(student.feature, teacher.feature, labels)
        return LossTerms(terms, stats)


def classification_loss(
    name: Literal["cross-entropy", "balanced-softmax"], prior: ClassPrior, label_smoothing: float = 0.0
) -> nn.Module:
    """A classification loss by name."""
    if name == "balanced-softmax":
        return BalancedSoftmax(prior.counts, label_smoothing=label_smoothing)
    return CrossEntropy(label_smoothing=label_smoothing)


def supervised_objective(options: Options, context: ObjectiveContext) -> Objective:
    """An objective without a teacher."""
    loss = classification_loss(options.classification, context.prior, context.label_smoothing)
    return Objective(loss, classification_weight=options.classification_weight)


def distillation_objective(options: DistillOptions, context: ObjectiveContext) -> Objective:
    """An objective of a (rectified) logit term and a (rectified) feature term, as the options say."""
    logit = _logit_term(options, context) if options.logit_weight > 0 else None
    feature = _feature_term(options, context) if options.feature_weight > 0 else None
    rectified_logits = options.prior != "none" or options.correction != "none"
    objective = Objective(
        classification_loss(options.classification, context.prior, context.label_smoothing),
        classification_weight=options.classification_weight,
        logit=logit,
        logit_weight=options.logit_weight,
        feature=feature,
        feature_weight=options.feature_weight,
        names=("lrd" if rectified_logits else "kd", "rrd" if options.rectify != "none" else "feature"),
    )
    if isinstance(logit, LogitRectifiedDistillation):
        objective.summary["tau"] = logit.tau
    return objective


def resolve_tau(options: DistillOptions, context: ObjectiveContext) -> tuple[Tensor, float]:
    """The log prior that is removed from the teacher's logits, and how much of it."""
    if options.prior == "none":
        return torch.zeros(context.prior.num_classes, dtype=torch.float64), 0.0
    teacher = context.require_teacher("prior removal")
    log_prior = context.prior.log_prior if options.prior == "label" else teacher.log_prior()
    if options.tau == "auto":
        return log_prior, auto_tau(teacher.view_logits, teacher.view_labels, log_prior)
    return log_prior, float(options.tau)


def _logit_term(options: DistillOptions, context: ObjectiveContext) -> nn.Module:
    log_prior, tau = resolve_tau(options, context)
    weights = group_sample_weights(context.prior.counts, context.groups.index) if options.group_weights else None
    return LogitRectifiedDistillation(
        log_prior, tau=tau, correction=options.correction, temperature=options.temperature, class_weights=weights
    )


def _feature_term(options: DistillOptions, context: ObjectiveContext) -> nn.Module:
    means = context.require_teacher("feature matching").class_means
    anchors = None
    if options.rectify != "none":
        seed = derive_seed(context.seed, "anchors") % 2**31
        anchors = align_anchors(balanced_anchors(means.shape[0], means.shape[1], seed=seed), means)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(context.seed, "projector"))
        return RepresentationRectifiedDistillation(
            anchors,
            student_dim=context.student_dim,
            teacher_dim=means.shape[1],
            rectify=options.rectify,
            class_means=means if options.rectify == "recentre" else None,
            strength=rarity(context.prior.counts, options.blend_strength) if options.rectify == "blend" else None,
            distance=options.distance,
        )
