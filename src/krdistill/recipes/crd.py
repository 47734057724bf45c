"""Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from .base import Recipe, Source
from .divergence import FeatureOptions, one_term

if TYPE_CHECKING:
    from ..objective import Objective, ObjectiveContext


class CRDOptions(FeatureOptions):
    """Options of CRD.

    Attributes:
        negatives: images of other classes that each image is told from.
        embed_dim: width of both embeddings.
        contrast_temperature: of the contrast.
        momentum: of the memory.
    """

    feature_weight: float = Field(default=0.8, gt=0)
    negatives: int = Field(default=16384, ge=1)
    embed_dim: int = Field(default=128, ge=1)
    contrast_temperature: float = Field(default=0.07, gt=0)
    momentum: float = Field(default=0.5, ge=0, lt=1)


def build(options: CRDOptions, context: ObjectiveContext) -> Objective:
    from ..errors import ModelError
    from ..losses.crd import ContrastiveRepresentationDistillation
    from ..objective import on_indexed_features
    from ..rng import derive_seed, forked

    if context.labels is None:
        raise ModelError("CRD keeps a memory of every training image and needs their labels, got none.")
    teacher = context.require_teacher("CRD")
    with forked(context.seed, "crd"):
        module = ContrastiveRepresentationDistillation(
            context.student_dim,
            teacher.class_means.shape[1],
            len(context.labels),
            context.labels,
            embed_dim=options.embed_dim,
            negatives=options.negatives,
            temperature=options.contrast_temperature,
            momentum=options.momentum,
            seed=derive_seed(context.seed, "crd") % 2**31,
        )
    return one_term(options, context, "crd", module, on_indexed_features, weight=options.feature_weight)


RECIPES = (
    Recipe(
        name="crd",
        summary="an image's two embeddings agree, and differ from those of other classes' images",
        source=Source("Contrastive Representation Distillation", 2020, "1910.10699"),
        needs=frozenset({"teacher", "features", "memory"}),
        options=CRDOptions,
        defaults_from="RepDistiller: weight 0.8, 16,384 negatives, 128 dimensions, temperature 0.07, momentum 0.5",
        build=build,
    ),
)
