"""Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from .base import Recipe, Source
from .divergence import FeatureOptions, one_term

if TYPE_CHECKING:
    from ..objective import Objective, ObjectiveContext


class ReviewKDOptions(FeatureOptions):
    """Options of ReviewKD.

    Attributes:
        warmup: share of the training over which the term rises from 0.
    """

    feature_weight: float = Field(default=5.0, gt=0)
    warmup: float = Field(default=20 / 240, ge=0, le=1)


def build(options: ReviewKDOptions, context: ObjectiveContext) -> Objective:
    from ..losses.reviewkd import ReviewKD
    from ..objective import on_maps
    from ..rng import forked

    student, teacher = context.require_maps("ReviewKD")
    with forked(context.seed, "reviewkd"):
        module = ReviewKD(student, teacher)
    return one_term(options, context, "reviewkd", module, on_maps, weight=options.feature_weight, warmup=options.warmup)


RECIPES = (
    Recipe(
        name="reviewkd",
        summary="the student's stages, fused from deep to shallow, follow the teacher's",
        source=Source("Distilling Knowledge via Knowledge Review", 2021, "2104.09044"),
        needs=frozenset({"teacher", "maps"}),
        options=ReviewKDOptions,
        defaults_from="mdistiller, ResNet-32x4 to ResNet-8x4: weight 5, warm-up 20 of 240 epochs",
        build=build,
    ),
)
