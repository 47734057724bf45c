"""Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022, arXiv 2203.14001."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from .base import Options, Recipe, Source

if TYPE_CHECKING:
    from ..objective import Objective, ObjectiveContext


class SimKDOptions(Options):
    """Options of SimKD. The labels are not used unless ``classification_weight`` is above 0.

    Attributes:
        feature_weight: weight of the match of the last maps.
        factor: of the projector's bottleneck.
    """

    classification_weight: float = Field(default=0.0, ge=0)
    feature_weight: float = Field(default=1.0, gt=0)
    factor: int = Field(default=2, ge=1)


def build(options: SimKDOptions, context: ObjectiveContext) -> Objective:
    from ..losses.simkd import SimKD
    from ..objective import Objective, Term, on_last_maps

    context.require_maps("SimKD")
    labels = context.labels_term(options.classification, options.classification_weight)
    return Objective([labels, Term("simkd", SimKD(), on_last_maps, weight=options.feature_weight)])


RECIPES = (
    Recipe(
        name="simkd",
        summary="the student feeds the teacher's own, frozen classifier",
        source=Source("Knowledge Distillation with the Reused Teacher Classifier", 2022, "2203.14001"),
        needs=frozenset({"teacher", "features", "maps"}),
        options=SimKDOptions,
        defaults_from="the authors' code: maps alone, bottleneck factor 2",
        build=build,
        reuses_classifier=True,
    ),
)
