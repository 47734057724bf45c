"""Recipes: named methods = classification loss + rectifiers + divergences, with the paper each comes from.

A recipe is one file here that holds a tuple ``RECIPES``, and one line in the list below. Listing them imports no torch.
"""

from __future__ import annotations

from ..config import RecipeConfig
from ..errors import ConfigError, unknown_name
from . import bkd, cbd, cckd, crd, dive, dkd, kd, krdistill, lfme, ltkd, none, relations, reviewkd, simkd, ssd
from .base import Options, Recipe, Source

_FILES = (
    krdistill,
    kd,
    bkd,
    ltkd,
    cckd,
    dive,
    cbd,
    ssd,
    lfme,
    dkd,
    relations,
    reviewkd,
    crd,
    simkd,
    none,
)

__all__ = ["Options", "Recipe", "Source", "list_recipes", "recipe", "resolve_recipe"]


def _collect() -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    for file in _FILES:
        for entry in file.RECIPES:
            if entry.name in found:
                raise ValueError(f"Two recipes are named {entry.name!r}; give one of them another name.")
            found[entry.name] = entry
    return found


_RECIPES = _collect()


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
