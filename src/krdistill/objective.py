"""What a recipe becomes: one module that turns a student's and a teacher's outputs into named loss terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ArgumentError, ModelError, unknown_name
from .losses import (
    LDAM,
    BalancedSoftmax,
    ClassBalancedCrossEntropy,
    ClassBalancedFocal,
    CrossEntropy,
    DotRegression,
    FocalLoss,
    LabelAwareSmoothing,
    LogitAdjustedLoss,
)
from .outputs import LossTerms, Step
from .priors import ClassGroups, ClassPrior
from .rectify import mean_prediction, refit_classifier
from .sampling import Sampling

Call = Callable[[nn.Module, Step], Tensor]


@dataclass(frozen=True, eq=False)
class TeacherProfile:
    """What is measured of a teacher once, before anything is distilled.

    Attributes:
        class_means: normalised mean of its normalised features by class, on the training images, ``(K, D)``.
        view_logits: its answers to images it was not fitted to (a validation part, or strongly augmented training
            images), ``(M, K)``.
        view_labels: their labels, ``(M,)``.
        views: what those images were, in words.
        features: its features of training images, ``(N', D)``: of all, or where they are too many, of as many of every
            class as can be kept.
        labels: their labels, ``(N',)``.
    """

    class_means: Tensor
    view_logits: Tensor
    view_labels: Tensor
    views: str
    features: Tensor
    labels: Tensor

    def refitted(self, tau: float = 1.0, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Weight ``(K, D)`` and bias ``(K,)`` of :func:`krdistill.rectify.refit_classifier` on its features.

        Found once for a tau: diagnosis, every student and the evaluation ask for it.
        """
        if tau not in self._refits:
            K = len(self.class_means)
            self._refits[tau] = refit_classifier(self.features, self.labels, K, tau=tau, device=device)
        return self._refits[tau]

    @cached_property
    def _refits(self) -> dict[float, tuple[Tensor, Tensor]]:
        return {}

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
        sampler: how the training images are drawn.
        label_smoothing: of the classification loss.
        student_maps: channels of the student's stages, where its network names them.
        teacher_maps: channels of the teacher's stages.
        labels: of the training images, ``(N,)``, for methods that keep a memory of every image.
        teacher_head: the teacher's last linear layer, for methods that use it again.
        device: where what is fitted to many features of the teacher is fitted; by default where they are.
    """

    prior: ClassPrior
    groups: ClassGroups
    student_dim: int
    teacher: TeacherProfile | None = None
    seed: int = 0
    sampler: Sampling = "instance"
    label_smoothing: float = 0.0
    student_maps: tuple[int, ...] = ()
    teacher_maps: tuple[int, ...] = ()
    labels: Tensor | None = None
    teacher_head: nn.Linear | None = None
    device: torch.device | None = None

    def labels_term(self, classification: str, weight: float = 1.0) -> Term:
        """The classification loss as a term; the class prior in it is that of the draws."""
        return classification_term(
            classification, self.prior, sampler=self.sampler, label_smoothing=self.label_smoothing, weight=weight
        )

    def require_teacher(self, what: str) -> TeacherProfile:
        if self.teacher is None:
            raise ModelError(f"{what} needs a teacher, got none. Give one, or use the recipe 'none'.")
        return self.teacher

    def require_maps(self, what: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Channels of the student's and the teacher's stages."""
        if not self.student_maps or not self.teacher_maps:
            who = "student" if not self.student_maps else "teacher"
            raise ModelError(f"{what} needs the stages of both networks, but the {who} is not one of krdistill's own.")
        return self.student_maps, self.teacher_maps


# How a term's module is called ---------------------------------------------------------------------------------------


def on_labels(module: nn.Module, step: Step) -> Tensor:
    """``module(student_logits, labels)``."""
    return module(step.student.logits, step.labels)


def on_labels_and_progress(module: nn.Module, step: Step) -> Tensor:
    """``module(student_logits, labels, progress)``."""
    return module(step.student.logits, step.labels, step.progress)


def on_logits(module: nn.Module, step: Step) -> Tensor:
    """``module(student_logits, teacher_logits, labels)``."""
    return module(step.student.logits, _answer(step).logits, step.labels)


def on_features(module: nn.Module, step: Step) -> Tensor:
    """``module(student_feature, teacher_feature, labels)``."""
    return module(step.student.feature, _answer(step).feature, step.labels)


def on_feature_pairs(module: nn.Module, step: Step) -> Tensor:
    """``module(student_feature, teacher_feature)``."""
    return module(step.student.feature, _answer(step).feature)


def on_indexed_features(module: nn.Module, step: Step) -> Tensor:
    """``module(student_feature, teacher_feature, labels, rows)``."""
    if step.rows is None:
        raise ModelError("This term keeps a memory of every training image and needs their row numbers, got None.")
    return module(step.student.feature, _answer(step).feature, step.labels, step.rows)


def on_student_feature(module: nn.Module, step: Step) -> Tensor:
    """``module(student_feature, labels)``: a head of its own beside the network's."""
    return module(step.student.feature, step.labels)


def on_classified_features(module: nn.Module, step: Step) -> Tensor:
    """``module(student_feature, teacher_logits, labels)``: the student's feature, classified as the teacher's."""
    return module(step.student.feature, _answer(step).logits, step.labels)


def on_logits_and_progress(module: nn.Module, step: Step) -> Tensor:
    """``module(student_logits, teacher_logits, labels, progress)``."""
    return module(step.student.logits, _answer(step).logits, step.labels, step.progress)


def on_last_maps(module: nn.Module, step: Step) -> Tensor:
    """``module(student_map, teacher_map)``, the deepest of each."""
    return module(step.student.maps[-1], _answer(step).maps[-1])


def on_maps(module: nn.Module, step: Step) -> Tensor:
    """``module(student_maps, teacher_maps)``."""
    return module(step.student.maps, _answer(step).maps)


def _answer(step: Step) -> Any:
    if step.teacher is None:
        raise ModelError("This objective needs the teacher's outputs, got None.")
    return step.teacher


class Term(nn.Module):
    """One weighted, named part of an objective.

    Args:
        name: in the log.
        module: gives per-sample values ``(B,)``.
        call: how the module is called, one of the ``on_...`` functions.
        weight: of the term.
        warmup: share of the training over which the weight rises from 0.
        stats: name to a function of the step, logged by class and not trained on.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        call: Call,
        *,
        weight: float = 1.0,
        warmup: float = 0.0,
        stats: Mapping[str, Call] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.module, self.call, self.weight, self.warmup = name, module, call, weight, warmup
        self.stats = dict(stats or {})

    def forward(self, step: Step) -> Tensor:
        rise = min(1.0, step.progress / self.warmup) if self.warmup > 0 else 1.0
        return self.weight * rise * self.call(self.module, step)


class Objective(nn.Module):
    """A sum of terms; gives per-sample :class:`LossTerms`. It may hold projectors, which are trained with the student.

    Args:
        terms: at least one; those of weight 0 are left out.
        rectifier: changes the teacher's outputs before the terms see them; None leaves them as they are.
        sampler: how the training images are to be drawn (:mod:`krdistill.sampling`), as its losses take it.
        summary: facts found while building, such as an automatic tau, for the record.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        *,
        rectifier: nn.Module | None = None,
        sampler: Sampling = "instance",
        summary: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        used = [term for term in terms if term.weight > 0]
        if not used or len({term.name for term in used}) != len(used):
            raise ModelError(f"Expected terms with different names and some weight, got {[t.name for t in terms]}.")
        self.terms = nn.ModuleList(used)
        self.rectifier = rectifier
        self.sampler = sampler
        self.summary = dict(summary or {})

    @property
    def needs_teacher(self) -> bool:
        return any(term.call not in _WITHOUT_TEACHER for term in self._terms())

    @property
    def needs_maps(self) -> bool:
        return any(term.call in (on_maps, on_last_maps) for term in self._terms())

    @property
    def needs_features(self) -> bool:
        asked = any(term.call in (on_features, on_feature_pairs, on_indexed_features) for term in self._terms())
        return asked or (self.rectifier is not None and self.needs_teacher)

    def forward(
        self, step: Step, *, own: Step | None = None, gather: Callable[[Tensor], Tensor] | None = None
    ) -> LossTerms:
        """Loss terms of a batch.

        Args:
            step: the batch.
            own: one process's share of it, with the maps that were not gathered; terms on maps are computed on it.
            gather: per-sample values of a share ``(b,)`` to those of the batch ``(B,)``; needed with ``own``.
        """
        step, own = self._rectified(step), None if own is None else self._rectified(own)
        terms = {}
        for term in self._terms():
            if own is not None and gather is not None and term.call in (on_maps, on_last_maps):
                terms[term.name] = gather(term(own))
            else:
                terms[term.name] = term(step)
            if terms[term.name].shape != step.labels.shape:
                raise ArgumentError(
                    f"{term.name}: expected a value for each of the {len(step.labels)} labels, but got shape "
                    f"{tuple(terms[term.name].shape)}. Do the outputs belong to one batch?"
                )
        stats = {name: call(t.module, step) for t in self._terms() for name, call in t.stats.items()}
        return LossTerms(terms, stats)

    def _rectified(self, step: Step) -> Step:
        if self.rectifier is None or step.teacher is None:
            return step
        return step._replace(teacher=self.rectifier(step.teacher))

    def _terms(self) -> list[Term]:
        return [term for term in self.terms if isinstance(term, Term)]


_WITHOUT_TEACHER = (on_labels, on_labels_and_progress, on_student_feature)


def classification_term(
    name: str, prior: ClassPrior, *, sampler: Sampling = "instance", label_smoothing: float = 0.0, weight: float = 1.0
) -> Term:
    """A classification loss by name, as a term.

    Args:
        name: one of :data:`krdistill.config.Classification`.
        prior: of the training labels.
        sampler: how the training images are drawn: balanced softmax and logit adjustment hold the prior of the draws.
        label_smoothing: for those that have it.
        weight: of the term.
    """
    counts, smooth = prior.counts, label_smoothing
    made: dict[str, Callable[[], nn.Module]] = {
        "cross-entropy": lambda: CrossEntropy(label_smoothing=smooth),
        "balanced-softmax": lambda: BalancedSoftmax(counts, label_smoothing=smooth, sampling=sampler),
        "logit-adjusted": lambda: LogitAdjustedLoss(counts, label_smoothing=smooth, sampling=sampler),
        "focal": FocalLoss,
        "class-balanced": lambda: ClassBalancedCrossEntropy(counts, label_smoothing=smooth),
        "class-balanced-focal": lambda: ClassBalancedFocal(counts),
        "label-aware-smoothing": lambda: LabelAwareSmoothing(counts),
        # The cosine head gives logits of scale 30, so that the deployed network's softmax means something.
        "ldam": lambda: LDAM(counts, scale=1.0, max_margin=15.0, drw_from=None),
        "ldam-drw": lambda: LDAM(counts, scale=1.0, max_margin=15.0),
        "dot-regression": DotRegression,
    }
    if name not in made:
        raise ModelError(unknown_name("classification loss", name, made))
    moves = name in ("balanced-softmax", "logit-adjusted") and sampler == "progressively-balanced"
    call = on_labels_and_progress if name == "ldam-drw" or moves else on_labels
    return Term("classification", made[name](), call, weight=weight)
