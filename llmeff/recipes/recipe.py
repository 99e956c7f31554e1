"""Named runs: functions that return a RunConfig."""

from collections.abc import Callable

from llmeff.core.registry import Registry
from llmeff.runconfig import RunConfig

RECIPES: Registry[Callable[[], RunConfig]] = Registry("recipe")
"""All recipes by name."""


def recipe(function: Callable[[], RunConfig]) -> Callable[[], RunConfig]:
    """Enters a recipe under its function's name, with dashes for underscores."""
    RECIPES.add(function.__name__.replace("_", "-"), function)
    return function
