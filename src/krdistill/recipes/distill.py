"""The family that most recipes belong to: a classification loss, a term on (rectified) logits, one on features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from .base import Options

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..objective import Objective, ObjectiveContext, Term
    from ..outputs import Step


class DistillOptions(Options):
    """Options of the recipes built from a rectified-logit and a rectified-feature term.

    Attributes:
        logit_weight: weight of the divergence on predictions; 0 leaves it out.
        temperature: of that divergence.
        prior: which class prior is removed from the teacher's logits: none, the training ``label`` frequencies, or the
            ``teacher``'s own class-balanced mean prediction on images it was not fitted to.
        tau: how much of it, a number or ``auto`` (the value that evens out the class-mean confidences).
        correction: what happens where the teacher is wrong: ``lift`` raises the true class to the top, ``swap`` lets
            it trade places with the winner.
        group_weights: weight samples so that every group of classes has the same share of the logit term.
        feature_weight: weight of the match of features; 0 leaves it out.
        rectify: what is done to the teacher's feature: ``recentre`` moves it from its class mean to the class's
            balanced anchor, ``blend`` mixes the anchor in, the more the rarer the class.
        blend_strength: the largest share of the anchor in ``blend``.
        distance: between the student's projected feature and the (rectified) teacher's.
    """

    logit_weight: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=4.0, gt=0)
    prior: Literal["none", "label", "teacher"] = "none"
    tau: float | Literal["auto"] = 1.0
    correction: Literal["none", "lift", "swap"] = "none"
    group_weights: bool = False
    feature_weight: float = Field(default=0.0, ge=0)
    rectify: Literal["none", "recentre", "blend"] = "none"
    blend_strength: float = Field(default=0.5, ge=0, le=1)
    distance: Literal["cosine", "squared"] = "cosine"

    @model_validator(mode="after")
    def _nothing_silent(self) -> DistillOptions:
        if self.classification_weight == self.logit_weight == self.feature_weight == 0:
            raise ValueError("all weights are 0, so nothing would be trained")
        given = self.model_fields_set
        for used, why, names in (
            (self.prior != "none", "prior is 'none'", ("tau",)),
            (
                self.logit_weight > 0,
                "logit_weight is 0",
                ("temperature", "prior", "tau", "correction", "group_weights"),
            ),
            (self.feature_weight > 0, "feature_weight is 0", ("rectify", "blend_strength", "distance")),
            (self.rectify == "blend", f"rectify is {self.rectify!r}", ("blend_strength",)),
        ):
            idle = [name for name in names if name in given and getattr(self, name) not in ("none", False)]
            if idle and not used:
                raise ValueError(f"{' and '.join(idle)} would have no effect, as {why}")
        return self


def build(options: DistillOptions, context: ObjectiveContext) -> Objective:
    """An objective of a (rectified) logit term and a (rectified) feature term, as the options say."""
    from ..objective import Objective, classification_term

    summary = {}
    terms = [
        classification_term(
            options.classification,
            context.prior,
            label_smoothing=context.label_smoothing,
            weight=options.classification_weight,
        )
    ]
    if options.logit_weight > 0:
        logit, tau = _logit_term(options, context)
        terms.append(logit)
        if options.prior != "none":
            summary["tau"] = tau
    if options.feature_weight > 0:
        terms.append(_feature_term(options, context))
    return Objective(terms, summary=summary)


def resolve_tau(options: DistillOptions, context: ObjectiveContext) -> tuple[Tensor, float]:
    """The log prior that is removed from the teacher's logits, and how much of it."""
    from ..rectify import auto_tau

    if options.prior == "none":
        return context.prior.log_prior, 0.0
    teacher = context.require_teacher("Prior removal")
    log_prior = context.prior.log_prior if options.prior == "label" else teacher.log_prior()
    if options.tau == "auto":
        return log_prior, auto_tau(teacher.view_logits, teacher.view_labels, log_prior)
    return log_prior, float(options.tau)


def _logit_term(options: DistillOptions, context: ObjectiveContext) -> tuple[Term, float]:
    from ..losses import LogitRectifiedDistillation, group_sample_weights
    from ..objective import Term, on_logits

    log_prior, tau = resolve_tau(options, context)
    module = LogitRectifiedDistillation(
        log_prior,
        tau=tau,
        correction=options.correction,
        temperature=options.temperature,
        class_weights=group_sample_weights(context.prior.counts, context.groups) if options.group_weights else None,
    )
    corrects = options.correction != "none"
    name = "lrd" if options.prior != "none" or corrects else "kd"
    stats = {"corrected": _corrected} if corrects else {}
    return Term(name, module, on_logits, weight=options.logit_weight, stats=stats), tau


def _corrected(module: nn.Module, step: Step) -> Tensor:
    from ..losses import LogitRectifiedDistillation

    assert isinstance(module, LogitRectifiedDistillation) and step.teacher is not None
    return module.corrected(step.teacher.logits, step.labels)


def _feature_term(options: DistillOptions, context: ObjectiveContext) -> Term:
    from ..anchors import align_anchors, balanced_anchors
    from ..losses import RepresentationRectifiedDistillation
    from ..objective import Term, on_features
    from ..rectify import rarity
    from ..rng import derive_seed, forked

    means = context.require_teacher("Feature matching").class_means
    anchors = None
    if options.rectify != "none":
        seed = derive_seed(context.seed, "anchors") % 2**31
        anchors = align_anchors(balanced_anchors(means.shape[0], means.shape[1], seed=seed), means)
    with forked(context.seed, "projector"):
        module = RepresentationRectifiedDistillation(
            anchors,
            student_dim=context.student_dim,
            teacher_dim=means.shape[1],
            rectify=options.rectify,
            class_means=means if options.rectify == "recentre" else None,
            strength=rarity(context.prior.counts, options.blend_strength) if options.rectify == "blend" else None,
            distance=options.distance,
        )
    name = "rrd" if options.rectify != "none" else "feature"
    return Term(name, module, on_features, weight=options.feature_weight)
