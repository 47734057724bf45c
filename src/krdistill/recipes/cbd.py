"""Iscen et al., "Class-Balanced Distillation for Long-Tailed Visual Recognition", BMVC 2021, arXiv 2104.05279."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from .base import FEATURES, Options, Recipe, Source
from .divergence import one_term

if TYPE_CHECKING:
    from ..objective import Objective, ObjectiveContext


class CBDOptions(Options):
    """Options of CBD. Images are drawn class-balanced, unless ``train.sampler`` says otherwise.

    Attributes:
        alpha: share of the distillation; the classification loss has the rest.
        beta: weight of the cosine distance within it.
    """

    classification_weight: float = Field(default=0.6, ge=0)
    alpha: float = Field(default=0.4, gt=0, le=1)
    beta: float = Field(default=100.0, gt=0)


def build(options: CBDOptions, context: ObjectiveContext) -> Objective:
    from ..losses import RepresentationRectifiedDistillation
    from ..objective import on_features
    from ..rng import forked

    teacher = context.require_teacher("CBD")
    with forked(context.seed, "projector"):
        module = RepresentationRectifiedDistillation(
            None, student_dim=context.student_dim, teacher_dim=teacher.class_means.shape[1], rectify="none"
        )
    weight = options.alpha * options.beta
    return one_term(options, context, "cbd", module, on_features, weight=weight)


RECIPES = (
    Recipe(
        name="cbd",
        summary="class-balanced sampling for the student, features of an instance-sampled teacher",
        source=Source("Class-Balanced Distillation for Long-Tailed Visual Recognition", 2021, "2104.05279"),
        needs=FEATURES,
        options=CBDOptions,
        sampler="class-balanced",
        defaults_from="alpha 0.4, beta 100; one teacher in place of several",
        build=build,
    ),
)
