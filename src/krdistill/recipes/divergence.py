"""Recipes of one divergence beside the classification loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from .base import Options

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from ..objective import Objective, ObjectiveContext
    from ..outputs import Step


class LogitOptions(Options):
    """Options of the recipes with one term on predictions.

    Attributes:
        logit_weight: its weight.
        temperature: of the softened predictions.
    """

    logit_weight: float = Field(default=1.0, gt=0)
    temperature: float = Field(default=4.0, gt=0)


class FeatureOptions(Options):
    """Options of the recipes with one term on features.

    Attributes:
        feature_weight: its weight.
    """

    feature_weight: float = Field(default=1.0, gt=0)


def one_term(
    options: Options,
    context: ObjectiveContext,
    name: str,
    module: nn.Module,
    call: Callable[[nn.Module, Step], Tensor],
    *,
    weight: float,
    warmup: float = 0.0,
) -> Objective:
    """The classification loss and one more term."""
    from ..objective import Objective, Term

    labels = context.labels_term(options.classification, options.classification_weight)
    return Objective([labels, Term(name, module, call, weight=weight, warmup=warmup)])
