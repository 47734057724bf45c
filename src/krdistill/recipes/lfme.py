"""Xiang, Ding, Han, "Learning From Multiple Experts", ECCV 2020, arXiv 2001.01536."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from .base import Options, Recipe, Source

if TYPE_CHECKING:
    from ..objective import Objective, ObjectiveContext


class LFMEOptions(Options):
    """Options of LFME; its classification loss is cross-entropy on logits scaled by the experts' confidence.

    Attributes:
        temperature: of the experts' softened predictions.
        alpha: weight of the experts.
        threshold: share of an expert's accuracy up to which it has its full weight.
    """

    temperature: float = Field(default=2.0, gt=0)
    alpha: float = Field(default=1.0, ge=0)
    threshold: float = Field(default=0.3, ge=0, lt=1)


def build(options: LFMEOptions, context: ObjectiveContext) -> Objective:
    from ..errors import ConfigError
    from ..losses.lfme import ExpertDistillation
    from ..objective import Objective, Term, on_logits_and_progress

    if options.classification != "cross-entropy":
        raise ConfigError(f"recipe lfme: it learns the labels by cross-entropy, got {options.classification!r}.")
    module = ExpertDistillation(
        context.groups, temperature=options.temperature, alpha=options.alpha, threshold=options.threshold
    )
    return Objective([Term("lfme", module, on_logits_and_progress, weight=options.classification_weight)])


RECIPES = (
    Recipe(
        name="lfme",
        summary="one expert per group of classes, each teaching until the student has caught up",
        source=Source("Learning From Multiple Experts: Self-paced Knowledge Distillation", 2020, "2001.01536"),
        needs=frozenset({"counts", "experts", "two stages"}),
        options=LFMEOptions,
        defaults_from="the authors' code: T 2, threshold 0.3",
        build=build,
    ),
)
