"""He, Wu, Wei, "Distilling Virtual Examples for Long-tailed Recognition", ICCV 2021, arXiv 2103.15042."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from .base import COUNTS, Classification, Recipe, Source
from .divergence import LogitOptions, one_term

if TYPE_CHECKING:
    from ..objective import Objective, ObjectiveContext


class DiVEOptions(LogitOptions):
    """Options of DiVE.

    Attributes:
        power: exponent of the teacher's softened prediction; below 1 it is flatter.
        prior: ``label`` removes the training prior from a teacher trained with cross-entropy; ``none`` is for one
            trained with balanced softmax, as the paper's.
    """

    classification: Classification = "balanced-softmax"
    classification_weight: float = Field(default=0.5, ge=0)
    logit_weight: float = Field(default=0.5, gt=0)
    temperature: float = Field(default=3.0, gt=0)
    power: float = Field(default=0.5, gt=0)
    prior: Literal["label", "none"] = "label"


def build(options: DiVEOptions, context: ObjectiveContext) -> Objective:
    from ..losses.dive import VirtualExamples
    from ..objective import on_logits

    module = VirtualExamples(
        context.prior.log_prior if options.prior == "label" else None,
        power=options.power,
        temperature=options.temperature,
    )
    return one_term(options, context, "dive", module, on_logits, weight=options.logit_weight)


RECIPES = (
    Recipe(
        name="dive",
        summary="the power-normalised prediction of a balanced teacher",
        source=Source("Distilling Virtual Examples for Long-tailed Recognition", 2021, "2103.15042"),
        needs=COUNTS,
        options=DiVEOptions,
        defaults_from="the paper's CIFAR setting (T 3, p 0.5, weights 0.5 / 0.5); a plain teacher's prior is removed",
        build=build,
    ),
)
