"""Zhang et al., "Balanced Knowledge Distillation for Long-tailed Learning", 2021, arXiv 2104.10510."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from .base import COUNTS, Recipe, Source
from .divergence import LogitOptions, one_term

if TYPE_CHECKING:
    from ..objective import Objective, ObjectiveContext


class BKDOptions(LogitOptions):
    """Options of BKD.

    Attributes:
        beta: of the effective-number weights on the teacher's columns; 0 is plain distillation.
    """

    temperature: float = Field(default=2.0, gt=0)
    beta: float = Field(default=0.9999, ge=0, lt=1)


def build(options: BKDOptions, context: ObjectiveContext) -> Objective:
    from ..losses.bkd import BalancedDistillation
    from ..objective import on_logits

    module = BalancedDistillation(context.prior.counts, beta=options.beta, temperature=options.temperature)
    return one_term(options, context, "bkd", module, on_logits, weight=options.logit_weight)


RECIPES = (
    Recipe(
        name="bkd",
        summary="the teacher's softened prediction, re-weighted by class rarity",
        source=Source("Balanced Knowledge Distillation for Long-tailed Learning", 2021, "2104.10510"),
        needs=COUNTS,
        options=BKDOptions,
        defaults_from="the authors' code: T 2, beta 0.9999, weights 1 / 1",
        build=build,
    ),
)
