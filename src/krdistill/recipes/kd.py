"""Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531."""

from __future__ import annotations

from .base import COUNTS, TEACHER, Recipe, Source
from .distill import DistillOptions, build

_SOURCE = Source("Distilling the Knowledge in a Neural Network", 2015, "1503.02531")

RECIPES = (
    Recipe(
        name="kd",
        summary="plain knowledge distillation: the student takes over the teacher's bias",
        source=_SOURCE,
        needs=TEACHER,
        options=DistillOptions,
        defaults={"classification_weight": 0.1, "logit_weight": 0.9},
        defaults_from="the field's CIFAR setting (T 4, weights 0.1 / 0.9)",
        build=build,
    ),
    Recipe(
        name="kd-balanced",
        summary="knowledge distillation with a balanced-softmax student",
        source=_SOURCE,
        needs=COUNTS,
        options=DistillOptions,
        defaults={"classification": "balanced-softmax"},
        defaults_from="weights 1 / 1, T 4",
        build=build,
    ),
)
