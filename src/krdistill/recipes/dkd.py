"""Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from .base import TEACHER, Recipe, Source
from .divergence import LogitOptions, one_term

if TYPE_CHECKING:
    from ..objective import Objective, ObjectiveContext


class DKDOptions(LogitOptions):
    """Options of DKD.

    Attributes:
        alpha: weight of the divergence on the target class.
        beta: weight of the divergence among the other classes.
        warmup: share of the training over which the term rises from 0.
    """

    alpha: float = Field(default=1.0, ge=0)
    beta: float = Field(default=8.0, ge=0)
    warmup: float = Field(default=20 / 240, ge=0, le=1)


def build(options: DKDOptions, context: ObjectiveContext) -> Objective:
    from ..losses.dkd import DKD
    from ..objective import on_logits

    module = DKD(alpha=options.alpha, beta=options.beta, temperature=options.temperature)
    return one_term(options, context, "dkd", module, on_logits, weight=options.logit_weight, warmup=options.warmup)


RECIPES = (
    Recipe(
        name="dkd",
        summary="the target class and the other classes, each distilled by itself",
        source=Source("Decoupled Knowledge Distillation", 2022, "2203.08679"),
        needs=TEACHER,
        options=DKDOptions,
        defaults_from="mdistiller: alpha 1, beta 8, T 4, warm-up 20 of 240 epochs",
        build=build,
    ),
)
