"""Registries of named runs and sweeps. A recipe is a function that returns a RunConfig or a SweepConfig."""

from collections.abc import Callable

from llmeff.config.run import RunConfig
from llmeff.config.sweep import SweepConfig
from llmeff.core.registry import Registry

RECIPES: Registry[Callable[[], RunConfig]] = Registry("recipe")
"""Recipes of single runs, by name."""
SWEEPS: Registry[Callable[[], SweepConfig]] = Registry("sweep")
"""Recipes of sweeps, by name."""


def recipe(function: Callable[[], RunConfig]) -> Callable[[], RunConfig]:
    """Registers a recipe of a run under the function's name, with dashes instead of underscores."""
    RECIPES.add(_name(function), function)
    return function


def sweep_recipe(function: Callable[[], SweepConfig]) -> Callable[[], SweepConfig]:
    """Registers a recipe of a sweep under the function's name, with dashes instead of underscores."""
    SWEEPS.add(_name(function), function)
    return function


def _name(function: Callable[[], object]) -> str:
    return function.__name__.replace("_", "-")
