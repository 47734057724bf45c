"""No teacher: the student learns from the labels alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Options, Recipe, Source

if TYPE_CHECKING:
    from ..objective import Objective, ObjectiveContext


def build(options: Options, context: ObjectiveContext) -> Objective:
    from ..objective import Objective

    return Objective([context.labels_term(options.classification, options.classification_weight)])


RECIPES = (
    Recipe(
        name="none",
        summary="no teacher: the student learns from the labels alone",
        source=Source("Balanced Meta-Softmax for Long-Tailed Visual Recognition", 2020, "2007.10740"),
        needs=frozenset(),
        options=Options,
        defaults_from="cross-entropy; balanced softmax with classification=balanced-softmax",
        build=build,
    ),
)
