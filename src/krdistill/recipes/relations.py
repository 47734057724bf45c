"""Recipes that match relations between the images of a batch, or the logits themselves.

Park et al., "Relational Knowledge Distillation", CVPR 2019, arXiv 1904.05068; Tung, Mori, "Similarity-Preserving
Knowledge Distillation", ICCV 2019, arXiv 1907.09682; Kim et al., "Comparing Kullback-Leibler Divergence and Mean
Squared Error Loss in Knowledge Distillation", 2021, arXiv 2105.08919.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from .base import TEACHER, Options, Recipe, Source
from .divergence import FeatureOptions, one_term

if TYPE_CHECKING:
    from ..objective import Objective, ObjectiveContext

_NEEDS = frozenset({"teacher", "features"})


class RKDOptions(FeatureOptions):
    """Options of RKD.

    Attributes:
        distance_weight: of the distances between images.
        angle_weight: of the angles among three images.
    """

    distance_weight: float = Field(default=25.0, ge=0)
    angle_weight: float = Field(default=50.0, ge=0)


class SPOptions(FeatureOptions):
    """Options of similarity preserving."""

    feature_weight: float = Field(default=3000.0, gt=0)


class LogitMatchingOptions(Options):
    """Options of logit matching.

    Attributes:
        logit_weight: of the squared difference of the logits.
    """

    logit_weight: float = Field(default=1.0, gt=0)


def build_rkd(options: RKDOptions, context: ObjectiveContext) -> Objective:
    from ..losses.rkd import RKD
    from ..objective import on_feature_pairs

    module = RKD(distance_weight=options.distance_weight, angle_weight=options.angle_weight)
    return one_term(options, context, "rkd", module, on_feature_pairs, weight=options.feature_weight)


def build_sp(options: SPOptions, context: ObjectiveContext) -> Objective:
    from ..losses.similarity_preserving import SimilarityPreserving
    from ..objective import on_feature_pairs

    return one_term(options, context, "sp", SimilarityPreserving(), on_feature_pairs, weight=options.feature_weight)


def build_logit_matching(options: LogitMatchingOptions, context: ObjectiveContext) -> Objective:
    from ..losses.logit_matching import LogitMSE
    from ..objective import on_logits

    return one_term(options, context, "logit-matching", LogitMSE(), on_logits, weight=options.logit_weight)


RECIPES = (
    Recipe(
        name="rkd",
        summary="distances and angles among the images of a batch",
        source=Source("Relational Knowledge Distillation", 2019, "1904.05068"),
        needs=_NEEDS,
        options=RKDOptions,
        defaults_from="mdistiller: 25 for distances, 50 for angles",
        build=build_rkd,
    ),
    Recipe(
        name="sp",
        summary="similarities between the images of a batch",
        source=Source("Similarity-Preserving Knowledge Distillation", 2019, "1907.09682"),
        needs=_NEEDS,
        options=SPOptions,
        defaults_from="RepDistiller: weight 3000; on pooled features",
        build=build_sp,
    ),
    Recipe(
        name="logit-matching",
        summary="squared difference of the logits",
        source=Source("Comparing KL Divergence and Mean Squared Error Loss in KD", 2021, "2105.08919"),
        needs=TEACHER,
        options=LogitMatchingOptions,
        defaults_from="weights 1 / 1",
        build=build_logit_matching,
    ),
)
