"""The family that most recipes belong to: a classification loss, a term on (rectified) logits, terms on features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from .base import Options

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..losses import Projector, PrototypeContrast, RectifiedClassifier, RepresentationRectifiedDistillation
    from ..objective import Objective, ObjectiveContext, TeacherProfile, Term
    from ..outputs import Step
    from ..rectify.classifier_refit import RefittedTeacher

Weighting = Literal["none", "inverse-sqrt", "effective-number", "group"]


class DistillOptions(Options):
    """Options of the recipes built from rectified logits and rectified features.

    The student's feature is projected to the teacher's width once, for all terms on features.

    Attributes:
        logit_weight: weight of the divergence on predictions; 0 leaves it out.
        temperature: of that divergence, and of the one through the teacher's classifier.
        prior: which class prior is removed from the teacher's logits: none, the training ``label`` frequencies, or the
            ``teacher``'s own class-balanced mean prediction on images it was not fitted to. With ``refit`` none is in
            them: a classifier that is fitted on the teacher's features with balanced softmax takes its own one's place.
        tau: how much of it: a number, ``auto`` (the value that evens out the class-mean confidences), or ``per-class``
            (a value for every class, so that they are equal; with prior ``label``). With ``refit`` a number: how much
            of the label prior the loss of the fit holds; more than 1 is more for the tail, less for the head.
        prior_side: whether the prior is taken off the ``teacher`` or put on the ``student`` of that divergence.
        correction: what happens where the teacher is wrong: ``lift`` raises the true class to the top, ``swap`` lets
            it trade places with the winner.
        lrd_weighting: how much more the tail counts in the logit term: ``inverse-sqrt`` and ``effective-number`` of the
            class sizes, or ``group`` (every group of classes has the same share). The mean weight is 1.
        lrd_warmup: share of the training over which the logit term's tau rises from 0.
        feature_weight: weight of the match of features; 0 leaves it out.
        rectify: what is done to the teacher's feature: ``recentre`` moves it from its class mean to the class's
            balanced anchor, ``blend`` mixes the anchor in, the more the rarer the class, ``variance-transfer`` keeps
            the variation that the head has too and takes the rest back to the class mean, the more the rarer the class.
        blend_strength: the largest share of the anchor in ``blend``, or of the noise in ``variance-transfer``.
        distance: between the student's projected feature and the (rectified) teacher's.
        contrast_weight: weight of the contrast of the projected feature to one prototype per class; 0 leaves it out.
        contrast_to: which prototypes: balanced ``anchors`` turned to the teacher's class means, or those ``means``.
        contrast_temperature: of their cosines.
        classifier_weight: weight of the divergence through the teacher's classifier, which takes the projected feature
            and has the same prior removed as the teacher's prediction; 0 leaves it out.
        rrd_weighting: as lrd_weighting, for every term on features.
    """

    logit_weight: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=4.0, gt=0)
    prior: Literal["none", "label", "teacher", "refit"] = "none"
    tau: float | Literal["auto", "per-class"] = 1.0
    prior_side: Literal["teacher", "student"] = "teacher"
    correction: Literal["none", "lift", "swap"] = "none"
    lrd_weighting: Weighting = "none"
    lrd_warmup: float = Field(default=0.0, ge=0, le=1)
    feature_weight: float = Field(default=0.0, ge=0)
    rectify: Literal["none", "recentre", "blend", "variance-transfer"] = "none"
    blend_strength: float = Field(default=0.5, ge=0, le=1)
    distance: Literal["cosine", "squared"] = "cosine"
    contrast_weight: float = Field(default=0.0, ge=0)
    contrast_to: Literal["anchors", "means"] = "anchors"
    contrast_temperature: float = Field(default=0.1, gt=0)
    classifier_weight: float = Field(default=0.0, ge=0)
    rrd_weighting: Weighting = "none"

    @property
    def uses_features(self) -> bool:
        weights = (self.feature_weight, self.contrast_weight, self.classifier_weight)
        return any(w > 0 for w in weights) or self.refits

    @property
    def refits(self) -> bool:
        """Whether a classifier fitted on the teacher's features answers for it."""
        return self.prior == "refit" and (self.logit_weight > 0 or self.classifier_weight > 0)

    @model_validator(mode="after")
    def _nothing_silent(self) -> DistillOptions:
        logits, features = self.logit_weight > 0, self.feature_weight > 0
        contrast, classifier = self.contrast_weight > 0, self.classifier_weight > 0
        if self.classification_weight == 0 and not (logits or features or contrast or classifier):
            raise ValueError("all weights are 0, so nothing would be trained")
        if self.prior == "refit" and not isinstance(self.tau, float):
            raise ValueError(f"tau {self.tau!r} is of a prior that is subtracted; give a number, or take prior label")
        if self.tau == "per-class" and self.prior == "teacher":
            raise ValueError("tau 'per-class' gives every class its own share whatever the prior; take prior 'label'")
        given = self.model_fields_set
        for used, why, names in (
            (
                self.prior not in ("none", "refit"),
                f"prior is {self.prior!r}" + ("; set prior to label" if self.prior == "refit" else ""),
                ("prior_side", "lrd_warmup"),
            ),
            (self.prior != "none", "prior is 'none'", ("tau",)),
            (
                logits or classifier,
                "logit_weight and classifier_weight are 0",
                ("temperature", "prior", "tau", "correction"),
            ),
            (logits, "logit_weight is 0", ("prior_side", "lrd_weighting", "lrd_warmup")),
            (features, "feature_weight is 0", ("rectify", "blend_strength", "distance")),
            (
                self.rectify in ("blend", "variance-transfer"),
                f"rectify is {self.rectify!r}",
                ("blend_strength",),
            ),
            (contrast, "contrast_weight is 0", ("contrast_to", "contrast_temperature")),
            (features or contrast or classifier, "every weight on features is 0", ("rrd_weighting",)),
        ):
            idle = [name for name in names if name in given and getattr(self, name) not in ("none", 0.0)]
            if idle and not used:
                raise ValueError(f"{' and '.join(idle)} would have no effect, as {why}")
        return self


def build(options: DistillOptions, context: ObjectiveContext) -> Objective:
    """An objective of a (rectified) logit term and of terms on (rectified) features, as the options say."""
    from ..objective import Objective

    terms = [context.labels_term(options.classification, options.classification_weight)]
    on_predictions = options.logit_weight > 0 or options.classifier_weight > 0
    removed = resolve_tau(options, context) if on_predictions else None
    refitted = refitted_teacher(context, options.tau) if options.refits else None
    if removed and options.logit_weight > 0:
        terms.append(_logit_term(options, context, *removed))
    head = context.teacher_head if refitted is None else refitted.classifier
    terms += _feature_terms(options, context, removed, head)
    return Objective(
        terms,
        rectifier=refitted,
        summary={"tau": removed[1]} if removed and options.prior in ("label", "teacher") else {},
    )


def refitted_teacher(context: ObjectiveContext, tau: float | str = 1.0) -> RefittedTeacher:
    """The teacher with a classifier that is fitted on its features with balanced softmax."""
    from ..errors import ModelError
    from ..rectify.classifier_refit import RefittedTeacher

    teacher = context.require_teacher("Prior 'refit'")
    if not teacher.features.shape[1]:
        raise ModelError(
            "prior 'refit' fits a classifier on the teacher's features, and it shows none. Name the tensor that holds "
            "them with teacher.tap, store them with its answers, or take prior 'label' and feature_weight 0."
        )
    return RefittedTeacher(*teacher.refitted(float(tau), context.device))


def resolve_tau(options: DistillOptions, context: ObjectiveContext) -> tuple[Tensor, float]:
    """The log prior that is removed from the teacher's logits, and how much of it.

    With a tau per class it is the log prior times their ratios to their common part, which is the number.
    """
    from ..rectify import auto_tau, per_class_tau

    if options.prior in ("none", "refit"):
        return context.prior.log_prior, 0.0
    teacher = context.require_teacher("Prior removal")
    log_prior = context.prior.log_prior if options.prior == "label" else teacher.log_prior()
    if options.tau == "auto":
        return log_prior, auto_tau(teacher.view_logits, teacher.view_labels, log_prior)
    if options.tau == "per-class":
        tau, common = per_class_tau(teacher.view_logits, teacher.view_labels, log_prior)
        scale = common if abs(common) > 1e-3 else 1.0  # nearly even counts have no common part to speak of
        return tau * log_prior / scale, scale
    return log_prior, float(options.tau)


def _logit_term(options: DistillOptions, context: ObjectiveContext, log_prior: Tensor, tau: float) -> Term:
    from ..losses import LogitRectifiedDistillation, tail_weights
    from ..objective import Term, on_logits, on_logits_and_progress

    module = LogitRectifiedDistillation(
        log_prior,
        tau=tau,
        correction=options.correction,
        temperature=options.temperature,
        class_weights=tail_weights(context.prior.counts, options.lrd_weighting, groups=context.groups),
        prior_side=options.prior_side,
        warmup=options.lrd_warmup,
    )
    corrects = options.correction != "none"
    name = "lrd" if options.prior != "none" or corrects else "kd"
    stats = {"corrected": _corrected} if corrects else {}
    call = on_logits_and_progress if options.lrd_warmup > 0 else on_logits
    return Term(name, module, call, weight=options.logit_weight, stats=stats)


def _corrected(module: nn.Module, step: Step) -> Tensor:
    from ..losses import LogitRectifiedDistillation

    assert isinstance(module, LogitRectifiedDistillation) and step.teacher is not None
    return module.corrected(step.teacher.logits, step.labels, step.progress)


def _feature_terms(
    options: DistillOptions,
    context: ObjectiveContext,
    removed: tuple[Tensor, float] | None,
    head: nn.Linear | None,
) -> list[Term]:
    from ..errors import ModelError
    from ..losses import Projector, tail_weights
    from ..objective import Term, on_classified_features, on_features, on_student_feature
    from ..rng import forked

    if not (options.feature_weight > 0 or options.contrast_weight > 0 or options.classifier_weight > 0):
        return []
    teacher = context.require_teacher("Feature matching")
    width = teacher.class_means.shape[1]
    if not width:
        raise ModelError(
            "Terms on features need the teacher's features, and it shows none. Name the tensor that holds them with "
            "teacher.tap, or set feature_weight, contrast_weight and classifier_weight to 0."
        )
    weights = tail_weights(context.prior.counts, options.rrd_weighting, groups=context.groups)
    anchored = options.feature_weight > 0 and options.rectify in ("recentre", "blend")
    anchored = anchored or (options.contrast_weight > 0 and options.contrast_to == "anchors")
    anchors = _anchors(context, teacher) if anchored else None
    terms = []
    with forked(context.seed, "projector"):
        if options.feature_weight > 0:
            matching = _matching(options, context, teacher, anchors, weights)
            projector = matching.projector
            name = "rrd" if options.rectify != "none" else "feature"
            terms.append(Term(name, matching, on_features, weight=options.feature_weight))
        else:
            projector = Projector(context.student_dim, width)
    if options.contrast_weight > 0:
        prototypes = anchors if options.contrast_to == "anchors" and anchors is not None else teacher.class_means
        contrast = _contrast(options, context, prototypes, projector, weights)
        terms.append(Term("contrast", contrast, on_student_feature, weight=options.contrast_weight))
    if removed and options.classifier_weight > 0:
        classifier = _classifier(options, head, *removed, projector, weights)
        terms.append(Term("classifier", classifier, on_classified_features, weight=options.classifier_weight))
    return terms


def _anchors(context: ObjectiveContext, teacher: TeacherProfile) -> Tensor:
    """Balanced anchors, turned towards the teacher's class means."""
    from ..anchors import align_anchors, balanced_anchors
    from ..rng import derive_seed

    means = teacher.class_means
    seed = derive_seed(context.seed, "anchors") % 2**31
    return align_anchors(balanced_anchors(means.shape[0], means.shape[1], seed=seed), means)


def _matching(
    options: DistillOptions,
    context: ObjectiveContext,
    teacher: TeacherProfile,
    anchors: Tensor | None,
    weights: Tensor | None,
) -> RepresentationRectifiedDistillation:
    from ..losses import RepresentationRectifiedDistillation
    from ..rectify import rarity, within_class_variation

    form, means = options.rectify, teacher.class_means
    by_rarity = form in ("blend", "variance-transfer")
    varies = form == "variance-transfer"
    return RepresentationRectifiedDistillation(
        anchors if form in ("recentre", "blend") else None,
        student_dim=context.student_dim,
        teacher_dim=means.shape[1],
        rectify=form,
        class_means=means if form in ("recentre", "variance-transfer") else None,
        strength=rarity(context.prior.counts, options.blend_strength) if by_rarity else None,
        variation=within_class_variation(teacher.features, teacher.labels, means) if varies else None,
        distance=options.distance,
        class_weights=weights,
    )


def _contrast(
    options: DistillOptions, context: ObjectiveContext, prototypes: Tensor, projector: Projector, weights: Tensor | None
) -> PrototypeContrast:
    from ..losses import PrototypeContrast

    return PrototypeContrast(
        prototypes,
        context.prior.log_prior,
        projector=projector,
        temperature=options.contrast_temperature,
        class_weights=weights,
    )


def _classifier(
    options: DistillOptions,
    head: nn.Linear | None,
    log_prior: Tensor,
    tau: float,
    projector: Projector,
    weights: Tensor | None,
) -> RectifiedClassifier:
    from torch import nn

    from ..errors import ModelError
    from ..losses import RectifiedClassifier

    if type(head) is not nn.Linear:  # a cosine or an anchored head is one too, and more
        raise ModelError(
            "classifier_weight needs a teacher whose last layer is linear and at hand, got "
            f"{'none' if head is None else type(head).__name__}. Set it to 0, or take another teacher."
        )
    return RectifiedClassifier(
        head,
        log_prior,
        projector=projector,
        tau=tau,
        correction=options.correction,
        temperature=options.temperature,
        class_weights=weights,
    )
