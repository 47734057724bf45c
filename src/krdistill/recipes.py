"""Recipes: named methods = classification loss + rectifiers + divergences, with the paper each comes from.

A recipe is a frozen record. Its options are a typed class whose defaults say where they come from; its ``build``
turns them into an :class:`~krdistill.objective.Objective`. Listing recipes imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from .config import RecipeConfig, Section, validate
from .errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from .objective import Objective, ObjectiveContext


class Options(Section):
    """Options that every recipe has.

    Attributes:
        classification: the student's own loss on the labels. ``balanced-softmax`` adds the log prior to the logits
            while training, so that the plain logits are a balanced classifier at test time.
        classification_weight: its weight.
    """

    classification: Literal["cross-entropy", "balanced-softmax"] = "cross-entropy"
    classification_weight: float = Field(default=1.0, ge=0)


class DistillOptions(Options):
    """Options of the recipes built from a rectified-logit and a rectified-feature term.

    Attributes:
        logit_weight: weight of the divergence on predictions; 0 leaves it out.
        temperature: of that divergence.
        prior: which class prior is removed from the teacher's logits: none, the training ``label`` frequencies, or the
            ``teacher``'s own class-balanced mean prediction on images it was not fitted to.
        tau: how much of it, a number or ``auto`` (the value that evens out the class-mean confidences).
        correction: what happens where the teacher is wrong: ``lift`` raises the true class to the top, ``swap`` lets
            it trade places with the winner.
        group_weights: weight samples so that every group of classes has the same share of the logit term.
        feature_weight: weight of the match of features; 0 leaves it out.
        rectify: what is done to the teacher's feature: ``recentre`` moves it from its class mean to the class's
            balanced anchor, ``blend`` mixes the anchor in, the more the rarer the class.
        blend_strength: the largest share of the anchor in ``blend``.
        distance: between the student's projected feature and the (rectified) teacher's.
    """

    logit_weight: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=4.0, gt=0)
    prior: Literal["none", "label", "teacher"] = "none"
    tau: float | Literal["auto"] = 1.0
    correction: Literal["none", "lift", "swap"] = "none"
    group_weights: bool = False
    feature_weight: float = Field(default=0.0, ge=0)
    rectify: Literal["none", "recentre", "blend"] = "none"
    blend_strength: float = Field(default=0.5, ge=0, le=1)
    distance: Literal["cosine", "squared"] = "cosine"

    @model_validator(mode="after")
    def _nothing_silent(self) -> DistillOptions:
        if self.classification_weight == self.logit_weight == self.feature_weight == 0:
            raise ValueError("all weights are 0, so nothing would be trained")
        return self


@dataclass(frozen=True)
class Source:
    """Where a method comes from."""

    title: str
    year: int
    arxiv: str = ""


@dataclass(frozen=True)
class Recipe:
    """A named method.

    Attributes:
        name: as given to ``--recipe``.
        summary: one line.
        source: the paper.
        needs: what it takes besides images and labels: ``teacher``, ``counts``, ``features``.
        options: the class of its options.
        defaults: where its defaults differ from the class's.
        defaults_from: where the defaults come from.
        build: options and context to an objective.
    """

    name: str
    summary: str
    source: Source
    needs: frozenset[str]
    options: type[Options]
    defaults: Mapping[str, Any]
    defaults_from: str
    build: Callable[[Any, ObjectiveContext], Objective]

    def resolve(self, options: Mapping[str, Any]) -> Options:
        """The recipe's options with the user's values over its defaults; unknown ones are refused."""
        resolved: Options = validate(self.options, {**self.defaults, **options}, where=f"recipe {self.name}")
        return resolved


_HINTON = Source("Distilling the Knowledge in a Neural Network", 2015, "1503.02531")
_KRDISTILL = Source("Learn from Balance: Rectifying Knowledge Transfer for Long-Tailed Scenarios", 2024, "2409.07694")
_BALANCED_SOFTMAX = Source("Balanced Meta-Softmax for Long-Tailed Visual Recognition", 2020, "2007.10740")

_OURS = "our formulation; measured on small networks"
_TEACHER = frozenset({"teacher"})
_COUNTS = frozenset({"teacher", "counts"})
_FEATURES = frozenset({"teacher", "counts", "features"})


def _build_supervised(options: Options, context: ObjectiveContext) -> Objective:
    from .objective import supervised_objective

    return supervised_objective(options, context)


def _build_distill(options: DistillOptions, context: ObjectiveContext) -> Objective:
    from .objective import distillation_objective

    return distillation_objective(options, context)


_RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "none",
            "no teacher: the student learns from the labels alone",
            _BALANCED_SOFTMAX,
            frozenset(),
            Options,
            {},
            "cross-entropy; balanced softmax by --recipe.classification balanced-softmax",
            _build_supervised,
        ),
        Recipe(
            "kd",
            "plain knowledge distillation: the student takes over the teacher's bias",
            _HINTON,
            _TEACHER,
            DistillOptions,
            {"classification_weight": 0.1, "logit_weight": 0.9},
            "the field's CIFAR setting (T 4, weights 0.1 / 0.9)",
            _build_distill,
        ),
        Recipe(
            "kd-balanced",
            "knowledge distillation with a balanced-softmax student",
            _HINTON,
            _COUNTS,
            DistillOptions,
            {"classification": "balanced-softmax"},
            "weights 1 / 1, T 4",
            _build_distill,
        ),
        Recipe(
            "krdistill-lrd",
            "logit rectification alone: prior removed, errors corrected",
            _KRDISTILL,
            _COUNTS,
            DistillOptions,
            {"classification": "balanced-softmax", "prior": "label", "correction": "lift"},
            _OURS,
            _build_distill,
        ),
        Recipe(
            "krdistill-rrd",
            "representation rectification alone: features pulled to balanced anchors",
            _KRDISTILL,
            _FEATURES,
            DistillOptions,
            {"classification": "balanced-softmax", "logit_weight": 0.0, "feature_weight": 5.0, "rectify": "blend"},
            _OURS,
            _build_distill,
        ),
        Recipe(
            "krdistill",
            "rectified logits and rectified representations (LRD and RRD)",
            _KRDISTILL,
            _FEATURES,
            DistillOptions,
            {
                "classification": "balanced-softmax",
                "prior": "label",
                "correction": "lift",
                "feature_weight": 5.0,
                "rectify": "blend",
            },
            _OURS,
            _build_distill,
        ),
    )
}


def list_recipes() -> list[Recipe]:
    """Every recipe, in the order of the documentation."""
    return list(_RECIPES.values())


def recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        ConfigError: no such recipe; the message names the nearest ones.
    """
    if name not in _RECIPES:
        raise ConfigError(unknown_name("recipe", name, _RECIPES, hint="See krdistill list recipes."))
    return _RECIPES[name]


def resolve_recipe(config: RecipeConfig) -> tuple[Recipe, Options]:
    """A recipe and its options, from a run's configuration."""
    found = recipe(config.name)
    return found, found.resolve(config.options)
