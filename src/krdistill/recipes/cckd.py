"""Li, Li, Ye, Zhan, Class-Conditional Knowledge Distillation (CCKD), ICML 2024, PMLR 235:28204."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from .base import COUNTS, Classification, Recipe, Source
from .divergence import LogitOptions, one_term

if TYPE_CHECKING:
    from ..objective import Objective, ObjectiveContext


class CCKDOptions(LogitOptions):
    """Options of CCKD."""

    classification: Classification = "balanced-softmax"
    temperature: float = Field(default=2.0, gt=0)


def build(options: CCKDOptions, context: ObjectiveContext) -> Objective:
    from ..losses.cckd import ClassConditionalDistillation
    from ..objective import on_logits

    teacher = context.require_teacher("CCKD")
    module = ClassConditionalDistillation(teacher.log_prior(), context.prior.log_prior, temperature=options.temperature)
    return one_term(options, context, "cckd", module, on_logits, weight=options.logit_weight)


RECIPES = (
    Recipe(
        name="cckd",
        summary="the teacher's own prior removed, the training prior put on the student's side",
        source=Source("Class-Conditional Knowledge Distillation (ICML, PMLR 235:28204)", 2024),
        needs=COUNTS,
        options=CCKDOptions,
        defaults_from="a third party's re-implementation: T 2, weights 1 / 1",
        build=build,
    ),
)
