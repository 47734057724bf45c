"""Kim, "Distilling Balanced Knowledge from a Biased Teacher", CVPR 2026, arXiv 2506.18496."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from .base import COUNTS, Recipe, Source
from .divergence import LogitOptions, one_term

if TYPE_CHECKING:
    from ..objective import Objective, ObjectiveContext


class LTKDOptions(LogitOptions):
    """Options of LTKD. Its groups are thirds of the classes sorted by count, whatever the groups of the report.

    Attributes:
        alpha: weight of the rebalanced divergence between groups.
        beta: weight of the evened-out divergences within groups.
    """

    alpha: float = Field(default=1.0, ge=0)
    beta: float = Field(default=1.0, ge=0)


def build(options: LTKDOptions, context: ObjectiveContext) -> Objective:
    from ..losses.ltkd import LTKD
    from ..objective import on_logits

    module = LTKD(
        context.prior.groups("thirds"), alpha=options.alpha, beta=options.beta, temperature=options.temperature
    )
    return one_term(options, context, "ltkd", module, on_logits, weight=options.logit_weight)


RECIPES = (
    Recipe(
        name="ltkd",
        summary="divergences between and within head, medium and tail classes, each rebalanced",
        source=Source("Distilling Balanced Knowledge from a Biased Teacher", 2026, "2506.18496"),
        needs=COUNTS,
        options=LTKDOptions,
        defaults_from="ours: the paper's alpha, beta and T were not to be found",
        build=build,
    ),
)
