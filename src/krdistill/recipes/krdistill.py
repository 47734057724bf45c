"""Huang et al., "Learn from Balance: Rectifying Knowledge Transfer for Long-Tailed Scenarios", 2024, arXiv 2409.07694.

The paper's equations are not public: the names and purposes of the two losses are its own, the formulation is ours.
"""

from __future__ import annotations

from .base import COUNTS, FEATURES, Recipe, Source
from .distill import DistillOptions, build

_SOURCE = Source("Learn from Balance: Rectifying Knowledge Transfer for Long-Tailed Scenarios", 2024, "2409.07694")
_FROM = "our formulation, chosen by measurement: see docs/results.md"
_LRD = {"classification": "balanced-softmax", "prior": "label"}
_RRD = {"classification": "balanced-softmax", "feature_weight": 5.0}

RECIPES = (
    Recipe(
        name="krdistill",
        summary="a balanced classifier, fitted on its features, answers for the teacher (LRD); features matched (RRD)",
        source=_SOURCE,
        needs=FEATURES,
        options=DistillOptions,
        sampler="square-root",
        defaults={**_LRD, **_RRD, "prior": "refit"},
        defaults_from=_FROM,
        build=build,
    ),
    Recipe(
        name="krdistill-lrd",
        summary="logit rectification alone, of predictions alone: the label prior removed",
        source=_SOURCE,
        needs=COUNTS,
        options=DistillOptions,
        sampler="square-root",
        defaults=_LRD,
        defaults_from=_FROM,
        build=build,
    ),
    Recipe(
        name="krdistill-rrd",
        summary="representation rectification alone: features pulled to balanced anchors, the rarer the class the more",
        source=_SOURCE,
        needs=FEATURES,
        options=DistillOptions,
        sampler="square-root",
        defaults={**_RRD, "rectify": "blend", "logit_weight": 0.0},
        defaults_from=_FROM,
        build=build,
    ),
)
